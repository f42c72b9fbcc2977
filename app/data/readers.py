"""Readers behind `open_source`: rows of tables, and plain text that is cut into documents.

A row of JSON lines, Parquet, CSV, TSV or a data set is a document. Of 32 or more text files each is a document; fewer
are cut by `cut_text`, so that one file gives three splits that work. Documents without text come out as empty strings:
whoever counts them knows how many there were.
"""

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.data.columns import RowColumns, row_documents
from app.data.source_index import SourcePart
from app.data.tables import ARROW_ERRORS, NUMERIC, TABLES, string_type
from app.data.unpacked import check_text, open_text
from models.errors import UserError
from models.io import inside, read_json

if TYPE_CHECKING:
    import datasets

TEXT_COLUMNS = ("text", "content", "document")  # the columns that are taken without asking
MANY_FILES = 32  # this many text files are documents themselves
LARGEST_FILE = 2**30  # a larger text file is cut all the same: it would be held in memory as one string
LARGE = 50_000_000  # bytes from which on `datasets` shows its progress
OWN_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("valid", "validation", "val", "dev"), "validation"
)
_TITLE = re.compile(r" ?= (?!=)[^\n]*[^=\s] = ?\n?")  # WikiText's title of an article; ` = = Section = = ` is none

Column = str | RowColumns | None  # with the text; the columns of a row with a label; None: it is to be found
Groups = dict[str | None, list[Path]]  # files under the split that their names give


def table_parts(kind: str, groups: Groups, names: dict[Path, str], source: str, column: Column) -> list[SourcePart]:
    """Open the files of one kind of TABLES: a row is a document, and all files have the text in the same column.

    Raises:
        UserError: a file cannot be read, or lacks the column that the first one with rows has.
    """
    table = TABLES[kind]
    found = {}
    if isinstance(column, RowColumns):
        rows = {file: partial(table.rows, file, not column.numbered) for file in names}
        return [
            SourcePart(split, partial(row_documents, rows[file], column, names[file], file))
            for split, files in groups.items()
            for file in files
        ]
    for file in names:
        if columns := table.columns(file):
            column = choose_column(columns, column, str(file) if found else source)
            found[file] = partial(table.texts, file, column)
    return [
        SourcePart(split, partial(_numbered, names[file], found[file]))
        for split, files in groups.items()
        for file in files
        if file in found
    ]


def no_rows(source: str, columns: RowColumns) -> str:
    """The sentence for a source that is no table."""
    return (
        f"source '{source}' is plain text and has no column '{columns.label}'; rows with a label come from a TSV, CSV, "
        "JSON-lines or Parquet file, or from a data set"
    )


def _numbered(name: str, texts: Callable[[], Iterator[str]]) -> Iterator[tuple[str, str]]:
    return ((f"{name}:{row}", text) for row, text in enumerate(texts()))


def _datasets(size: int) -> Any:
    """Return the library, with progress bars when there are many bytes to read."""
    import datasets  # a second of imports that the other sources do without

    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it logs what it raises as well
    (datasets.enable_progress_bars if size >= LARGE else datasets.disable_progress_bars)()
    return datasets


def saved_parts(path: Path, source: str, column: Column) -> list[SourcePart]:
    """Open a folder that `datasets.save_to_disk` wrote.

    Raises:
        UserError: it is damaged, or names files outside itself.
    """
    _check_saved(path)
    datasets = _datasets(0)
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise UserError(f"source '{source}' cannot be read as a datasets folder: {error}") from error
    splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"": loaded}
    return split_parts(splits, source, column)


def _check_saved(path: Path) -> None:
    """Raise `UserError` if a folder of `datasets` is damaged in its JSON or names anything outside itself."""
    if (path / "dataset_dict.json").is_file():
        splits = read_json(inside(path, "dataset_dict.json")).get("splits")
        if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
            raise UserError(f"{path / 'dataset_dict.json'} has no list of splits")
        for split in splits:
            _check_saved(inside(path, split))
        return
    inside(path, "dataset_info.json")
    files = read_json(inside(path, "state.json")).get("_data_files")
    if not isinstance(files, list) or not all(isinstance(file, dict) for file in files):
        raise UserError(f"{path / 'state.json'} has no list of _data_files")
    for file in files:
        inside(path, str(file.get("filename")))


def from_hub(source: str, cache: Path) -> "dict[str, datasets.Dataset]":
    """Download `owner/name` or `owner/name:config` into the cache. No code from the hub is run."""
    name, _, config = source.partition(":")
    try:
        return dict(_datasets(LARGE).load_dataset(name, config or None, cache_dir=str(cache / "datasets")))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"source '{source}' is no file or folder here, and no data set that the hub could give: {reason}"
        ) from error


def split_parts(loaded: "dict[str, datasets.Dataset]", source: str, column: Column) -> list[SourcePart]:
    """Return a part for each split; beside a training split, splits of any other kind are left out."""
    parts = []
    for name, table in loaded.items():
        label = f"{source}:{name}" if name else source
        parts.append(_rows(table, OWN_SPLITS.get(name), label, column, source))
    known = [part for part in parts if part.split is not None]
    return known if any(part.split == "train" for part in known) else [part._replace(split=None) for part in parts]


def choose_column(columns: dict[str, str], column: str | None, source: str) -> str:
    """Return the column that holds the text: `column` if given, else a usual name, else the only text column.

    Args:
        columns: name -> type of every column; `string` is text, NUMERIC too where the column is named.

    Raises:
        UserError: no such column, or it holds no text, or there is more than one to choose from.
    """
    texts = [name for name, kind in columns.items() if kind in ("string", NUMERIC)]
    strings = [name for name in texts if columns[name] == "string"]
    found = f"its columns are {', '.join(f'{name} ({kind})' for name, kind in columns.items())}"
    if column is not None:
        if column not in columns:
            raise UserError(f"source '{source}' has no column '{column}'; {found}")
        if column not in texts:
            raise UserError(f"source '{source}': column '{column}' holds no text; {found}")
        return column
    for name in TEXT_COLUMNS:
        if name in texts:
            return name
    if len(strings) != 1:
        raise UserError(f"source '{source}': which column is the text? Name it with column; {found}")
    return strings[0]


def _rows(table: "datasets.Dataset", split: str | None, name: str, column: Column, source: str) -> SourcePart:
    if isinstance(column, RowColumns):
        return SourcePart(split, partial(row_documents, partial(_cells, table, source), column, name, source))
    types = {field.name: string_type(field.type) for field in table.features.arrow_schema}
    chosen = choose_column(types, column, source)

    def texts() -> Iterator[str]:
        for batch in table.select_columns([chosen]).with_format("arrow").iter(batch_size=1000):
            try:
                batch.validate(full=True)  # the files are mapped as they are
                rows = batch[chosen].to_pylist()
            except ARROW_ERRORS as error:
                raise UserError(f"source '{source}' is damaged: {error}") from error
            yield from (text or "" for text in rows)

    return SourcePart(split, partial(_numbered, name, texts))


def _cells(table: "datasets.Dataset", source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a data set, each with its place."""
    count = 0
    for batch in table.with_format("arrow").iter(batch_size=1000):
        try:
            batch.validate(full=True)  # the files are mapped as they are
            rows = batch.to_pylist()
        except ARROW_ERRORS as error:
            raise UserError(f"source '{source}' is damaged: {error}") from error
        yield from ((f"row {number}", row) for number, row in enumerate(rows, count + 1))
        count += len(rows)


def text_parts(groups: Groups, names: dict[Path, str], source: str, column: Column) -> list[SourcePart]:
    """Open UTF-8 text files: 32 or more are documents, fewer are cut into documents."""
    if isinstance(column, RowColumns):
        raise UserError(no_rows(source, column))
    if column is not None:
        raise UserError(f"source '{source}' is plain text and has no column '{column}'; leave column out")
    for file in names:
        check_text(file)
    sizes = {file: file.stat().st_size for file in names}
    length = min(max(sum(sizes.values()) // 64, 256), 8192)
    parts = []
    for split, files in groups.items():
        if len(names) >= MANY_FILES and max(sizes.values()) < LARGEST_FILE:
            parts.append(SourcePart(split, partial(_whole_files, {file: names[file] for file in files})))
        else:
            parts += [SourcePart(split, partial(_cut_file, file, names[file], length)) for file in files]
    return parts


def _whole_files(names: dict[Path, str]) -> Iterator[tuple[str, str]]:
    for file, name in names.items():
        with open_text(file) as stream:
            yield name, stream.read()


def _cut_file(file: Path, name: str, length: int) -> Iterator[tuple[str, str]]:
    with open_text(file) as lines:
        for number, text in enumerate(cut_text(lines, length)):
            yield f"{name}:{number}", text


def cut_text(lines: Iterable[str], length: int) -> Iterator[str]:
    """Cut one long text into documents; joined, they are the text again.

    A text that begins with a WikiText title line (` = Title = `) is cut before each such line: an article is a
    document. Any other is cut after the first blank line behind `length` characters, or at the end of a line where no
    blank line comes before four times `length`; a longer line is cut into pieces of that size.

    Args:
        lines: the lines, with their line ends.
        length: size of a document in characters from which on a blank line ends it.
    """
    longest = 4 * length
    wiki: bool | None = None
    held: list[str] = []
    size = 0
    for line in lines:
        blank = not line.strip()
        if wiki is None and not blank:
            wiki = _TITLE.fullmatch(line) is not None
        if held and ((wiki and _TITLE.fullmatch(line)) or (not wiki and size + len(line) > longest)):
            yield "".join(held)
            held, size = [], 0
        while not wiki and len(line) > longest:
            yield line[:longest]
            line = line[longest:]
        held.append(line)
        size += len(line)
        if not wiki and blank and size >= length:
            yield "".join(held)
            held, size = [], 0
    if size:
        yield "".join(held)

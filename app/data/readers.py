"""Readers behind `open_source`: tables and plain text, through `datasets` and its cache.

A row of JSON lines, Parquet, CSV or a data set is a document. Of 32 or more text files each is a document; fewer are
cut by `cut_text`, so that one file gives three splits that work.
"""

import codecs
import glob
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.data.survey import Part
from models.errors import UserError

if TYPE_CHECKING:
    import datasets

PACKED = {".gz", ".bz2", ".xz", ".zst"}  # endings that `datasets` unpacks
TEXT_COLUMNS = ("text", "content", "document")  # the columns that are taken without asking
MANY_FILES = 32  # this many text files are documents themselves
LARGEST_FILE = 2**30  # a larger text file is cut all the same: it would not fit into one Arrow string
LARGE = 50_000_000  # bytes from which on `datasets` shows its progress
OWN_SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("valid", "validation", "val", "dev"), "validation"
)
_TITLE = re.compile(r" ?= (?!=)[^\n]*[^=\s] = ?\n?")  # WikiText's title of an article; ` = = Section = = ` is none
_STRINGS = ("string", "large_string")

Groups = dict[str | None, list[Path]]  # files under the split that their names give


def _load(kind: str, files: list[Path], cache: Path, **options: Any) -> "datasets.Dataset":
    datasets = _datasets(sum(file.stat().st_size for file in files))
    try:
        names = [glob.escape(str(file.resolve())) for file in files]
        return datasets.load_dataset(
            kind, data_files={"train": names}, split="train", cache_dir=str(cache / "datasets"), **options
        )
    except Exception as error:  # `datasets` wraps whatever went wrong in its readers
        reason = str(error.__cause__ or error).splitlines()[0]
        shown = str(files[0]) + (f" and {len(files) - 1} more" if len(files) > 1 else "")
        raise UserError(f"source '{shown}' cannot be read as {kind}: {reason}") from error


def _datasets(size: int) -> Any:
    """Return the library, with progress bars when there are many bytes to read."""
    import datasets  # a second of imports that the default corpus does without

    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # it logs what it raises as well
    (datasets.enable_progress_bars if size >= LARGE else datasets.disable_progress_bars)()
    return datasets


def table_parts(
    kind: str, groups: Groups, names: dict[Path, str], source: str, column: str | None, cache: Path
) -> list[Part]:
    """Open JSON-lines, Parquet or CSV files (`kind` is the name of a reader of `datasets`): a row is a document."""
    parts = []
    for split, files in groups.items():
        options = {"delimiter": "\t"} if kind == "csv" and ".tsv" in files[0].suffixes else {}
        table = _load(kind, files, cache, **options)
        name = names[files[0]] if len(files) == 1 else source + (f":{split}" if split else "")
        parts.append(_rows(table, split, name, choose_column(table.features, column, source)))
    return parts


def saved_parts(path: Path, source: str, column: str | None) -> list[Part]:
    """Open a folder that `datasets.save_to_disk` wrote."""
    datasets = _datasets(0)
    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise UserError(f"source '{source}' cannot be read as a datasets folder: {error}") from error
    splits = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {"": loaded}
    return split_parts(splits, source, column)


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


def split_parts(loaded: "dict[str, datasets.Dataset]", source: str, column: str | None) -> list[Part]:
    """Return a part for each split; beside a training split, splits of any other kind are left out."""
    parts = []
    for name, table in loaded.items():
        label = f"{source}:{name}" if name else source
        parts.append(_rows(table, OWN_SPLITS.get(name), label, choose_column(table.features, column, source)))
    known = [part for part in parts if part.split is not None]
    return known if any(part.split == "train" for part in known) else [part._replace(split=None) for part in parts]


def choose_column(features: "datasets.Features", column: str | None, source: str) -> str:
    """Return the column that holds the text: `column` if given, else a usual name, else the only text column.

    Raises:
        UserError: no such column, or it holds no text, or there is more than one to choose from.
    """
    strings = [name for name, feature in features.items() if getattr(feature, "dtype", None) in _STRINGS]
    found = f"its columns are {', '.join(f'{name} ({_type(feature)})' for name, feature in features.items())}"
    if column is not None:
        if column not in features:
            raise UserError(f"source '{source}' has no column '{column}'; {found}")
        if column not in strings:
            raise UserError(f"source '{source}': column '{column}' holds no text; {found}")
        return column
    for name in TEXT_COLUMNS:
        if name in strings:
            return name
    if len(strings) != 1:
        raise UserError(f"source '{source}': which column is the text? Name it with column; {found}")
    return strings[0]


def _type(feature: Any) -> str:
    return getattr(feature, "dtype", None) or type(feature).__name__.lower()


def _rows(table: "datasets.Dataset", split: str | None, name: str, column: str) -> Part:
    def documents() -> Iterator[tuple[str, str]]:
        row = 0
        for batch in table.select_columns([column]).iter(batch_size=1000):
            for text in batch[column]:
                if text:
                    yield f"{name}:{row}", text
                row += 1

    return Part(split, documents)


def text_parts(groups: Groups, names: dict[Path, str], source: str, column: str | None, cache: Path) -> list[Part]:
    """Open UTF-8 text files: 32 or more are documents, fewer are cut into documents."""
    if column is not None:
        raise UserError(f"source '{source}' is plain text and has no column '{column}'; leave column out")
    for file in names:
        check_text(file)
    sizes = {file: file.stat().st_size for file in names}
    length = min(max(sum(sizes.values()) // 64, 256), 8192)
    parts = []
    for split, files in groups.items():
        if len(names) >= MANY_FILES and max(sizes.values()) < LARGEST_FILE:
            parts.append(_whole_files(files, split, [names[file] for file in files], cache))
        else:
            parts += [_cut_file(file, split, names[file], length, cache) for file in files if sizes[file]]
    return parts


def _whole_files(files: list[Path], split: str | None, names: list[str], cache: Path) -> Part:
    table = _load("text", files, cache, sample_by="document")

    def documents() -> Iterator[tuple[str, str]]:
        for name, row in zip(names, table, strict=True):
            if row["text"]:
                yield name, row["text"]

    return Part(split, documents)


def _cut_file(file: Path, split: str | None, name: str, length: int, cache: Path) -> Part:
    table = _load("text", [file], cache, keep_linebreaks=True)

    def documents() -> Iterator[tuple[str, str]]:
        lines = (line for batch in table.iter(batch_size=1000) for line in batch["text"])
        for number, text in enumerate(cut_text(lines, length)):
            yield f"{name}:{number}", text

    return Part(split, documents)


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


def check_text(file: Path) -> None:
    """Raise `UserError` if `file` is no UTF-8 text: a NUL byte or bytes that do not decode. Packed files are let by."""
    if file.suffix.lower() in PACKED:
        return
    decoder = codecs.getincrementaldecoder("utf-8")()
    read = 0
    with file.open("rb") as stream:
        while True:
            chunk = stream.read(1 << 20)
            if (nul := chunk.find(b"\0")) >= 0:
                raise UserError(f"source '{file}' is binary, not text: byte {read + nul} is NUL")
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                where = read - len(decoder.getstate()[0]) + error.start
                raise UserError(f"source '{file}' is not UTF-8 text: byte {where} cannot be decoded") from error
            if not chunk:
                return
            read += len(chunk)

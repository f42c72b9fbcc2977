"""SOURCE: what a person may name as text.

`python` (the default corpus), `synthetic`, a file, a folder or a glob of files of one kind (text, JSON lines, Parquet,
CSV, TSV), a folder written by `datasets.save_to_disk`, or the name of a data set on the hub (`owner/name`,
`owner/name:config`). What of a source is not read is said: see `Corpus.left_out`.

Splits: where the source names its own (a hub or `datasets` split, or files called train.*, valid*.*, test*.*, alone in
a name like wiki.train.tokens) they are kept, and a held-out split that is missing is cut from the training split.
Otherwise every document goes to a split by a hash of its text: 90 % train, 5 % validation, 5 % test.

Documents: a row of JSON lines, Parquet, CSV, TSV or a data set is a document. Of 32 or more text files each is one;
fewer are cut by `cut_text`, so that one file gives three splits that work.
"""

import glob
import hashlib
import os
import re
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from app.data import readers
from app.data.cache import cache_root
from app.data.corpus import Corpus, python_corpus, synthetic
from app.data.source_index import SourceCorpus
from app.data.unpacked import suffix
from models.errors import UserError, did_you_mean

KINDS = {".parquet": "parquet", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv"}
TEXT = {".txt", ".text", ".tokens", ".raw", ".md", ".rst"}
READING = 2  # part of the identity: a change of how files are read makes what was worked out before worthless
_ABOUT = ("readme", "license", "licence", "changelog", "citation")  # texts beside tables that are no data
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def open_source(source: str, column: readers.Column = None, cache_dir: str | Path | None = None) -> Corpus:
    """Open a SOURCE.

    Args:
        source: see the top of this file.
        column: column or JSON field with the text; by default `text`, `content`, `document`, or the only text column.
            `RowColumns` gives rows with a label (app/data/columns.py).
        cache_dir: cache folder; `cache_root` says what the default is.

    Raises:
        UserError: nothing there (with the nearest name), files of several kinds, an unreadable or binary file, no such
            column, no text.
    """
    if source in ("python", "synthetic") and isinstance(column, readers.RowColumns):
        raise UserError(readers.no_rows(source, column))
    if source == "python":
        return python_corpus()
    if source == "synthetic":
        return synthetic()
    try:
        return _open(source, column, cache_root(cache_dir))
    except OSError as error:
        raise UserError(f"source '{source}' cannot be read: {error.strerror or error}") from error


def _open(source: str, column: readers.Column, cache: Path) -> SourceCorpus:
    path = _path(source)
    if path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
        files = sorted(file for file in path.rglob("*") if file.is_file())
        load = partial(readers.saved_parts, path, source, column)
        return SourceCorpus(source, _identity(files, column), _size(files), load, cache)
    if path.exists() or glob.has_magic(source):
        files, unread = find_files(source)
        kind = _kind(files, source)
        names = {file: _label(file, path if path.is_dir() else file.parent) for file in files}
        read = readers.text_parts if kind == "text" else partial(readers.table_parts, kind)
        load = partial(read, _groups(files), names, source, column)
        return SourceCorpus(source, _identity(files, kind, column), _size(files), load, cache, unread)
    if _HUB_NAME.fullmatch(source) and not path.parent.is_dir() and not _known(path):
        tables = readers.from_hub(source, cache)
        identity = _digest(READING, source, column, *(table._fingerprint for table in tables.values()))
        size = sum(table.dataset_size or 0 for table in tables.values())
        return SourceCorpus(source, identity, size, partial(readers.split_parts, tables, source, column), cache)
    raise UserError(f"source '{source}': no such file or folder{_nearest(path)}")


def _path(source: str) -> Path:
    try:
        return Path(source).expanduser()
    except RuntimeError as error:
        raise UserError(f"source '{source}': {error}") from error


def find_files(source: str) -> tuple[list[Path], str]:
    """Return the files of a path or glob, sorted, and what is left out, in words.

    Of a folder these are the files below it that have a known ending. Left out are hidden files (not mentioned), other
    endings, linked folders, and READMEs and the like beside tables.

    Raises:
        UserError: no file matches, or one is a pipe, a device or a broken link.
    """
    path = _path(source)
    if path.is_dir():
        found, others = _walk(path)
        if not found:
            known = ", ".join(sorted({*KINDS, *TEXT}))
            raise UserError(f"source '{source}': no file below this folder ends in {known}; give a glob such as '*.py'")
    else:
        matches = [path] if path.exists() else [Path(name) for name in glob.glob(str(path), recursive=True)]
        found = [match for match in matches if not match.is_dir()]
        others = Counter({"folder": len(matches) - len(found)} if len(matches) > len(found) else {})
        if not found:
            raise UserError(f"source '{source}': the pattern matches no file")
    for file in found:
        if not file.is_file():
            what = "a pipe or a device" if file.exists() else "a broken link"
            raise UserError(f"source '{file}' is {what}; a text is read more than once, so it must be a file")
    shown = ", ".join(f"{number} {name}" for name, number in sorted(others.items()))
    return sorted(found), f"not read: {shown}" if shown else ""


def _walk(path: Path) -> tuple[list[Path], Counter[str]]:
    """The files below a folder that count as text, and how many of what else is there."""

    def fail(error: OSError) -> None:
        raise error

    found: list[Path] = []
    others: Counter[str] = Counter()
    for root, folders, names in os.walk(path, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        others["linked folder"] += sum(Path(root, name).is_symlink() for name in folders)
        for file in (Path(root, name) for name in names if not name.startswith(".")):
            if _known(file):
                found.append(file)
            else:
                others[f"*{file.suffix}" if file.suffix else file.name] += 1
    if any(suffix(file) in KINDS for file in found):
        about = [file for file in found if suffix(file) in TEXT and file.stem.lower() in _ABOUT]
        found = [file for file in found if file not in about]
        others.update(file.name for file in about)
    return found, +others


def _known(file: Path) -> bool:
    return suffix(file) in KINDS or suffix(file) in TEXT


def _kind(files: list[Path], source: str) -> str:
    kinds = {KINDS.get(suffix(file), "text") for file in files}
    if len(kinds) > 1:
        raise UserError(f"source '{source}' mixes {', '.join(sorted(kinds))} files; give a glob that matches one kind")
    if not _size(files):
        raise UserError(f"source '{source}' is empty")
    return kinds.pop()


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _identity(files: list[Path], *options: Any) -> str:
    stats = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    return _digest(READING, stats, *options)


def _size(files: list[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _nearest(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return f"; its folder '{parent}' does not exist either"
    names = [str(entry) for entry in parent.iterdir()] + (["python", "synthetic"] if str(parent) == "." else [])
    hint = did_you_mean(str(path), names)
    return hint if hint.startswith(" (did") else "; give a file, a folder, a glob, 'python' or a hub name OWNER/NAME"


def _own_split(file: Path) -> str | None:
    words = re.split(r"[\W_]+", file.name.lower())
    named = {readers.OWN_SPLITS[word] for word in words if word in readers.OWN_SPLITS}
    return named.pop() if len(named) == 1 else None


def _groups(files: list[Path]) -> readers.Groups:
    """Return the files under the split that their names give; all under None unless every one gives a split."""
    named = [_own_split(file) for file in files]
    if len(files) == 1 or None in named or "train" not in named:
        return {None: files}
    return {split: [f for f, of in zip(files, named, strict=True) if of == split] for split in dict.fromkeys(named)}


def _label(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)

"""SOURCE: what a person may name as text, read through `datasets` and its cache.

`python` (the default corpus), `synthetic`, a file, a folder or a glob of files (text, JSON lines, Parquet, CSV), a
folder written by `datasets.save_to_disk`, or the name of a data set on the hub (`owner/name`, `owner/name:config`).

Splits: where the source names its own (a hub or `datasets` split, or files called train.*, valid*.*, test*.*, alone in
a name like wiki.train.tokens) they are kept, and a held-out split that is missing is cut from the training split.
Otherwise every document goes to a split by a hash of its text: 90 % train, 5 % validation, 5 % test.

Documents: a row of JSON lines, Parquet, CSV or a data set is a document. Of 32 or more text files each is a document;
fewer are cut by `cut_text`, so that one file gives three splits that work.
"""

import glob
import hashlib
import re
from functools import partial
from pathlib import Path
from typing import Any

from app.data import readers
from app.data.cache import cache_root
from app.data.corpus import Corpus, python_corpus, synthetic
from app.data.survey import SourceCorpus
from models.errors import UserError, did_you_mean

KINDS = {".parquet": "parquet", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv"}
TEXT = {".txt", ".text", ".tokens", ".raw", ".md", ".rst"}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def open_source(source: str, column: str | None = None, cache_dir: str | Path | None = None) -> Corpus:
    """Open a SOURCE.

    Args:
        source: see the top of this file.
        column: column or JSON field with the text; by default `text`, `content`, `document`, or the only text column.
        cache_dir: cache folder; `cache_root` says what the default is.

    Raises:
        UserError: nothing there (with the nearest name), an unreadable or binary file, no such column, no text.
    """
    if source == "python":
        return python_corpus()
    if source == "synthetic":
        return synthetic()
    cache = cache_root(cache_dir)
    path = Path(source).expanduser()
    if path.is_dir() and ((path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()):
        files = sorted(file for file in path.rglob("*") if file.is_file())
        load = partial(readers.saved_parts, path, source, column)
        return SourceCorpus(source, _identity(files, column), _size(files), load, cache)
    if path.exists() or glob.has_magic(source):
        files = find_files(source)
        kind = _kind(files, source)
        names = {file: _label(file, path if path.is_dir() else file.parent) for file in files}
        read = readers.text_parts if kind == "text" else partial(readers.table_parts, kind)
        load = partial(read, _groups(files), names, source, column, cache)
        return SourceCorpus(source, _identity(files, kind, column), _size(files), load, cache)
    if _HUB_NAME.fullmatch(source) and not path.parent.is_dir() and not _known(path):
        tables = readers.from_hub(source, cache)
        identity = _digest(source, column, *(table._fingerprint for table in tables.values()))
        size = sum(table.dataset_size or 0 for table in tables.values())
        return SourceCorpus(source, identity, size, partial(readers.split_parts, tables, source, column), cache)
    raise UserError(f"source '{source}': no such file or folder{_nearest(path)}")


def find_files(source: str) -> list[Path]:
    """Return the files of a path or glob, sorted: of a folder, everything below it that has a known ending.

    Raises:
        UserError: no file matches.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file() and _known(file) and not _hidden(file, path)]
        tables = [file for file in found if _suffix(file) in KINDS]
        found = tables or found
        if not found:
            known = ", ".join(sorted({*KINDS, *TEXT}))
            raise UserError(f"source '{source}': no file below this folder ends in {known}; give a glob such as '*.py'")
        return sorted(found)
    found = [Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file()]
    if not found:
        raise UserError(f"source '{source}': the pattern matches no file")
    return sorted(found)


def _suffix(file: Path) -> str:
    return Path(file.stem).suffix.lower() if file.suffix.lower() in readers.PACKED else file.suffix.lower()


def _known(file: Path) -> bool:
    return _suffix(file) in KINDS or _suffix(file) in TEXT


def _hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _kind(files: list[Path], source: str) -> str:
    kinds = {KINDS.get(_suffix(file), "text") for file in files}
    if len(kinds) > 1:
        raise UserError(f"source '{source}' mixes {', '.join(sorted(kinds))} files; give a glob that matches one kind")
    if not _size(files):
        raise UserError(f"source '{source}' is empty")
    return kinds.pop()


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()


def _identity(files: list[Path], *options: Any) -> str:
    stats = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    return _digest(stats, *options)


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

"""Text files opened as UTF-8, packed (.gz, .bz2, .xz, .zst) or not, and checked before anything reads them."""

import bz2
import codecs
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pyarrow

from models.errors import UserError

PACKED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": partial(pyarrow.input_stream, compression="zstd"),
}
UNPACKED_FREELY = 1 << 26  # bytes that any packed file may unpack to
HIGHEST_RATIO = 64  # bytes that a byte of a larger one may unpack to; text takes between 3 and 10
_CHUNK = 1 << 20


def suffix(file: Path) -> str:
    """Return the ending that tells the kind of a file: `.jsonl` of `a.jsonl` and of `a.jsonl.gz`."""
    return Path(file.stem).suffix.lower() if file.suffix.lower() in PACKED else file.suffix.lower()


@contextlib.contextmanager
def open_text(file: Path) -> Iterator[TextIO]:
    """Open a file as text: unpacked, without a byte order mark, every line end as a newline (as Python reads text)."""
    with _open(file) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
        yield text


def check_text(file: Path) -> None:
    """Read a file once.

    Raises:
        UserError: it cannot be read or unpacked, unpacks to far more than text does, has a NUL byte, or is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    most = max(UNPACKED_FREELY, file.stat().st_size * HIGHEST_RATIO)
    read = 0
    with _open(file) as stream:
        while True:
            chunk = stream.read(_CHUNK)
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
            if file.suffix.lower() in PACKED and read > most:
                raise UserError(
                    f"source '{file}' unpacks to more than {HIGHEST_RATIO} times its {file.stat().st_size} bytes, "
                    "which no text does; unpack it yourself if it is meant"
                )


@contextlib.contextmanager
def _open(file: Path) -> Iterator[BinaryIO]:
    try:
        with PACKED.get(file.suffix.lower(), partial(open, mode="rb"))(file) as stream:
            yield stream
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise UserError(f"source '{file}' cannot be unpacked: {error}") from error
    except OSError as error:
        raise UserError(f"source '{file}' cannot be read: {error.strerror or error}") from error

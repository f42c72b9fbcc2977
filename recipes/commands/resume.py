"""OUT.partial, the sibling of the output in which a stage keeps what an interrupted run can go on from.

It carries the fingerprint of the command that made it: the resolved recipe, the input's weights, the data. The same
command goes on from it; any other starts anew and says so. It is gone once the output is complete.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from models.errors import UserError
from models.io import clean_leftovers

_FINGERPRINT = "fingerprint"


def fingerprint_of(values: dict[str, Any]) -> str:
    """Return the SHA-256 (hex) of JSON values, whatever the order of their keys."""
    return sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def partial_folder(out: Path) -> Path:
    """Return where the state of an unfinished `out` lies."""
    return out.with_name(f"{out.name}.partial")


def check_output(out: Path, overwrite: bool) -> None:
    """Refuse an output that already holds something, before any work is done.

    An output beside its own OUT.partial passes: a run that was killed between writing the one and removing the other.

    Raises:
        UserError: `out` is a file, or holds something and `overwrite` is false, or OUT.partial is somebody's own.
    """
    clean_leftovers(out)
    _check_ours(partial_folder(out))
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --out must name a folder")
    if out.exists() and any(out.iterdir()) and not overwrite and not partial_folder(out).exists():
        raise UserError(f"{out} already holds something; name another folder or pass --overwrite")


@contextlib.contextmanager
def resumable(out: Path, fingerprint: str, say: Callable[[str], None]) -> Iterator[Path]:
    """Yield the folder for the state of this run; remove it when the body ends well.

    When the body raises, finished work stays for the next run of the same command; a folder without any is removed.

    Raises:
        UserError: another process is writing the same output, or the folder cannot be made.
    """
    folder = partial_folder(out)
    _check_ours(folder)
    if folder.exists():
        _reuse(folder, fingerprint, say)
    created = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder, out)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from error
    try:
        (folder / _FINGERPRINT).write_text(fingerprint)
        yield folder
        shutil.rmtree(folder)
    except BaseException as error:
        if isinstance(error, UserError) or not _has_work(folder):  # the same command would end in the same sentence
            shutil.rmtree(folder, ignore_errors=True)
            for parent in created:
                with contextlib.suppress(OSError):
                    parent.rmdir()
        raise
    finally:
        os.close(lock)


def _check_ours(folder: Path) -> None:
    """Raise UserError for an OUT.partial that no stage made: it carries no fingerprint, and is never deleted."""
    if not folder.exists():
        return
    marker = folder / _FINGERPRINT
    carries = marker.is_file() and re.fullmatch("[0-9a-f]{64}", marker.read_text(errors="replace"))
    if not carries and (not folder.is_dir() or {path.name for path in folder.iterdir()} - {_FINGERPRINT}):
        raise UserError(
            f"{folder} is not of an unfinished run, and its place is needed; move it, or name another --out"
        )


def _reuse(folder: Path, fingerprint: str, say: Callable[[str], None]) -> None:
    """Keep the folder if the same command made it and left something, else remove it."""
    marker = folder / _FINGERPRINT
    same = marker.exists() and marker.read_text() == fingerprint
    if same and _has_work(folder):
        say(f"going on from what an interrupted run of the same command left in {folder}")
    elif not same:
        os.close(_lock(folder, folder.with_suffix("")))
        say(f"{folder} holds an unfinished run of another recipe, input or version: starting anew")
        shutil.rmtree(folder)


def _lock(folder: Path, out: Path) -> int:
    """Return a descriptor that holds the folder's lock for as long as this process lives."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"another process is writing {out}; wait for it, or choose another --out") from None
    except OSError:  # some network file systems know no locks
        pass
    return descriptor


def _has_work(folder: Path) -> bool:
    """Whether an entry of a store or a checkpoint is there; what was cut off while it was written is removed."""
    for cut in folder.rglob("*.partial"):
        cut.unlink(missing_ok=True)
    return any(path.suffix in (".safetensors", ".ckpt") and path.name[0] != "." for path in folder.rglob("*"))

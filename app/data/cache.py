"""Cache of tokenizers and token files between runs, each made exactly once."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn, TransferSpeedColumn

from models.errors import UserError
from models.io import writing

Item = TypeVar("Item")
_SHOWN_FROM = 4_000_000  # bytes of text: below that, work is over before a bar could be read


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """Return the cache folder: `cache_dir`, else $ESPALIER_CACHE, else `espalier` in the user's cache folder.

    Raises:
        UserError: none is named, and the user has no home.
    """
    cache_dir = cache_dir or os.environ.get("ESPALIER_CACHE")
    try:
        if cache_dir is None:
            cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "espalier"
        return Path(cache_dir).expanduser().resolve()
    except RuntimeError:  # pathlib's, for a user without an account and without HOME
        raise UserError(
            "this user has no home folder for the cache; name a folder with the environment variable ESPALIER_CACHE"
        ) from None


def build_once(place: Path, build: Callable[[Path], None]) -> Path:
    """Return `place`, a folder that `build(temporary folder)` fills if it does not exist yet.

    Of several processes one builds while the others wait. The folder appears whole, by a rename: a process that is
    killed leaves nothing behind that a later one would take for a result, and its lock dies with it.

    Raises:
        UserError: the cache folder cannot be written, or the disk is full.
    """
    if place.is_dir():
        return place
    with _lock(place):
        if place.is_dir():
            return place
        try:
            with writing(place) as temporary:
                build(temporary)
        except UserError:
            if not place.is_dir():  # on a file system without locks another process may have been faster
                raise
    return place


@contextlib.contextmanager
def _lock(place: Path) -> Iterator[None]:
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(place.parent / f".{place.name}.lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise UserError(
            f"the cache folder {place.parent} cannot be written ({error.strerror}); "
            "name another with cache_dir or the environment variable ESPALIER_CACHE"
        ) from error
    try:
        with contextlib.suppress(OSError):  # some network file systems know no locks: then both do the work
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def track(items: Iterable[Item], what: str, total: int, size: Callable[[Item], int]) -> Iterator[Item]:
    """Pass `items` on under a progress bar with a rate and the time left, counted in bytes: `size(item)` of `total`."""
    if total < _SHOWN_FROM:
        yield from items
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TransferSpeedColumn(),
        TimeElapsedColumn(),
        "left",
    )
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        for item in items:
            yield item
            progress.advance(task, size(item))
        progress.update(task, completed=total)  # sizes are counted in characters where that is cheaper

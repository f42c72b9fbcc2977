"""Folders that are written whole or not at all, and tensors in safetensors files, sharded or not.

Nothing here is unpickled, and no name inside a folder may lead out of it.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from models.errors import UserError
from models.finite import check_finite
from models.parsing import Malformed, parse_json, read_plain

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG}


@contextlib.contextmanager
def writing(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty temporary sibling of `path`; when the body ends well it is flushed to disk and renamed to `path`.

    When the body raises, or the process dies, `path` is what it was before. What a killed process left behind (a
    hidden sibling that nobody holds a lock on any more) is removed by the next call for the same path.

    Raises UserError if `path` already holds something and `overwrite` is false, if it is a place that must never be
    replaced (the working directory, a home, a git repository), if it cannot be written, or if the disk is full.
    """
    target = Path(os.path.realpath(Path(path).expanduser()))  # `resolve` raises where a link leads to itself
    clean_leftovers(target)
    _check_target(target, overwrite)
    created = _missing_parents(target)
    temporary, lock = None, None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary, lock = _locked_sibling(target)
        yield temporary
        _flush(temporary)
        _swap(temporary, target, overwrite)
    except BaseException as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in created:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(error, OSError) and error.errno in _FULL:
            raise UserError(f"no space left on the device for {target}; nothing was kept of it") from error
        if isinstance(error, OSError) and error.errno in _REFUSED:
            raise UserError(f"{target} cannot be written: {error.strerror}") from error
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _check_target(target: Path, overwrite: bool) -> None:
    for parent in target.parents:
        if parent.exists() and not parent.is_dir():
            raise UserError(f"{parent} is a file, and {target} cannot be made in it; name another output")
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target} is a file; the output must be a folder")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{target} already holds something; name another folder or pass --overwrite")
    here, home = Path.cwd(), Path(os.path.expanduser("~"))  # a user without an account and HOME has none
    if target in (here, *here.parents, home, *home.parents) or (target / ".git").exists():
        raise UserError(f"{target} is the working directory, a home or a repository, and is never replaced")


def _missing_parents(target: Path) -> list[Path]:
    return [parent for parent in target.parents if not parent.exists()]


def _locked_sibling(target: Path) -> tuple[Path, int]:
    """A new hidden folder beside `target`, and the descriptor that holds its lock for as long as this process lives."""
    while True:
        sibling = Path(tempfile.mkdtemp(prefix=f".{target.name}.writing-", dir=target.parent))
        lock = os.open(sibling, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some network file systems know no locks; then leftovers just stay
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if sibling.exists():  # else another process took it for a leftover between the two calls
            sibling.chmod(0o777 & ~_umask())  # mkdtemp makes it private, an output folder is not
            return sibling, lock
        os.close(lock)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def clean_leftovers(target: Path) -> None:
    """Remove what killed processes left beside `target`, and end the replacing that one of them had begun.

    Only hidden siblings that `writing` names, and nobody holds a lock on, are touched. One that was killed between the
    two renames of `_swap` had flushed its result: the result takes its place, as it would have.
    """
    for old in _siblings(target, "replaced"):
        new = old.with_name(old.name.replace(".replaced-", ".writing-"))
        if not target.exists() and (not new.is_dir() or _abandoned(new)):
            (new if new.is_dir() else old).rename(target)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
    for leftover in _siblings(target, "writing"):
        if _abandoned(leftover):
            shutil.rmtree(leftover, ignore_errors=True)


def _siblings(target: Path, kind: str) -> list[Path]:
    name = re.compile(rf"{re.escape(f'.{target.name}.{kind}-')}\w{{8}}")  # as mkdtemp ends a name
    found = target.parent.iterdir() if target.parent.is_dir() else ()
    return [path for path in found if name.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]


def _abandoned(folder: Path) -> bool:
    """Whether nobody holds the lock of a folder that is being written."""
    try:
        lock = os.open(folder, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False  # its writer is alive
    finally:
        os.close(lock)
    return True


def _flush(folder: Path) -> None:
    readable = 0o666 & ~_umask()  # safetensors writes files that only their owner may read
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            Path(root, name).chmod(readable)
            _fsync(Path(root, name))
        _fsync(Path(root))


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap(temporary: Path, target: Path, overwrite: bool) -> None:
    """Rename `temporary` to `target`. A folder cannot be renamed over a full one, so the old one steps aside first."""
    aside = None
    if target.exists() and any(target.iterdir()):
        _check_target(target, overwrite)  # somebody else may have filled it meanwhile
        aside = Path(f"{target.parent}/.{target.name}.replaced-{temporary.name.rsplit('-', 1)[1]}")
        target.rename(aside)
    try:
        temporary.rename(target)
    except BaseException:
        if aside is not None:
            aside.rename(target)
        raise
    _fsync(target.parent)
    if aside is not None:
        shutil.rmtree(aside, ignore_errors=True)


def inside(folder: Path, name: str) -> Path:
    """The file `name` of `folder`. Raises UserError if the name, or the link it is, leads out of the folder.

    A folder that came from elsewhere must not decide which other files of this machine are read. Who keeps weights on
    another disk can link the whole folder; a snapshot in the hub cache is allowed its links to `../../blobs`.
    """
    path, home = folder / name, Path(os.path.realpath(folder))
    target = Path(os.path.realpath(path))  # of a link that leads to itself: the link
    plain = PurePosixPath(name)
    homes = [home] + ([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])
    if plain.is_absolute() or ".." in plain.parts or not any(target.is_relative_to(h) for h in homes):
        raise UserError(f"{folder} names the file {name!r}, which lies outside the folder{_way_out(path)}")
    if target.is_symlink():
        raise UserError(f"{path} is a link that leads to itself; put the file in its place")
    return path


def _way_out(path: Path) -> str:
    if not path.is_symlink():
        return ""
    return (
        f": it is a link to {path.resolve()}, and links out of a folder are not followed; put the file itself in its "
        "place (cp -L), or move the whole folder there and link that"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises UserError if the file is missing, unreadable or holds anything else."""
    try:
        content = read_plain(path, parse_json)
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}") from None
    except (OSError, Malformed) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as indented UTF-8 JSON; NaN and infinity, which JSON has not, are refused with ValueError."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write_tensors(
    directory: Path, tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int = SHARD_BYTES
) -> list[Path]:
    """Write (name, tensor) pairs to `model.safetensors`, or to shards with an index, and return the files.

    A shard holds at most `shard_bytes`, but one tensor at least. `tensors` may be a generator that converts as it
    goes: no more than one shard is held at a time. Raises UserError for a tensor that holds NaN or infinity.
    """
    files: list[Path] = []
    weight_map: dict[str, int] = {}
    shard: dict[str, torch.Tensor] = {}
    held, total = 0, 0
    for name, tensor in tensors:
        check_finite([(name, tensor)], "to be written")
        if shard and held + tensor.nbytes > shard_bytes:
            files.append(_save(directory / f"shard-{len(files)}", shard))
            shard, held = {}, 0
        shard[name] = tensor.detach().contiguous()
        weight_map[name] = len(files)
        held, total = held + tensor.nbytes, total + tensor.nbytes
    files.append(_save(directory / f"shard-{len(files)}", shard))
    if len(files) == 1:
        return [files[0].rename(directory / WEIGHTS)]
    names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    index = {"metadata": {"total_size": total}, "weight_map": {name: names[n] for name, n in weight_map.items()}}
    write_json(directory / INDEX, index)
    return [file.rename(directory / name) for file, name in zip(files, names, strict=True)]


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # safetensors hides the system's error in its text
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    return path


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of `folder`: one, or the shards that its index names, sorted. Raises UserError if none."""
    if (folder / INDEX).exists():
        weight_map = read_json(inside(folder, INDEX)).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{folder / INDEX} has no weight_map from tensor to file")
        return [_regular(inside(folder, name)) for name in sorted(set(weight_map.values()))]
    if (folder / WEIGHTS).exists():
        return [_regular(inside(folder, WEIGHTS))]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise UserError(f"{folder} holds pickled weights only, which are never unpickled; save it as safetensors")
    raise UserError(f"{folder} has no {WEIGHTS}")


def _regular(path: Path) -> Path:
    """The path, unless it is a pipe or a device, which would be read for ever."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no regular file")
    return path


class TensorFiles(Mapping[str, torch.Tensor]):
    """The tensors of a folder's safetensors files, memory-mapped: reading one copies nothing on the CPU.

    Raises UserError if a file is missing, truncated, corrupt, or disagrees with the index.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._files: dict[str, Any] = {}
        for path in weight_files(folder):
            handle = _open(path)
            for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                if name in self._files:
                    raise UserError(f"{folder} holds the tensor {name} in two files")
                self._files[name] = handle, name
        if (folder / INDEX).exists():
            listed = read_json(folder / INDEX)["weight_map"].keys()
            if wrong := sorted(listed ^ self._files.keys()):
                raise UserError(f"{folder / INDEX} and the files that it names disagree about {_some(wrong)}")

    def __getitem__(self, name: str) -> torch.Tensor:
        handle, stored = self._files[name]
        return handle.get_tensor(stored)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def drop(self, name: str) -> None:
        """Leave the tensor `name` out from now on."""
        del self._files[name]

    def rename(self, name: str, new: str) -> None:
        """Call the tensor `name` otherwise from now on."""
        self._files[new] = self._files.pop(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor `name`, without reading it."""
        handle, stored = self._files[name]
        return tuple(handle.get_slice(stored).get_shape())

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Raise UserError unless the files hold exactly the `expected` names with exactly these shapes."""
        if missing := sorted(expected.keys() - self.keys()):
            raise UserError(f"the weights in {self.folder} lack {_some(missing)}, which config.json calls for")
        if unexpected := sorted(self.keys() - expected.keys()):
            raise UserError(f"the weights in {self.folder} hold {_some(unexpected)}, which config.json does not know")
        for name, shape in expected.items():
            if self.shape(name) != tuple(shape):
                raise UserError(
                    f"the tensor {name} in {self.folder} has shape {list(self.shape(name))}; "
                    f"config.json calls for {list(shape)}"
                )


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}, which its index names") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is corrupt or truncated, and cannot be read as safetensors: {error}") from None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def sha256_of(*files: Path) -> str:
    """SHA-256 (hex) of files, one after another; of one file as `sha256sum` gives it."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()

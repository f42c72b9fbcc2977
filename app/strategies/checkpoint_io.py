"""Checkpoints that are whole or absent: written beside their name and renamed. Nothing in one is unpickled.

A sharded checkpoint is a folder: safetensors files, in which each rank wrote its part of every sharded tensor, and
`meta.pt` (plain values and tensors) with all the rest and the SHA-256 of each of these files.
"""

import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader
from torch.distributed.checkpoint.format_utils import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.tensor import DTensor

from models.errors import UserError
from models.io import inside, sha256_of

METADATA = "meta.pt"  # of a sharded checkpoint: everything but the sharded tensors
SHARDS = "shards"  # in METADATA: file -> SHA-256 (hex)


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint file to a sibling, flushes it to the disk and renames it; reads files and sharded folders.

    Lightning's own writing goes through a temporary file that may lie on another file system, where the last move is a
    copy that a kill cuts short.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        with appearing_whole(Path(path)) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())

    def load_checkpoint(
        self, path: str | Path, map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        path = Path(path)
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def appearing_whole(path: Path) -> Iterator[Path]:
    """Yield a hidden sibling of `path`; when the body ends well it takes the place of `path`, else it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    _remove(temporary)
    try:
        yield temporary
        if path.is_dir():
            _remove(path)
        temporary.replace(path)
        _flush_folder(path.parent)
    except BaseException:
        _remove(temporary)
        raise


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint in the form that `Trainer` restores on any number of devices, on the CPU.

    A sharded folder is put together as one process would have written it. Nothing is unpickled but plain values and
    tensors (`weights_only=True`).

    Raises:
        UserError: damaged, or a folder with anything in it that its METADATA does not name.
    """
    return _joined(path) if path.is_dir() else _read_archive(path)


def read_metadata(folder: Path) -> dict[str, Any]:
    """Return what a sharded checkpoint holds beside its sharded tensors, whose files are checked."""
    content = _read_archive(folder / METADATA)
    shards = content.pop(SHARDS, None) if isinstance(content, dict) else None
    if not isinstance(shards, Mapping) or not all(isinstance(text, str) for item in shards.items() for text in item):
        raise UserError(f"{folder} is no sharded checkpoint of this version: its {METADATA} names no files")
    if other := sorted({file.name for file in folder.iterdir()} ^ {METADATA, *shards}):
        raise UserError(f"{folder} is no sharded checkpoint: its {METADATA} and its files disagree about {other[0]}")
    for name, digest in shards.items():
        if sha256_of(inside(folder, name)) != digest:
            raise UserError(f"{folder / name} is damaged: its SHA-256 is not the one in {METADATA}")
    return content


def _read_archive(path: Path) -> Any:
    """Read a file of `torch.save` with the checks that its own reader lacks: checksums, and no compressed records."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            stored = all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist())
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} is no checkpoint, or a truncated one: {error}") from None
    if damaged is not None:
        raise UserError(f"{path} is damaged: the checksum of {damaged} in it does not match")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=stored)


def _joined(folder: Path) -> dict[str, Any]:
    """A sharded checkpoint as a whole one: optimizer states keyed by number, in the order of the parameter groups."""
    checkpoint = read_metadata(folder)
    tensors: dict[str, Tensor] = {}
    try:
        reader = HuggingFaceStorageReader(str(folder))
        _load_state_dict(tensors, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    except CheckpointException as error:
        raise UserError(f"{folder} is no readable checkpoint: {' '.join(str(error).split())[:200]}") from None
    checkpoint = with_sharded(checkpoint, tensors)
    optimizers = []
    while f"optimizer_{len(optimizers)}" in checkpoint:
        optimizers.append(numbered(checkpoint.pop(f"optimizer_{len(optimizers)}")))
    if optimizers:
        checkpoint["optimizer_states"] = optimizers
    return checkpoint


def without_sharded(tree: Mapping[str, Any], sharded: dict[str, DTensor], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings without their sharded tensors, which go into `sharded` by their keys, joined by `/`."""
    rest = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            rest[key] = without_sharded(value, sharded, f"{prefix}{key}/")
        elif isinstance(value, DTensor):
            sharded[f"{prefix}{key}"] = value
        else:
            rest[key] = value
    return rest


def with_sharded(tree: dict[str, Any], sharded: Mapping[str, Tensor]) -> dict[str, Any]:
    """Put tensors by their joined keys into nested mappings, in place: the inverse of `without_sharded`."""
    for name, tensor in sharded.items():
        *parents, last = name.split("/")
        place = tree
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = tensor
    return tree


def numbered(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state dict by parameter name as one by number, as `Optimizer.load_state_dict` wants it."""
    numbers = {name: i for i, name in enumerate(name for group in state["param_groups"] for name in group["params"])}
    return _renamed(state, numbers)


def named(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """An optimizer's state dict by number as one by parameter name; `names` in the order of the parameter groups.

    Lightning and torch take the order of `model.named_parameters()` for this, which is another one as soon as
    parameters are grouped, and then give the moments of one weight to another.
    """
    return _renamed(state, dict(enumerate(names)))


def _renamed(state: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    groups = [{**group, "params": [names[key] for key in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[key]: values for key, values in state["state"].items()}, "param_groups": groups}

"""Checkpoints that are whole or absent: written beside their name and renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.load import _METADATA_FILENAME, _load_distributed_checkpoint

METADATA = _METADATA_FILENAME  # of a sharded checkpoint: everything but the tensors


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
    """
    if path.is_dir():
        return _joined(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _joined(folder: Path) -> dict[str, Any]:
    """A sharded checkpoint as a whole one: optimizer states keyed by number, in the order of the parameter groups."""
    checkpoint = _load_distributed_checkpoint(folder)
    optimizers = []
    while f"optimizer_{len(optimizers)}" in checkpoint:
        optimizers.append(numbered(checkpoint.pop(f"optimizer_{len(optimizers)}")))
    if optimizers:
        checkpoint["optimizer_states"] = optimizers
    return checkpoint


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

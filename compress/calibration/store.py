"""Store of the finished blocks of a compression run, from which a killed run resumes."""

import json
import os
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class Store(Protocol):
    """Named entries of tensors and JSON values; an entry is there whole or not at all."""

    def save(self, key: str, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        """Put an entry, replacing the one of that name."""

    def load(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The entry, or None where there is none."""

    def remove(self, key: str) -> None:
        """Forget an entry that may be there."""


class FolderStore:
    """A store in a folder: one safetensors file an entry, written beside its place, flushed and renamed.

    The folder belongs to one run: whoever makes it sees to it that a run of other settings gets another folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def save(self, key: str, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        path = self._path(key)
        temporary = path.with_suffix(".partial")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, temporary, metadata={"info": json.dumps(info)})
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)

    def load(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        path = self._path(key)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                return tensors, json.loads(file.metadata()["info"])
        except (SafetensorError, json.JSONDecodeError):
            return None  # a damaged entry counts as none: the work is done again

    def remove(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

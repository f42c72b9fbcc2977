"""Inputs of a pipeline from outside of its folder, by content: models, texts, architecture files.

A finished stage whose input has changed since is no longer what the pipeline says, though every path is the same.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.data.sources import open_source
from app.loading import SHARDED
from models.checkpoint import hash_weights
from models.sidecars import hash_sidecars, read_sidecars


@dataclass(frozen=True)
class TextInput:
    """A SOURCE of text, and the column that holds it."""

    source: str
    column: str | None = None

    def __str__(self) -> str:
        return f"the text {self.source}"

    def content(self) -> str:
        """SHA-256 (hex) of a file, or of all documents of another source. Raises UserError where there are none."""
        path = Path(self.source).expanduser()
        return FileInput(path).content() if path.is_file() else open_source(self.source, self.column).sha256


@dataclass(frozen=True)
class FileInput:
    """A model (folder or checkpoint), or an architecture file."""

    path: Path

    def __str__(self) -> str:
        return f"{'the model' if self.path.is_dir() else 'the file'} {self.path}"

    def content(self) -> str:
        """SHA-256 (hex) of a model folder's weights and the files beside them, or of the file.

        Raises:
            UserError: a folder without weights.
        """
        if self.path.is_dir() and not (self.path / SHARDED).exists():
            both = hash_weights(self.path) + hash_sidecars(read_sidecars(self.path))
            return hashlib.sha256(both.encode()).hexdigest()
        digest = hashlib.sha256()
        for file in sorted(self.path.rglob("*")) if self.path.is_dir() else [self.path]:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


Input = TextInput | FileInput


def stage_inputs(chosen: Any, out: Path) -> list[Input]:
    """Return what a stage reads.

    Args:
        chosen: its options.
        out: the pipeline's folder; the models in it are the work of earlier stages, and no input.
    """
    texts = [chosen.data] + ([] if chosen.evaluation_data is None else [chosen.evaluation_data])
    paths = [getattr(chosen, role, None) for role in ("model", "teacher", "student")]
    outside = [path for path in paths if path is not None and not Path(path).is_relative_to(out)]
    return [*(TextInput(text, chosen.column) for text in texts), *_files(outside)]


def pretraining_inputs(recipe: Mapping[str, Any], flags: Mapping[str, Any], out: Path) -> list[Input]:
    """Return what pretraining reads.

    Args:
        recipe: the recipe of `espalier fit`.
        flags: what stands beside it, by the names of flags, dotted or not.
        out: the pipeline's folder, as in `stage_inputs`.
    """
    data = recipe.get("data")
    data = dict(data) if isinstance(data, Mapping) else {}
    data |= {"source": flags["data"]} if "data" in flags else {}
    data |= {key: flags[f"data.{key}"] for key in ("source", "column", "validation") if f"data.{key}" in flags}
    model = recipe.get("model")
    model = model if isinstance(model, Mapping) else {}
    named = [flags.get(f"model.{key}", model.get(key)) for key in ("architecture", "from")] + [data.get("validation")]
    source = str(data.get("source", "python"))
    files = [one for one in named if isinstance(one, str) and not Path(one).is_relative_to(out)]
    if "class_path" in data:  # a module of somebody's own
        return [*_files(files)]
    if source.endswith((".yaml", ".yml")):  # options of the data in a file of their own
        return [*_files([source, *files])]
    return [TextInput(source, data.get("column")), *_files(files)]


def _files(paths: list[str]) -> list[FileInput]:
    """Existing paths: a preset's name stands for no file, and a missing model is its stage's to complain of."""
    found = [Path(path).expanduser() for path in paths]
    return [FileInput(path) for path in found if path.exists()]

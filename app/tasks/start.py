"""Weights to start from: continued training, or fine-tuning for another task, of an existing model (`model.from`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from app.loading import Loaded, load_model
from app.tasks.architecture import read_architecture
from app.tasks.base import Task
from models.errors import UserError
from models.transformer import Transformer
from models.weight_formats import described

HEAD = "head."


def load_start(path: str) -> Loaded:
    """The model to start from. Raises UserError where there is none, or one whose weights are packed."""
    loaded = load_model(path, dtype=torch.float32)
    if described(loaded.model):
        raise UserError(
            f"model.from {path} holds quantized weights, which are no start of a training; give the model from before"
        )
    return loaded


def starting_architecture(
    architecture: str | Mapping[str, Any] | None, start: Loaded | None, task: Task
) -> dict[str, Any]:
    """The architecture of a recipe; with a start that of its model, in which the recipe's keys replace those they name.

    Raises:
        UserError: there is neither.
    """
    values = {} if architecture is None else read_architecture(architecture)
    if start is None and "width" not in values:
        raise UserError("model.architecture has no width; give a whole one, or model.from DIR, a model to start from")
    if start is not None:
        values = {**start.model.config.to_dict(), **values}
        del values["compression"]
    return task.shaped(values)


@torch.no_grad()
def copy_weights(model: Transformer, start: nn.Module, path: str | Path) -> None:
    """Fill every parameter but those of another head. Raises UserError where the two differ anywhere else."""
    ours, theirs = model.state_dict(), start.state_dict()
    for name in sorted(ours.keys() | theirs.keys()):
        shapes = [tuple(state[name].shape) if name in state else None for state in (ours, theirs)]
        if shapes[0] == shapes[1]:
            ours[name].copy_(theirs[name])
        elif not name.startswith(HEAD):
            raise UserError(
                f"model.from {path} has another architecture: {name} is {shapes[1] or 'absent'} there and "
                f"{shapes[0] or 'absent'} in the recipe; leave that out of model.architecture"
            )

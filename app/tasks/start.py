"""Weights to start from: continued training, or fine-tuning for another task, of an existing model (`model.from`)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from app.loading import Loaded, load_model
from app.tasks.architecture import read_architecture
from app.tasks.base import Task
from models.errors import UserError
from models.transformer import Transformer
from models.weight_formats import described

HEAD = ("head.", "head_bias.", "head_transform.")
SUBLAYERS = {"attention", "feedforward"}


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

    Of a mechanism a mapping without `kind` changes the options that it names and no other; of the attention and the
    feed-forward it does so in every layer that has them all, as `attention: {window: 512}` in those with a window.

    Raises:
        UserError: there is neither, or no layer has the options.
    """
    values = {} if architecture is None else dict(read_architecture(architecture))
    if start is None and architecture is None:
        raise UserError("model.architecture must be given, or model.from DIR, a model to start from")
    if start is None and "width" not in values:
        raise UserError("model.architecture has no width; give a whole one, or model.from DIR, a model to start from")
    if start is not None:
        whole = start.model.config.to_dict()
        del whole["compression"]
        if values.get("head") == whole["head"]["kind"]:  # by name alone: with the options that it has
            del values["head"]
        for name in SUBLAYERS & values.keys():
            given = values[name]
            named = isinstance(given, Mapping) and any(
                isinstance(one, Mapping) and "kind" in one for one in given.values()
            )
            if isinstance(given, Mapping) and "kind" not in given and not named:
                whole["layers"] = _changed_layers(whole["layers"], name, values.pop(name))
        values = _changed(whole, values)
    return task.shaped(values)


def _changed(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with those of `changes`, mappings without a `kind` into one another."""
    both = {**values, **changes}
    for key, change in changes.items():
        if isinstance(values.get(key), Mapping) and isinstance(change, Mapping) and "kind" not in change:
            both[key] = _changed(values[key], change)
    return both


def _changed_layers(layers: list[dict[str, Any]], name: str, options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The layers, with `options` of the mechanism `name` in each that has all of them."""
    found = [layer[name] is not None and options.keys() <= layer[name].keys() for layer in layers]
    if not any(found):
        raise UserError(
            f"model.architecture.{name}: no layer of model.from has {', '.join(options)}; name options that its layers "
            "have, or give a kind and all layers anew"
        )
    return [
        {**layer, name: _changed(layer[name], options)} if has else layer
        for layer, has in zip(layers, found, strict=True)
    ]


@torch.no_grad()
def copy_weights(model: Transformer, start: Transformer, path: str | Path) -> None:
    """Fill every parameter but those of another head. Raises UserError where the two differ anywhere else."""
    ours, theirs = model.state_dict(), start.state_dict()
    if model.config.head.transform != start.config.head.transform:
        ours, theirs = ({name: state[name] for name in state if not name.startswith(HEAD)} for state in (ours, theirs))
    for name in sorted(ours.keys() | theirs.keys()):
        shapes = [tuple(state[name].shape) if name in state else None for state in (ours, theirs)]
        if shapes[0] == shapes[1]:
            ours[name].copy_(theirs[name])
        elif not name.startswith(HEAD):
            raise UserError(
                f"model.from {path} has another architecture: {name} is {shapes[1] or 'absent'} there and "
                f"{shapes[0] or 'absent'} in the recipe; leave that out of model.architecture"
            )

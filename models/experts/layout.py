"""From experts in one tensor a map to a module an expert, and back, in a model as it stands: the same weights exactly.

Files and compression deal with experts one by one, training and generation with all of them at once.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn

from models.errors import UserError
from models.experts.mixture import MixtureOfExperts
from models.experts.separate import SeparateExperts
from models.experts.stacked import StackedExperts
from models.forms import form_of


def separate(model: nn.Module) -> list[int]:
    """Give every expert of a `Transformer` its own module, in place; `model.config` follows.

    Returns the layers that have changed: `stack(model, layers)` takes it back.
    """
    return _change(model, "separate", range(len(model.blocks)))


def stack(model: nn.Module, layers: Iterable[int] | None = None) -> list[int]:
    """Put the experts of a `Transformer` (of these layers; None: of all) into one tensor a map, in place.

    Returns the layers that have changed.

    Raises:
        UserError: an expert with a map that is stored packed.
    """
    layers = range(len(model.blocks)) if layers is None else layers
    for layer in layers:
        if (name := packed_expert(model.blocks[layer])) is not None:
            raise UserError(f"the experts of layer {layer} cannot be stacked: {name} is stored packed")
    return _change(model, "stacked", layers)


def packed_expert(block: nn.Module) -> str | None:
    """The first map of the block's experts that is stored packed, by its name in the block, or None."""
    if not isinstance(block.feedforward, MixtureOfExperts):
        return None
    inside = block.feedforward.experts.named_modules(prefix="feedforward.experts")
    return next((name for name, module in inside if form_of(module)), None)


def _change(model: nn.Module, layout: str, layers: Iterable[int]) -> list[int]:
    changed, specs = [], list(model.config.layers)
    for layer in layers:
        mixture = model.blocks[layer].feedforward
        if isinstance(mixture, MixtureOfExperts) and mixture.layout != layout:
            _lay_out(mixture, layout)
            specs[layer] = replace(specs[layer], feedforward=mixture.spec)
            changed.append(layer)
    if changed:
        model.config = replace(model.config, layers=tuple(specs))
    return changed


@torch.no_grad()
def _lay_out(mixture: MixtureOfExperts, layout: str) -> None:
    """The experts of one mixture in another layout."""
    old, spec = mixture.experts, replace(mixture.spec, layout=layout)
    state = _unstacked(old) if layout == "separate" else _stacked(old)
    width = mixture.router.projection.in_features
    kind = SeparateExperts if layout == "separate" else StackedExperts
    with torch.device("meta"):
        new = kind(spec.count, spec.expert, width, 1)  # the branches only matter to weights that are drawn
    learns = next(old.parameters()).requires_grad
    new.load_state_dict(state, assign=True)
    mixture.experts = new.requires_grad_(learns).train(old.training)
    mixture.spec, mixture.layout = spec, layout


def _unstacked(experts: StackedExperts) -> dict[str, Tensor]:
    """The state of separate experts with the weights of stacked ones."""
    state = {}
    for name, parameter in experts.named_parameters():
        part, _, leaf = name.partition("_")
        for expert, weight in enumerate(parameter):
            state[f"{expert}.{part}.{leaf or 'weight'}"] = weight.clone()
    return state


def _stacked(experts: SeparateExperts) -> dict[str, Tensor]:
    """The state of stacked experts with the weights of separate ones."""
    state = {}
    for name in experts[0].state_dict():
        part, _, leaf = name.partition(".")
        key = part if leaf == "weight" else f"{part}_{leaf}"
        state[key] = torch.stack([expert.get_parameter(name) for expert in experts])
    return state

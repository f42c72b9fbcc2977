"""The same experts in one tensor a map, or as a module each: a Transformer changes from one to the other in place.

Stacked experts train and run quicker; separate ones are what compression reads, since every map is a linear module.

E experts, D model width, F hidden neurons of an expert.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from models.errors import UserError
from models.experts.mixture import MixtureOfExperts
from models.experts.separate import SeparateExperts
from models.experts.stacked import StackedExperts
from models.linear import Linear

if TYPE_CHECKING:
    from models.transformer import Transformer


def separate(model: "Transformer") -> None:
    """Give every expert a module of its own, with a copy of its weights; the config says so from here on."""
    _convert(model, "separate", _separate)


def stack(model: "Transformer") -> None:
    """Put the weights of each layer's experts into one tensor a map; the config says so from here on.

    Raises:
        UserError: experts of a layer differ in shape, or are in a compressed form; the model is as it was.
    """
    for number, mixture in _mixtures(model, "stacked"):
        _check_alike(mixture, f"blocks.{number}.feedforward.experts")
    _convert(model, "stacked", _stack)


def _mixtures(model: "Transformer", layout: str) -> list[tuple[int, MixtureOfExperts]]:
    """The mixtures that have another layout yet, with the number of their block."""
    found = [(number, block.feedforward) for number, block in enumerate(model.blocks)]
    return [(number, part) for number, part in found if isinstance(part, MixtureOfExperts) and part.layout != layout]


def _convert(model: "Transformer", layout: str, convert: Callable[[MixtureOfExperts, int], nn.Module]) -> None:
    layers = list(model.config.layers)
    for number, mixture in _mixtures(model, layout):
        experts = convert(mixture, model.config.residual_branches())
        experts.train(mixture.experts.training)
        mixture.experts, mixture.layout, mixture.spec = experts, layout, replace(mixture.spec, layout=layout)
        layers[number] = replace(layers[number], feedforward=mixture.spec)
    model.config = replace(model.config, layers=tuple(layers))


def _separate(mixture: MixtureOfExperts, branches: int) -> SeparateExperts:
    spec, stacked = mixture.spec, mixture.experts
    with torch.device("meta"):  # nothing is drawn
        experts = SeparateExperts(spec.count, spec.expert, stacked.down.shape[1], branches)
    for name, std in stacked.stds.items():
        weight, bias = getattr(stacked, name), getattr(stacked, f"{name}_bias")
        for number, expert in enumerate(experts):
            linear = getattr(expert, name)
            linear.std = std
            linear.weight = nn.Parameter(weight[number].detach().clone(), weight.requires_grad)
            if bias is not None:
                linear.bias = nn.Parameter(bias[number].detach().clone(), bias.requires_grad)
    return experts


def _stack(mixture: MixtureOfExperts, branches: int) -> StackedExperts:
    spec, separated = mixture.spec, mixture.experts
    with torch.device("meta"):
        experts = StackedExperts(spec.count, spec.expert, separated[0].down.out_features, branches)
    for name in experts.stds:
        linears = [getattr(expert, name) for expert in separated]
        experts.stds[name] = linears[0].std
        for attribute, target in (("weight", name), ("bias", f"{name}_bias")):
            parts = [getattr(linear, attribute) for linear in linears]
            if parts[0] is not None:
                stacked = torch.stack([part.detach() for part in parts])
                setattr(experts, target, nn.Parameter(stacked, parts[0].requires_grad))
    return experts


def _check_alike(mixture: MixtureOfExperts, where: str) -> None:
    """Refuse experts whose maps are no dense ones, or not all of one shape."""
    for number, expert in enumerate(mixture.experts):
        for name, linear in expert.named_children():
            place = f"{where}.{number}.{name}"
            if type(linear) is not Linear:
                raise UserError(f"{place} is stored as {type(linear).__name__}: stack dense experts only")
            shapes = [tuple(one.weight.shape) for one in (linear, getattr(mixture.experts[0], name))]
            if shapes[0] != shapes[1]:
                raise UserError(
                    f"{place} is {' x '.join(map(str, shapes[0]))} and that of the first expert "
                    f"{' x '.join(map(str, shapes[1]))}: experts of one stack have one shape"
                )

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
    _convert(model, "stacked", _stack)


def _convert(model: "Transformer", layout: str, convert: Callable[[MixtureOfExperts, str, int], nn.Module]) -> None:
    mixtures = {
        number: block.feedforward
        for number, block in enumerate(model.blocks)
        if isinstance(block.feedforward, MixtureOfExperts) and block.feedforward.layout != layout
    }
    branches = model.config.residual_branches()
    converted = {
        number: convert(mixture, f"blocks.{number}.feedforward.experts", branches)
        for number, mixture in mixtures.items()
    }
    layers = list(model.config.layers)
    for number, mixture in mixtures.items():
        experts = converted[number]
        experts.train(mixture.experts.training)
        mixture.spec = replace(mixture.spec, layout=layout)
        mixture.experts, mixture.layout = experts, layout
        layers[number] = replace(layers[number], feedforward=mixture.spec)
    model.config = replace(model.config, layers=tuple(layers))


def _separate(mixture: MixtureOfExperts, where: str, branches: int) -> SeparateExperts:
    spec, stacked = mixture.spec, mixture.experts
    with torch.device("meta"):  # nothing is drawn
        experts = SeparateExperts(spec.count, spec.expert, stacked.down.shape[1], branches)
    for name, std in stacked.stds.items():
        weight, bias = getattr(stacked, name), getattr(stacked, f"{name}_bias")
        for number, expert in enumerate(experts):
            linear = getattr(expert, name)
            linear.std = std
            linear.weight = _copy(weight[number], weight)
            linear.bias = None if bias is None else _copy(bias[number], bias)
    return experts


def _stack(mixture: MixtureOfExperts, where: str, branches: int) -> StackedExperts:
    spec, separated = mixture.spec, mixture.experts
    with torch.device("meta"):
        experts = StackedExperts(spec.count, spec.expert, separated[0].down.out_features, branches)
    for name in experts.stds:
        linears = [getattr(expert, name) for expert in separated]
        expected = getattr(experts, name).shape[1:]
        for number, linear in enumerate(linears):
            if type(linear) is not Linear:
                raise UserError(
                    f"{where}.{number}.{name} is stored as {type(linear).__name__}: stack dense experts only"
                )
            if linear.weight.shape != expected:
                raise UserError(
                    f"{where}.{number}.{name} is {' x '.join(map(str, linear.weight.shape))} and the config says "
                    f"{' x '.join(map(str, expected))}: experts of one stack have one shape"
                )
        experts.stds[name] = linears[0].std
        for attribute, target in (("weight", name), ("bias", f"{name}_bias")):
            parts = [getattr(linear, attribute) for linear in linears]
            if parts[0] is not None:
                setattr(
                    experts,
                    target,
                    nn.Parameter(torch.stack([part.detach() for part in parts]), parts[0].requires_grad),
                )
    return experts


def _copy(values: torch.Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(values.detach().clone(), requires_grad=like.requires_grad)

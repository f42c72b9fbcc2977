"""Normalisation: what is computed (RMSNorm, LayerNorm) and where it stands in a block (`position`).

    pre        x + f(N(x))
    post       N(x + f(x))
    sandwich   x + N(f(N(x)))
    deepnorm   N(a x + f(x)), a = (2 L)^(1/4) in L layers (DeepNet, arXiv 2203.00555, section 4.1)

DeepNet also draws its maps from Xavier's normal distribution, those of the feed-forwards and of v and o with the gain
(8 L)^(-1/4), so that the outputs of a model of any depth change by little in an update.
"""

from dataclasses import dataclass

import torch
from torch import nn

from models.errors import UserError, did_you_mean
from models.registry import Registry

NORMS = Registry("norm")
NORM_POSITIONS = ("pre", "post", "sandwich", "deepnorm")
AFTER = ("post", "deepnorm")  # the positions that normalise the stream itself, behind each sub-layer


def _check(position: str, eps: float) -> None:
    if position not in NORM_POSITIONS:
        raise UserError(f"unknown norm position {position!r}{did_you_mean(position, NORM_POSITIONS)}")
    if eps <= 0:
        raise UserError(f"eps must be positive, got {eps}")


@NORMS.register("rms")
@dataclass(frozen=True)
class Rms:
    """Root mean square normalisation (arXiv 1910.07467).

    Args:
        eps: added to the mean square.
        position: `pre`, `post`, `sandwich` or `deepnorm`, as above.
    """

    eps: float = 1e-5
    position: str = "pre"

    def __post_init__(self) -> None:
        _check(self.position, self.eps)

    def build(self, width: int) -> nn.Module:
        return nn.RMSNorm(width, eps=self.eps)


@NORMS.register("layer")
@dataclass(frozen=True)
class Layer:
    """Layer normalisation (arXiv 1607.06450).

    Args:
        eps: added to the variance.
        position: as for `rms`.
        bias: whether the norm has a learned shift.
    """

    eps: float = 1e-5
    position: str = "pre"
    bias: bool = True

    def __post_init__(self) -> None:
        _check(self.position, self.eps)

    def build(self, width: int) -> nn.Module:
        return nn.LayerNorm(width, eps=self.eps, bias=self.bias)


def residual_gain(position: str, branches: int) -> float:
    """The factor of the stream before a branch is added to it, in a model of so many branches (two a layer)."""
    return max(1, branches) ** 0.25 if position == "deepnorm" else 1.0


def draw_deepnorm(module: nn.Module, names: tuple[str, ...] | None, branches: int) -> nn.Module:
    """Give a sub-layer on the meta device the weights that DeepNet starts from, on the default device.

    Args:
        module: a sub-layer; its linear maps draw with their `std` from here on.
        names: its maps whose gain is (4 branches)^(-1/4), the others' being 1; None means all of them.
        branches: sub-layers of the model.
    """
    small = (4 * max(1, branches)) ** -0.25
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear):
            gain = small if names is None or name.rpartition(".")[2] in names else 1.0
            part.std = gain * (2 / (part.in_features + part.out_features)) ** 0.5
        elif hasattr(part, "stds"):  # stacks of experts, whose maps are no modules
            part.stds = {map: small * (2 / sum(getattr(part, map).shape[1:])) ** 0.5 for map in part.stds}
    module.to_empty(device=torch.get_default_device())
    for part in module.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    return module

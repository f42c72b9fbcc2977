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
import torch.nn.functional as F
from torch import Tensor, nn

from models.linear import Drawn
from models.specs import NORMS, NormSpec


@NORMS.register("rms")
@dataclass(frozen=True)
class Rms(NormSpec):
    """Root mean square normalisation (arXiv 1910.07467).

    Args:
        eps: added to the mean square.
        position: `pre`, `post`, `sandwich` or `deepnorm`, as above.
        offset: added to the weight, which starts at 1 less the offset. With 1, as in Gemma, weight decay pulls the
            factor towards 1 and 16-bit weights keep the digits of small differences.
    """

    eps: float = 1e-5
    position: str = "pre"
    offset: float = 0.0

    def build(self, width: int) -> nn.Module:
        return OffsetRms(width, self) if self.offset else nn.RMSNorm(width, eps=self.eps)


class OffsetRms(nn.RMSNorm):
    """The module of an `Rms` with an offset; it computes in fp32: (..., D) -> (..., D)."""

    def __init__(self, width: int, spec: Rms) -> None:
        self.offset = spec.offset
        super().__init__(width, eps=spec.eps)

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1 - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = self.offset + self.weight.to(wide)  # (D,)
        return F.rms_norm(x.to(wide), self.normalized_shape, weight, self.eps).to(x.dtype)


@NORMS.register("layer")
@dataclass(frozen=True)
class Layer(NormSpec):
    """Layer normalisation (arXiv 1607.06450).

    Args:
        eps: added to the variance.
        position: as for `rms`.
        bias: whether the norm has a learned shift.
    """

    eps: float = 1e-5
    position: str = "pre"
    bias: bool = True

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
        elif isinstance(part, Drawn):
            part.draw_xavier(small)
    module.to_empty(device=torch.get_default_device())
    for part in module.modules():
        if isinstance(part, Drawn | nn.Linear | nn.Embedding | nn.LayerNorm | nn.RMSNorm):
            part.reset_parameters()
    return module

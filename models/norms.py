"""Normalisation: what is computed (RMSNorm, LayerNorm) and where it stands in a block (`position`)."""

from dataclasses import dataclass

from torch import nn

from models.errors import UserError, did_you_mean
from models.registry import Registry

NORMS = Registry("norm")
NORM_POSITIONS = ("pre", "post", "sandwich")


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
        position: `pre` x + f(N(x)); `post` N(x + f(x)); `sandwich` x + N(f(N(x))).
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

"""Feed-forward sub-layers: the gated SwiGLU and the plain two-layer network; mixtures of them are in models/experts.

B batch, T tokens, D model width.
"""

from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.protocol import ForwardInputs, Mixed, SubLayer
from models.errors import UserError, did_you_mean
from models.linear import Linear, residual_std
from models.specs import FEEDFORWARDS, FeedForwardSpec

ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu, "silu": F.silu}


class FeedForward(SubLayer):
    """A built feed-forward: (B, T, D) -> (B, T, D), each token by itself."""

    def forward(self, x: Tensor, inputs: ForwardInputs | None = None) -> Tensor | Mixed:
        raise NotImplementedError


def _check(width: int, activation: str) -> None:
    if width < 1:
        raise UserError(f"a feed-forward width must be at least 1, got {width}")
    if activation not in ACTIVATIONS:
        raise UserError(f"unknown activation {activation!r}{did_you_mean(activation, ACTIVATIONS)}")


@FEEDFORWARDS.register("swiglu")
@dataclass(frozen=True)
class Swiglu(FeedForwardSpec):
    """down(act(gate(x)) * up(x)) (arXiv 2002.05202).

    Args:
        width: hidden neurons.
        activation: of the gate; `silu` makes it SwiGLU, `gelu` GEGLU, `relu` ReGLU.
        bias: whether gate and up have a bias.
        out_bias: whether down has one.
    """

    width: int
    activation: str = "silu"
    bias: bool = False
    out_bias: bool = False

    def __post_init__(self) -> None:
        _check(self.width, self.activation)

    def build(self, width: int, branches: int, *, layer: int = 0, layers: int = 1) -> nn.Module:
        return GatedFeedForward(self, width, branches)

    def flops_per_token(self, width: int) -> int:
        return 2 * 3 * width * self.width


@FEEDFORWARDS.register("mlp")
@dataclass(frozen=True)
class Mlp(FeedForwardSpec):
    """down(act(up(x))).

    Args:
        width: hidden neurons.
        activation: `gelu`, `gelu_tanh`, `relu` or `silu`.
        bias: whether up has a bias.
        out_bias: whether down has one.
    """

    width: int
    activation: str = "gelu"
    bias: bool = True
    out_bias: bool = True

    def __post_init__(self) -> None:
        _check(self.width, self.activation)

    def build(self, width: int, branches: int, *, layer: int = 0, layers: int = 1) -> nn.Module:
        return PlainFeedForward(self, width, branches)

    def flops_per_token(self, width: int) -> int:
        return 2 * 2 * width * self.width


class DenseFeedForward(FeedForward):
    """A feed-forward with hidden neurons: each is a row of the `writers()` and a column of the linear layer `down`.

    Attributes:
        scales_with_up: whether the hidden neurons are multiplied by what the rows of `up` are, if that is positive.
    """

    scales_with_up = False

    def writers(self) -> list[nn.Linear]:
        """The linear layers that compute the hidden neurons."""
        raise NotImplementedError


class GatedFeedForward(DenseFeedForward):
    """The module of `Swiglu`: (B, T, D) -> (B, T, D)."""

    scales_with_up = True

    def __init__(self, spec: Swiglu, width: int, branches: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[spec.activation]
        self.gate = Linear(width, spec.width, bias=spec.bias, std=0.02)
        self.up = Linear(width, spec.width, bias=spec.bias, std=0.02)
        self.down = Linear(spec.width, width, bias=spec.out_bias, std=residual_std(0.02, branches))

    def forward(self, x: Tensor, inputs: ForwardInputs | None = None) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))

    def writers(self) -> list[nn.Linear]:
        return [self.gate, self.up]


class PlainFeedForward(DenseFeedForward):
    """The module of `Mlp`: (B, T, D) -> (B, T, D)."""

    def __init__(self, spec: Mlp, width: int, branches: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[spec.activation]
        self.scales_with_up = self.activation is F.relu
        self.up = Linear(width, spec.width, bias=spec.bias, std=0.02)
        self.down = Linear(spec.width, width, bias=spec.out_bias, std=residual_std(0.02, branches))

    def forward(self, x: Tensor, inputs: ForwardInputs | None = None) -> Tensor:
        return self.down(self.activation(self.up(x)))

    def writers(self) -> list[nn.Linear]:
        return [self.up]

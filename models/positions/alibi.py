"""Attention with linear biases (arXiv 2108.12409): scores fall with the distance, at a fixed slope for each head."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.positions.protocol import Position, Positional
from models.specs import POSITIONS, PositionSpec


@POSITIONS.register("alibi")
@dataclass(frozen=True)
class Alibi(PositionSpec):
    """q.k / sqrt(d) - m (i - j) with a fixed slope m of each query head; nothing is learned."""

    acts = "scores"
    per_head = True

    def build(self, *, width: int, heads: int, head_width: int, context: int, bidirectional: bool = False) -> nn.Module:
        return LinearBiases(heads)


class LinearBiases(Position):
    """Owns no state: the slopes follow from the number of heads."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, positions: Tensor) -> Positional:  # (B or 1, T)
        return Positional(slopes=slopes(self.heads, positions.device))


def slopes(heads: int, device: torch.device | None = None) -> Tensor:
    """The slope of each head, (H,) in fp32: 2^(-8k / H) for k = 1 to H when H is a power of two.

    Otherwise those of the power of two below, and then every other one of the power of two above. They are computed on
    the device: numbers that are sent there in every forward would let the host wait for it.
    """
    power = 2 ** int(math.log2(heads))
    below = 2 * torch.arange(power, device=device) + 2  # (P,)
    above = 2 * torch.arange(heads - power, device=device) + 1  # (H - P,)
    return torch.exp2(torch.cat([below, above]).float() * (-4 / power))

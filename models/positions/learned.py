"""Learned absolute positions, added to the token embeddings (GPT-2)."""

from dataclasses import dataclass

from torch import Tensor, nn

from models.linear import Embedding
from models.positions.protocol import Position, Positional
from models.specs import POSITIONS, PositionSpec


@POSITIONS.register("learned")
@dataclass(frozen=True)
class Learned(PositionSpec):
    """One learned vector per position below the context length; longer inputs are an error."""

    acts = "input"
    bounded = True

    def build(self, *, width: int, heads: int, head_width: int, context: int, bidirectional: bool = False) -> nn.Module:
        return LearnedPositions(width, context)


class LearnedPositions(Position):
    """Table of learned positions (context, D)."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.table = Embedding(context, width, std=0.02)

    def forward(self, positions: Tensor) -> Positional:  # (B or 1, T)
        return Positional(added=self.table(positions))  # (B or 1, T, D)

"""No position encoding: the causal mask alone tells the model about order (NoPE, arXiv 2305.19466)."""

from dataclasses import dataclass

from torch import Tensor, nn

from models.positions.protocol import Position, Positional
from models.specs import POSITIONS, PositionSpec


@POSITIONS.register("none")
@dataclass(frozen=True)
class NoPosition(PositionSpec):
    """No position encoding."""

    acts = "nothing"

    def build(self, *, width: int, heads: int, head_width: int, context: int, bidirectional: bool = False) -> nn.Module:
        return _None()


class _None(Position):
    def forward(self, positions: Tensor) -> Positional:
        return Positional()

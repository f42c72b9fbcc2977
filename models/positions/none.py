"""No position encoding: the causal mask alone tells the model about order (NoPE, arXiv 2305.19466)."""

from dataclasses import dataclass

from torch import Tensor, nn

from models.positions.protocol import POSITIONS, Encoding, Positional


@POSITIONS.register("none")
@dataclass(frozen=True)
class NoPosition(Encoding):
    """No position encoding."""

    acts = "nothing"

    def build(self, *, width: int, heads: int, head_width: int, context: int, bidirectional: bool = False) -> nn.Module:
        return _None()


class _None(nn.Module):
    def forward(self, positions: Tensor) -> Positional:
        return Positional()

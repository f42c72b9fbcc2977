"""No position encoding: the causal mask alone tells the model about order (NoPE, arXiv 2305.19466)."""

from dataclasses import dataclass

from torch import Tensor, nn

from models.positions.protocol import POSITIONS, Positional


@POSITIONS.register("none")
@dataclass(frozen=True)
class NoPosition:
    """No position encoding."""

    acts = "nothing"
    per_head = False
    bounded = False

    def check(self, head_width: int) -> None:
        """Heads of any width will do."""

    def build(self, *, width: int, heads: int, head_width: int, context: int) -> nn.Module:
        return _None()


class _None(nn.Module):
    def forward(self, positions: Tensor) -> Positional:
        return Positional()

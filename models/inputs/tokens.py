"""Token embedding: a learned vector for each entry of the vocabulary.

B batch, T tokens, D model width, V vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from models.cpu.matmul import linear
from models.linear import Embedding
from models.specs import INPUTS, InputSpec


@INPUTS.register("tokens")
@dataclass(frozen=True)
class Tokens(InputSpec):
    """Token ids (B, T)."""

    def build(self, width: int, vocab_size: int) -> nn.Module:
        return TokenEmbedding(vocab_size, width, std=0.02)


class TokenEmbedding(Embedding):
    """The vectors (V, D), which can also serve as the output projection of a tied model."""

    def project(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., V)
        return linear(hidden, self.weight)

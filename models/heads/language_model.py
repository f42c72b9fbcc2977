"""Language-model head: logits of the vocabulary for every token, by a matrix of its own or by that of the embedding.

Tying both matrices: arXiv 1608.05859. B batch, T tokens, D model width, V vocabulary.
"""

from dataclasses import dataclass

from torch import nn

from models.linear import Linear
from models.specs import HEADS, HeadSpec


@HEADS.register("tied")
@dataclass(frozen=True)
class Tied(HeadSpec):
    """The matrix of the token embedding, transposed."""

    tied = True

    def build(self, width: int, vocab_size: int) -> None:
        return None


@HEADS.register("untied")
@dataclass(frozen=True)
class Untied(HeadSpec):
    """A matrix of its own."""

    def build(self, width: int, vocab_size: int) -> nn.Module:
        return Linear(width, vocab_size, bias=False, std=0.02)

"""Language-model head: logits of the vocabulary for every token, by a matrix of its own or by that of the embedding.

Tying both matrices: arXiv 1608.05859. B batch, T tokens, D model width, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.heads.transform import HeadTransform
from models.linear import Drawn, Linear
from models.registry import Single
from models.specs import HEADS, HeadSpec


@HEADS.register("tied")
@dataclass(frozen=True)
class Tied(HeadSpec):
    """The matrix of the token embedding, transposed.

    Args:
        bias: whether the logits get a learned bias (BERT, arXiv 1810.04805).
        transform: a layer before the matrix (models/heads/transform.py), or nothing.
    """

    tied = True

    bias: bool = False
    transform: Any = field(default=None, metadata={"registry": Single(HeadTransform)})

    def build(self, width: int, vocab_size: int) -> None:
        return None

    def build_bias(self, vocab_size: int) -> nn.Module | None:
        return OutputBias(vocab_size) if self.bias else None


@HEADS.register("untied")
@dataclass(frozen=True)
class Untied(HeadSpec):
    """A matrix of its own.

    Args:
        bias: whether the logits get a learned bias.
        transform: a layer before the matrix (models/heads/transform.py), or nothing.
    """

    bias: bool = False
    transform: Any = field(default=None, metadata={"registry": Single(HeadTransform)})

    def build(self, width: int, vocab_size: int) -> nn.Module:
        return Linear(width, vocab_size, bias=self.bias, std=0.02)


class OutputBias(Drawn):
    """The bias (V,) of a tied head: (..., V) -> (..., V)."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(vocab_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, logits: Tensor) -> Tensor:
        return logits + self.bias.to(logits.dtype)

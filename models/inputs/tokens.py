"""Token embedding: a learned vector for each entry of the vocabulary, as BERT has it also one for each segment.

B batch, T tokens, D model width, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.attention.segments import document_starts
from models.cpu.matmul import linear
from models.errors import UserError
from models.linear import Embedding
from models.registry import Single
from models.specs import INPUTS, NORMS, InputSpec


@dataclass(frozen=True)
class Segments:
    """Segment embedding, the token types of BERT (arXiv 1810.04805, section 3): a vector for each text of a pair.

    The segment of a token is how many separators stand before it in its document, at most count - 1.

    Args:
        count: segments that there are.
        separator: id of the token that ends a text, BERT's [SEP]; nothing: every token is of the first segment.
    """

    count: int = 2
    separator: int | None = None


@INPUTS.register("tokens")
@dataclass(frozen=True)
class Tokens(InputSpec):
    """Token ids (B, T).

    Args:
        norm: of the embeddings with their positions and segments, before dropout; or nothing.
        segments: an embedding of the segments of an encoder's text, or nothing.
    """

    norm: Any = field(default=None, metadata={"registry": NORMS})
    segments: Any = field(default=None, metadata={"registry": Single(Segments)})

    def check(self, direction: str, vocab_size: int) -> None:
        if self.segments is None:
            return
        if direction != "bidirectional":
            raise UserError(
                f"segments are those of an encoder, and this model is {direction}; leave input.segments out"
            )
        if self.segments.count < 1 or not 0 <= (self.segments.separator or 0) < vocab_size:
            raise UserError(
                f"segments needs a count of at least 1 and a separator below vocab_size ({vocab_size}), got "
                f"{self.segments.count} and {self.segments.separator}"
            )

    def build(self, width: int, vocab_size: int) -> nn.Module:
        return TokenEmbedding(vocab_size, width, std=0.02)

    def build_segments(self, width: int) -> nn.Module | None:
        return None if self.segments is None else SegmentEmbedding(self.segments, width)

    def build_norm(self, width: int) -> nn.Module | None:
        return None if self.norm is None else self.norm.build(width)


class TokenEmbedding(Embedding):
    """The vectors (V, D), which can also serve as the output projection of a tied model."""

    def project(self, hidden: Tensor) -> Tensor:  # (..., D) -> (..., V)
        return linear(hidden, self.weight)


class SegmentEmbedding(Embedding):
    """The module of `Segments`: the vectors (count, D)."""

    def __init__(self, spec: Segments, width: int) -> None:
        super().__init__(spec.count, width, std=0.02)
        self.separator = spec.separator

    def forward(self, tokens: Tensor, documents: Tensor | None) -> Tensor:  # (B, T) both -> (B, T, D)
        return super().forward(self.numbers(tokens, documents))

    def numbers(self, tokens: Tensor, documents: Tensor | None) -> Tensor:
        """The segment of each token (B, T)."""
        if self.separator is None:
            return torch.zeros_like(tokens)
        ends = (tokens == self.separator).long()  # (B, T)
        before = ends.cumsum(1) - ends  # separators before it in the row
        first = document_starts(documents, tokens.shape[1], tokens.device).expand(tokens.shape)  # (B, T)
        return (before - before.gather(1, first)).clamp(max=self.num_embeddings - 1)

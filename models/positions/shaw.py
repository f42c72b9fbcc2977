"""Learned vectors for the distance between tokens, added to keys and values (Shaw et al., arXiv 1803.02155, section 3).

B batch, H query heads, T queries, S keys, d channels of a head, N distances after clipping.

    score_ij = q_i (k_j + a^K_(i-j)) / sqrt(d)          y_i = sum_j p_ij (v_j + a^V_(i-j))

No vector is made for a pair: q_i a^K is taken once for each of the N distances and then looked up (section 3.3), and
the probabilities are summed by distance before they meet a^V.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.errors import UserError, did_you_mean
from models.linear import Embedding
from models.positions.protocol import Position, Positional
from models.specs import POSITIONS, PositionSpec

TERMS = ("keys", "keys_and_values")


@POSITIONS.register("shaw")
@dataclass(frozen=True)
class Shaw(PositionSpec):
    """A vector for each distance, shared by the heads of a layer; each layer has its own.

    Args:
        clip: distances beyond this take its vector. A causal model has one for each of 0 to clip, a bidirectional one
            for each of -clip to clip.
        terms: `keys`, or `keys_and_values` as in the paper, for which all probabilities of a layer are in memory.
    """

    acts = "queries"
    per_layer = True

    clip: int = 16
    terms: str = "keys"

    def __post_init__(self) -> None:
        if self.clip < 1:
            raise UserError(f"clip must be at least 1, got {self.clip}")
        if self.terms not in TERMS:
            raise UserError(f"unknown terms {self.terms!r}{did_you_mean(self.terms, TERMS)}")

    def build(self, *, width: int, heads: int, head_width: int, context: int, bidirectional: bool = False) -> nn.Module:
        return DistanceVectors(self, head_width, bidirectional)

    def flops_per_token(self, width: int, heads: int, head_width: int, length: int) -> int:
        """Forward FLOPs of the products with the vectors of a causal model."""
        return (2 if self.terms == "keys" else 4) * heads * head_width * (self.clip + 1)


class DistanceVectors(Position):
    """The learned tables (N, d)."""

    def __init__(self, spec: Shaw, head_width: int, bidirectional: bool) -> None:
        super().__init__()
        self.first = -spec.clip if bidirectional else 0
        count = spec.clip - self.first + 1
        self.keys = Embedding(count, head_width, std=0.02)
        self.values = Embedding(count, head_width, std=0.02) if spec.terms == "keys_and_values" else None

    def forward(self, positions: Tensor) -> Positional:  # (B or 1, T)
        every = torch.arange(self.keys.num_embeddings, device=positions.device)
        values = None if self.values is None else self.values(every)  # (N, d)
        return Positional(relative=Clipped(self.keys(every), values, self.first))


class Clipped(NamedTuple):
    """The `Relative` of vectors for the distances `first` to `first` + N - 1.

    Attributes:
        keys: (N, d).
        values: (N, d), or None.
        first: 0, or negative.
    """

    keys: Tensor
    values: Tensor | None
    first: int

    def terms(self, q: Tensor, k: Tensor, distance: Tensor, scale: float, past: int, reach: int | None) -> Tensor:
        by_row = q @ self.keys.to(q.dtype).T  # (B, H, T, N)
        looked_up = by_row.gather(-1, self.rows(distance).expand(*q.shape[:2], -1, -1))  # (B, H, T, S)
        return looked_up.to(torch.promote_types(q.dtype, torch.float32)) * scale

    def rows(self, distance: Tensor) -> Tensor:
        return (distance - self.first).clamp(0, len(self.keys) - 1)

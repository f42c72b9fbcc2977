"""T5's relative positions (arXiv 1910.10683, section 2.1): a learned addend for each head and bucket of distances."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.errors import UserError
from models.linear import Embedding
from models.positions.protocol import Position, Positional
from models.specs import POSITIONS, PositionSpec


@POSITIONS.register("t5")
@dataclass(frozen=True)
class T5(PositionSpec):
    """One learned addend of the scores for each head and bucket, shared by all layers that name the same encoding.

    T5 itself does not divide the scores by sqrt(d): give its attention `scale: 1.0`.

    Args:
        buckets: half of them hold one distance each, the others ranges that grow geometrically. In a bidirectional
            model half of all are for keys ahead.
        max_distance: from here on all distances are in the last bucket.
        per_layer: whether each layer has addends of its own (GLaM, arXiv 2112.06905), and not all the same.
    """

    acts = "scores"
    per_head = True

    buckets: int = 32
    max_distance: int = 128
    per_layer: bool = False

    def __post_init__(self) -> None:
        if self.buckets < 2 or self.buckets % 2:
            raise UserError(f"buckets must be even and at least 2, got {self.buckets}")
        if self.max_distance <= self.buckets // 2:
            raise UserError(
                f"max_distance must be above {self.buckets // 2}, half the buckets, got {self.max_distance}"
            )

    def check(self, *, width: int, head_width: int, bidirectional: bool) -> None:
        """Raise UserError in an encoder whose directions would have one bucket each."""
        if bidirectional and self.buckets < 4:
            raise UserError(f"a bidirectional model needs at least 4 buckets, got {self.buckets}")

    def build(self, *, width: int, heads: int, head_width: int, context: int, bidirectional: bool = False) -> nn.Module:
        return BucketBiases(self, heads, bidirectional)


class BucketBiases(Position):
    """The learned table (buckets, H)."""

    def __init__(self, spec: T5, heads: int, bidirectional: bool) -> None:
        super().__init__()
        self.spec, self.bidirectional = spec, bidirectional
        self.table = Embedding(spec.buckets, heads, std=0.02)

    def forward(self, positions: Tensor) -> Positional:  # (B or 1, T)
        furthest = self.spec.max_distance
        first = -furthest if self.bidirectional else 0
        distances = torch.arange(first, furthest + 1, device=positions.device)  # (N,)
        rows = self.table(bucket(distances, self.spec.buckets, furthest, self.bidirectional))  # (N, H)
        return Positional(table=rows.T, first=first)


def bucket(distance: Tensor, buckets: int, max_distance: int, bidirectional: bool = False) -> Tensor:
    """The bucket of each distance (int64) from a key to the query behind it.

    In a decoder distances are at least 0; in a bidirectional model negative ones (keys ahead) have the later half.
    """
    if bidirectional:
        half = buckets // 2
        return bucket(distance.abs(), half, max_distance) + half * (distance < 0)
    exact = buckets // 2
    grown = torch.log(distance.clamp(min=exact).float() / exact) / math.log(max_distance / exact)
    ranged = (exact + (grown * (buckets - exact)).long()).clamp(max=buckets - 1)
    return torch.where(distance < exact, distance, ranged)

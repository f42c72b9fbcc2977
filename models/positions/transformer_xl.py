"""Transformer-XL's relative positions: the query is asked about each distance (arXiv 1901.02860, section 3.3).

B batch, H query heads, G key/value heads, T queries, S keys, d channels of a head, D model width, N distances.

    score_ij = ((q_i + u) k_j + (q_i + v) W r_(i-j)) / sqrt(d)

with r the sines and cosines of a distance. The second product is taken for each distance that can occur and then looked
up by the distance of a pair, so nothing depends on an order of the keys.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.errors import UserError
from models.positions.protocol import Position, Positional
from models.specs import POSITIONS, PositionSpec

BASE = 10000.0


@POSITIONS.register("transformer_xl")
@dataclass(frozen=True)
class TransformerXl(PositionSpec):
    """Biases u and v of each head and a map W of the distances; each layer has its own (as XLNet's do)."""

    acts = "queries"
    per_head = True
    per_layer = True

    def check(self, *, width: int, head_width: int, bidirectional: bool) -> None:
        """Raise UserError for a model of odd width."""
        if width % 2:
            raise UserError(f"sines and cosines of the distance need an even width, got {width}")

    def build(self, *, width: int, heads: int, head_width: int, context: int, bidirectional: bool = False) -> nn.Module:
        return DistanceMap(width, heads, head_width, bidirectional)

    def flops_per_token(self, width: int, heads: int, head_width: int, length: int) -> int:
        """Forward FLOPs over a whole sequence: the map of one distance, and the products with u and all distances."""
        return 2 * heads * head_width * (width + 1 + length)


class DistanceMap(Position):
    """Owns u and v (H, d) and W (H * d, D)."""

    def __init__(self, width: int, heads: int, head_width: int, bidirectional: bool) -> None:
        super().__init__()
        self.bidirectional = bidirectional
        self.u = nn.Parameter(torch.empty(heads, head_width))
        self.v = nn.Parameter(torch.empty(heads, head_width))
        self.weight = nn.Parameter(torch.empty(heads * head_width, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in (self.u, self.v, self.weight):
            nn.init.normal_(parameter, std=0.02)

    def forward(self, positions: Tensor) -> Positional:  # (B or 1, T)
        return Positional(relative=Asked(self.u, self.v, self.weight, positions.shape[1], self.bidirectional))


class Asked(NamedTuple):
    """The `Relative` of a distance that is mapped as a key is.

    Attributes:
        u, v: (H, d).
        weight: (H * d, D).
        tokens: the new ones of the forward.
        bidirectional: whether keys ahead are seen.
    """

    u: Tensor
    v: Tensor
    weight: Tensor
    tokens: int
    bidirectional: bool
    values: Tensor | None = None

    def terms(self, q: Tensor, k: Tensor, distance: Tensor, scale: float, past: int, reach: int | None) -> Tensor:
        batch, heads, queries, width = q.shape
        furthest = past + self.tokens - 1 if reach is None else min(reach, past + self.tokens - 1)
        first = -furthest if self.bidirectional else 0
        u = self.u.to(q.dtype).unflatten(0, (k.shape[1], -1))  # (G, H / G, d)
        by_key = (u @ k.transpose(-1, -2)).flatten(1, 2)[:, :, None]  # (B, H, 1, S)
        asked = q + self.v.to(q.dtype)[:, None]  # (B, H, T, d)
        weight = self.weight.to(q.dtype).view(heads, width, -1)  # (H, d, D)
        r = sines(torch.arange(first, furthest + 1, device=q.device), weight.shape[-1]).to(q.dtype)  # (N, D)
        if batch * queries < width:  # a few queries: mapping them costs less than mapping every distance
            by_distance = (asked @ weight) @ r.T  # (B, H, T, N)
        else:
            by_distance = asked @ (weight @ r.T)  # (B, H, T, N)
        index = (distance - first).clamp(0, furthest - first).expand(batch, heads, -1, -1)  # (B, H, T, S)
        return (by_key + by_distance.gather(-1, index)).to(torch.promote_types(q.dtype, torch.float32)) * scale


def sines(distances: Tensor, width: int) -> Tensor:
    """sin and then cos of distance / 10000^(2c / D), (N, D) in fp32, for distances (N,) of either sign."""
    channels = torch.arange(0, width, 2, device=distances.device).float()  # (D / 2,)
    angles = distances[:, None].float() / BASE ** (channels / width)  # (N, D / 2)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)

"""Hierarchical attention: tokens attend inside their segment, segments attend to one another, and tokens see segments.

B batch, X new segments, N segments so far, m summaries of a segment, D width, R heads between segments, d channels.

The layer is HAT's (arXiv 2210.05529, section 3) with both of its encoders in one: summaries s of the segments (HAT's
are the segments' first tokens, here a pooling of the layer's input, e.g. HAN's) are put in context by an attention of
their own, as in the cross-segment encoder, and what comes of it is written back. HAT writes into the first token, which
the next segment-wise encoder sees; here the tokens see keys and values of

    s' = s + O softmax(Q s (K S)^T / sqrt(d)) V S

of other segments in one softmax with the tokens of their own, as they see the global tokens of LongT5 (arXiv
2112.07916, section 3). A decoder's summaries see earlier segments and themselves, and its tokens only segments that are
complete. The summaries' attention costs (T / segment)^2.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from models.attention.kernels.sdpa import AttentionMask, attend
from models.attention.multilevel import Level, Nodes, Tree, join_heads, split_heads
from models.attention.pooling import POOLINGS, Han
from models.attention.summary_attention import Summarising, SummaryAttention
from models.cache import Entries
from models.errors import UserError
from models.linear import Linear
from models.positions import Positional
from models.specs import ATTENTIONS, LayerContext


@ATTENTIONS.register("hierarchical")
@dataclass(frozen=True, kw_only=True)
class Hierarchical(Summarising):
    """Attention inside segments and between them; all other options are those of `full`.

    Segments begin with every document. Of a segment that is over, the cache keeps the keys and values of its summaries
    for tokens and for other summaries, and nothing of its tokens.

    Args:
        segment: tokens of a segment.
        pooling: what makes a segment's summaries: `mean`, `query` (any number of them), `han`.
        input_width: as in `Summarising`.
        segment_heads: heads of the attention between segments. Nothing: as many as `heads`.
    """

    position_types = ("rotation",)

    segment: int
    pooling: Any = field(default_factory=Han, metadata={"registry": POOLINGS})
    segment_heads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.segment < 2:
            raise UserError(f"segment must be at least 2 tokens, got {self.segment}")
        if self.segment_heads is not None and self.segment_heads < 1:
            raise UserError(f"segment_heads must be at least 1, got {self.segment_heads}")

    @property
    def tree(self) -> Tree:
        return Tree(self.segment, self.pooling.summaries, depth=1)

    def resolve(self, width: int, layer: int = 0) -> Self:
        return replace(super().resolve(width, layer), segment_heads=self.segment_heads or self.heads)

    def build(self, place: LayerContext) -> nn.Module:
        return HierarchicalAttention(self, place)

    def inner_channels(self, level: Level) -> int:
        if level.fanout is not None:
            return super().inner_channels(level)
        return 2 * level.summaries * self.segment_heads * self.head_width  # keys and values for other summaries

    def relating_flops(self, nodes: int) -> int:
        summaries, channels = nodes * self.pooling.summaries, self.segment_heads * self.head_width
        return summaries * channels * (8 * self.input_width + 4 * summaries)


class HierarchicalAttention(SummaryAttention):
    """The module of `Hierarchical`."""

    def __init__(self, spec: Hierarchical, place: LayerContext) -> None:
        super().__init__(spec, place)
        channels = spec.segment_heads * self.head_width
        self.segment_q, self.segment_k, self.segment_v = (
            Linear(place.width, channels, bias=False, std=0.02) for _ in range(3)
        )
        self.segment_o = Linear(channels, place.width, bias=False, std=0.02)

    def relate(
        self, vectors: Tensor, number: int, level: Level, nodes: Nodes, positional: Positional, kept: Entries | None
    ) -> tuple[Tensor, Tensor]:
        flat = vectors.flatten(1, 2)  # (B, X * m, D)
        q, k, v = (
            map_(flat).unflatten(2, (-1, self.head_width)).transpose(1, 2)
            for map_ in (self.segment_q, self.segment_k, self.segment_v)
        )  # (B, R, X * m, d) each
        q, k = positional.rotate(q), positional.rotate(k)
        inner = torch.cat([join_heads(x, level.summaries) for x in (k, v)], -1)  # (B, X, 2 * m * R * d)
        start, index, rows = nodes.start, nodes.index, inner
        if kept is not None:
            batch = len(inner)
            rows = torch.cat([kept.inner, inner], 1)  # (B, N, 2 * m * R * d)
            start = torch.cat([kept.start, start.expand(batch, -1)], 1)  # (B, N)
            index = torch.cat([kept.index, index.expand(batch, -1)], 1)  # (B, N)
        k, v = (split_heads(x, level.summaries, self.head_width) for x in rows.chunk(2, -1))  # (B, R, N * m, d) each
        mask = nodes.start[:, :, None] == start[:, None]  # (B or 1, X, N)
        if not self.bidirectional:
            mask = mask & (index[:, None] <= nodes.index[:, :, None])
        for dim in (1, 2):
            mask = mask.repeat_interleave(level.summaries, dim)  # (B or 1, X * m, N * m)
        y = attend(q, k, v, AttentionMask(mask[:, None], causal=False), dropout=self.drop())  # (B, R, X * m, d)
        y = self.segment_o(y.transpose(1, 2).flatten(2))  # (B, X * m, D)
        return inner, vectors + y.view_as(vectors)

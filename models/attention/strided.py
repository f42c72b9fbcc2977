"""Strided sparse attention: half of the heads look near, half look back in strides (arXiv 1904.10509, section 4.3).

B batch, H query heads, G key/value heads, T new tokens, S tokens so far, d channels of a head, l stride, w lanes.

    first half of the heads     {j : i - l <= j <= i}
    second half                 {j <= i : (i - j) mod l = 0}

Two such layers connect every token to all earlier ones. The first pattern is a band (kernels/banded.py); for
the second, the tokens of one residue mod l are a sequence of their own, and the l of them lie in the batch. Time and
memory are O(T l + T^2 / l), with l about sqrt(T) O(T sqrt(T)). Distances, and so residues, are those within a document.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.full import Full, FullAttention
from models.attention.kernels.banded import OUTSIDE, Band, attend_band
from models.attention.kernels.sdpa import AttentionMask, ScoreMod, attend
from models.attention.protocol import ForwardInputs
from models.cache import Kept
from models.errors import UserError
from models.specs import ATTENTIONS, LayerContext


@dataclass(frozen=True, kw_only=True)
class TwoPatterns(Full):
    """Base spec of `strided` and `fixed`: the first half of the heads has one pattern, the second half another."""

    needs_mask = False
    directions = ("causal",)
    directions_because = "its patterns are made of tokens behind the token"
    heads_prunable = False
    heads_because = "the first half of them has one pattern and the second half another"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("heads", "kv_heads"):
            if getattr(self, name) % 2:
                raise UserError(
                    f"attention {self.kind!r} gives one half of the heads another pattern than the other: "
                    f"{name} must be even, got {getattr(self, name)}"
                )

    def flops_of_halves(self, width: int, first: int, second: int) -> int:
        """Forward FLOPs of one token whose heads see so many keys in the first half, and in the second."""
        return (super().flops_per_token(width, first) + super().flops_per_token(width, second)) // 2


class TwoPatternAttention(FullAttention):
    """The module of a `TwoPatterns`: subclasses give `near`, for the first half of the heads, and `far`."""

    def mix(self, q: Tensor, kept: Kept, inputs: ForwardInputs) -> Tensor:
        halves, kept = [], kept.in_order()
        for number, pattern in enumerate((self.near, self.far)):
            heads, groups = (
                slice(number * count // 2, (number + 1) * count // 2) for count in (self.heads, self.kv_heads)
            )
            seen = Kept(kept.keys[:, groups], kept.values[:, groups], None)
            halves.append(pattern(q[:, heads], seen, inputs, partial(self.half_scoring, heads, inputs)))
        return torch.cat(halves, dim=1)  # (B, H, T, d)

    def half_scoring(self, heads: slice, inputs: ForwardInputs, q: Tensor, k: Tensor, distance: Tensor) -> ScoreMod:
        """`scoring` of half of the heads."""
        all_heads = q.new_empty(0, self.heads, 0, self.head_width)  # of the queries no more is read than their number
        scoring = self.scoring(all_heads, k, distance, inputs)
        position, sink = (None if x is None else x[heads] for x in (scoring.position, scoring.sink))
        return replace(scoring, position=position, sink=sink)

    def near(self, q: Tensor, kept: Kept, inputs: ForwardInputs, scoring: Callable[..., ScoreMod]) -> Tensor:
        """The first half: q (B, H / 2, T, d) over what is kept of G / 2 heads, with the scores of `scoring`."""
        raise NotImplementedError

    def far(self, q: Tensor, kept: Kept, inputs: ForwardInputs, scoring: Callable[..., ScoreMod]) -> Tensor:
        """The second half, likewise."""
        raise NotImplementedError

    def attend_behind(
        self,
        q: Tensor,
        kept: Kept,
        inputs: ForwardInputs,
        scoring: Callable[..., ScoreMod],
        before: int,
        spans: Tensor | None,
    ) -> Tensor:
        """Attention over the last `before` tokens and the own one, of the same span.

        Args:
            q: (B, ., T, d).
            kept: the keys and values of all tokens so far.
            inputs: of this forward.
            scoring: of queries, keys and distances.
            before: tokens behind the query.
            spans: (B or 1, S), the number of each token's span; None: there is one.
        """
        band, new = Band(before, after=0), q.shape[2]
        if inputs.past == 0 and new > before + 1:
            return attend_band(
                q, kept.keys, kept.values, band, scoring, None if spans is None else (spans, spans), dropout=self.drop()
            )
        first = max(0, inputs.past - before)
        keys, values = kept.keys[:, :, first:], kept.values[:, :, first:]  # (B, ., K, d)
        rows = inputs.past + torch.arange(new, device=q.device)
        distance = rows[:, None] - torch.arange(first, inputs.past + new, device=q.device)  # (T, K)
        mask = band.holds(distance)[None]  # (1, T, K)
        if spans is not None:
            mask = mask & (spans[:, inputs.past :, None] == spans[:, None, first:])  # (B or 1, T, K)
        return attend(q, keys, values, AttentionMask(mask[:, None], False), scoring(q, keys, distance), self.drop())


@ATTENTIONS.register("strided")
@dataclass(frozen=True, kw_only=True)
class Strided(TwoPatterns):
    """Strided sparse attention; `heads` and `kv_heads` are even, and all other options are those of `full`.

    Args:
        stride: l, tokens from one key of the second pattern to the next, and those behind a token in the first.
    """

    stride: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1:
            raise UserError(f"stride must be at least 1 token, got {self.stride}")

    def build(self, place: LayerContext) -> nn.Module:
        return StridedAttention(self, place)

    def flops_per_token(self, width: int, length: int) -> int:
        return self.flops_of_halves(width, min(length, self.stride + 1), -(-length // self.stride))


class StridedAttention(TwoPatternAttention):
    """The module of `Strided`."""

    def __init__(self, spec: Strided, place: LayerContext) -> None:
        super().__init__(spec, place)
        self.stride = spec.stride

    def near(self, q: Tensor, kept: Kept, inputs: ForwardInputs, scoring: Callable[..., ScoreMod]) -> Tensor:
        return self.attend_behind(q, kept, inputs, scoring, self.stride, inputs.documents)

    def far(self, q: Tensor, kept: Kept, inputs: ForwardInputs, scoring: Callable[..., ScoreMod]) -> Tensor:
        """Lane a holds the queries a, a + l, ... of the new ones, and the keys of their residue."""
        batch, _, new, _ = q.shape
        past, stride, seen = inputs.past, self.stride, kept.keys.shape[2]
        lanes = min(new, stride)
        steps = -(-new // lanes)  # queries in a lane, M
        count = (past + lanes - 1) // stride + steps  # keys in a lane, N
        firsts = past + torch.arange(lanes, device=q.device)  # (w,)
        queries = firsts[:, None] + stride * torch.arange(steps, device=q.device)  # (w, M)
        columns = (firsts % stride)[:, None] + stride * torch.arange(count, device=q.device)  # (w, N)
        mask = self._lane_mask(queries, columns, inputs, seen)
        q = F.pad(q, (0, 0, 0, steps * lanes - new)).unflatten(2, (steps, lanes))  # (B, H / 2, M, w, d)
        q = q.movedim(3, 1).flatten(0, 1)  # (B * w, H / 2, M, d)
        k, v = (
            x[:, :, columns.clamp(max=seen - 1)].movedim(2, 1).flatten(0, 1) for x in (kept.keys, kept.values)
        )  # (B * w, G / 2, N, d)
        distance = (queries[:, :, None] - columns[:, None]).flatten(0, 1)  # (w * M, N)
        found = scoring(q, k, distance)
        if found.position is not None:
            position = found.position.unflatten(1, (lanes, steps)).movedim(1, 0)  # (w, H / 2, M, N)
            found = replace(found, position=position.repeat(batch, 1, 1, 1))
        visible = AttentionMask(None, causal=True)
        if mask is not None:
            visible = AttentionMask(
                mask.expand(batch, -1, -1, -1).flatten(0, 1)[:, None], causal=False
            )  # (B * w, 1, M, N)
        y = attend(q, k, v, visible, found, self.drop())  # (B * w, H / 2, M, d)
        return y.unflatten(0, (batch, lanes)).movedim(1, 3).flatten(2, 3)[:, :, :new]

    def _lane_mask(self, queries: Tensor, columns: Tensor, inputs: ForwardInputs, seen: int) -> Tensor | None:
        """(B or 1, w, M, N) bool, or None where it is that of plain causality; no row of a padded query is empty."""
        if inputs.past == 0 and inputs.documents is None:
            return None
        mask = (columns[:, None] <= queries[:, :, None])[None]  # (1, w, M, N)
        if inputs.documents is None:
            return mask
        own, theirs = (
            inputs.documents[:, numbers.clamp(max=seen - 1)].masked_fill(numbers >= seen, OUTSIDE)
            for numbers in (queries, columns)
        )  # (B or 1, w, M), (B or 1, w, N)
        return mask & (own[..., None] == theirs[..., None, :])

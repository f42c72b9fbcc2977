"""Fixed sparse attention: half of the heads look at their block, half at the last tokens of each block (arXiv
1904.10509, section 4.3).

B batch, H query heads, G key/value heads, T new tokens, S tokens so far, d channels of a head, l block, c summary,
X columns.

    first half of the heads     {j <= i : floor(j / l) = floor(i / l)}
    second half                 {j <= i : j mod l >= l - c}, and i itself, for else the first tokens would see nothing

where i and j count from the beginning of the document. The first pattern is a band cut at the blocks; the columns of
the second, c of every l tokens, are gathered once for all queries. Time and memory are O(T l + T^2 c / l).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.attention.gather import tokens_at
from models.attention.kernels.banded import Band, Extra, attend_band
from models.attention.kernels.sdpa import ScoreMod
from models.attention.protocol import ForwardInputs
from models.attention.segments import document_starts
from models.attention.strided import TwoPatternAttention, TwoPatterns
from models.cache import Kept
from models.errors import UserError
from models.specs import ATTENTIONS, LayerContext


@ATTENTIONS.register("fixed")
@dataclass(frozen=True, kw_only=True)
class Fixed(TwoPatterns):
    """Fixed sparse attention; `heads` and `kv_heads` are even, and all other options are those of `full`.

    Args:
        block: l, tokens of a block.
        summary: c, tokens at the end of each block that all later ones see.
    """

    block: int
    summary: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 1:
            raise UserError(f"block must be at least 1 token, got {self.block}")
        if not 1 <= self.summary <= self.block:
            raise UserError(f"summary must be between 1 and the {self.block} tokens of a block, got {self.summary}")

    def build(self, place: LayerContext) -> nn.Module:
        return FixedAttention(self, place)

    def flops_per_token(self, width: int, length: int) -> int:
        columns = length * self.summary // self.block
        return self.flops_of_halves(width, min(length, self.block), columns + 1)


class FixedAttention(TwoPatternAttention):
    """The module of `Fixed`."""

    def __init__(self, spec: Fixed, place: LayerContext) -> None:
        super().__init__(spec, place)
        self.block, self.summary = spec.block, spec.summary

    def near(self, q: Tensor, kept: Kept, inputs: ForwardInputs, scoring: Callable[..., ScoreMod]) -> Tensor:
        begins = self._place_in_block(kept, inputs) == 0  # (B or 1, S)
        return self.attend_behind(q, kept, inputs, scoring, self.block - 1, begins.cumsum(1))

    def far(self, q: Tensor, kept: Kept, inputs: ForwardInputs, scoring: Callable[..., ScoreMod]) -> Tensor:
        past, seen = inputs.past, kept.keys.shape[2]
        numbers = torch.arange(seen, device=q.device)
        starts = document_starts(inputs.documents, seen, q.device)  # (B or 1, S)
        columns = self._columns(self._place_in_block(kept, inputs))  # (B or 1, X)
        own, theirs = starts[:, past:], starts.gather(1, columns.clamp(max=seen - 1))  # (B or 1, T), (B or 1, X)
        visible = (columns[:, None] < numbers[past:, None]) & (own[..., None] == theirs[:, None])  # (B or 1, T, X)
        k, v = (tokens_at(x, columns.clamp(max=seen - 1)) for x in (kept.keys, kept.values))  # (B, G / 2, X, d)
        distance = numbers[past:, None] - columns[:, None]  # (B or 1, T, X)
        position = scoring(q, k, distance.flatten(0, 1)).position  # (H / 2, B * T or T, X), or None
        if position is not None:
            position = position.unflatten(1, distance.shape[:2]).movedim(1, 0)  # (B or 1, H / 2, T, X)
        itself = kept.keys[:, :, past:], kept.values[:, :, past:]  # (B, G / 2, T, d)
        extra = Extra(k, v, visible, position)
        return attend_band(q, *itself, Band(0, 0), scoring, extra=extra, dropout=self.drop())

    def _place_in_block(self, kept: Kept, inputs: ForwardInputs) -> Tensor:
        """(B or 1, S): how many tokens of its block are before each token."""
        seen, device = kept.keys.shape[2], kept.keys.device
        return (torch.arange(seen, device=device) - document_starts(inputs.documents, seen, device)) % self.block

    def _columns(self, places: Tensor) -> Tensor:
        """(B or 1, X): the tokens at the ends of the blocks in order, then S where a row has fewer than X.

        A document of n tokens has at most n c / l of them, so X = S c / l suffices for any documents.
        """
        seen = places.shape[1]
        ends = places >= self.block - self.summary  # (B or 1, S)
        count = seen * self.summary // self.block
        slots = torch.where(ends, ends.cumsum(1) - 1, count)  # (B or 1, S), the last slot takes what is none
        numbers = torch.arange(seen, device=places.device).expand_as(slots)
        found = torch.full_like(slots[:, :1], seen).repeat(1, count + 1)
        return found.scatter(1, slots, numbers)[:, :count]

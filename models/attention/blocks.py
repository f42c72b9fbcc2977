"""Softmax attention inside a band of the sequence, cut into blocks: time and memory O(T (before + after)).

B batch, H query heads, G key/value heads, T tokens, d channels of a head, N blocks of c tokens, K = before + c + after
keys that a block can see, X keys beside the band, D dilation.

The queries of a block see the keys from `before` tokens before its first to `after` tokens behind its last one. Each of
the N blocks is an entry in the batch of a full attention, so no T x T matrix is made. A dilated band is a plain one on
every D-th token, so the D sequences of tokens with the same remainder are entries in the batch too.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention.standard import Scoring, Visible, attend

OUTSIDE = -2  # the document of what lies before the first token or behind the last
SMALLEST, LARGEST = 64, 256  # tokens of a block: smaller ones copy their keys too often, larger ones see too many


class Band(NamedTuple):
    """The keys around a query: i - before D <= j <= i + after D, every D-th of them, for query i and key j."""

    before: int
    after: int
    dilation: int = 1

    def holds(self, distance: Tensor) -> Tensor:
        """Whether keys that lie `distance` tokens behind their query (negative: ahead) are in the band."""
        near = (distance <= self.before * self.dilation) & (distance >= -self.after * self.dilation)
        return near if self.dilation == 1 else near & (distance % self.dilation == 0)


class Extra(NamedTuple):
    """Keys beside the band that take part in the same softmax: summaries, global tokens.

    Attributes:
        keys, values: (B, G, X, d).
        visible: (B or 1, T, X) bool, which of them each query sees.
        position: (H, T, X) or (B, H, T, X), added to their scores, or None.
    """

    keys: Tensor
    values: Tensor
    visible: Tensor
    position: Tensor | None = None


def attend_band(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    band: Band,
    scoring: Callable[[Tensor, Tensor, Tensor], Scoring],
    documents: tuple[Tensor, Tensor] | None = None,
    extra: Extra | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of every query over the keys in its band, and over the extra ones that it sees.

    Args:
        q: (B, H, T, d).
        k, v: (B, G, T, d).
        band: how far a query sees.
        scoring: of queries (., H, c, d), keys (., G, K, d) and their distances (c, K): what becomes of the scores.
        documents: (B or 1, T) of the queries and (B or 1, T) of the keys; a query sees only keys of its own document.
            A key whose document no query has is seen by none.
        extra: keys outside the band's reach.
        dropout: of the probabilities.

    Returns:
        (B, H, T, d).
    """
    if band.dilation > 1:
        return _by_remainder(q, k, v, band, scoring, documents, extra, dropout)
    batch, _, tokens, _ = q.shape
    block = min(max(band.before + band.after + 1, SMALLEST), LARGEST, tokens)
    blocks = -(-tokens // block)
    rest = blocks * block - tokens
    steps = torch.arange(block, device=q.device)
    columns = torch.arange(-band.before, block + band.after, device=q.device)  # (K,)
    distance = steps[:, None] - columns  # (c, K)
    numbers = torch.arange(blocks, device=q.device)[:, None] * block + columns  # (N, K)
    inside = (numbers >= 0) & (numbers < tokens)
    mask = (band.holds(distance) & inside[:, None])[None]  # (1, N, c, K)
    if documents is not None:
        own = F.pad(documents[0], (0, rest), value=OUTSIDE).unflatten(1, (blocks, block))  # (B or 1, N, c)
        theirs = _reach(documents[1][..., None], band, block, rest, OUTSIDE)[..., 0]  # (B or 1, N, K)
        mask = mask & (own[..., :, None] == theirs[..., None, :])
    padding = torch.arange(blocks * block, device=q.device).view(blocks, block, 1) >= tokens  # (N, c, 1)
    mask = mask | padding  # a row that sees nothing would be not a number, and so would be the gradients of its block
    q = F.pad(q, (0, 0, 0, rest)).unflatten(2, (blocks, block)).movedim(2, 1).flatten(0, 1)  # (B * N, H, c, d)
    k, v = (_reach(x, band, block, rest, 0).movedim(2, 1).flatten(0, 1) for x in (k, v))  # (B * N, G, K, d)
    found = scoring(q, k, distance)
    if extra is not None:
        k, v, mask, found = _with_extra(k, v, mask, found, extra, distance, (batch, blocks, rest))
    mask = mask.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]  # (B * N, 1, c, K + X)
    y = attend(q, k, v, Visible(mask, causal=False), found, dropout)
    return y.unflatten(0, (batch, blocks)).movedim(1, 2).flatten(2, 3)[:, :, :tokens]


def _reach(x: Tensor, band: Band, block: int, rest: int, outside: int) -> Tensor:
    """The keys x (..., T, d) that each block can see, (..., N, K, d), with `outside` beyond both ends."""
    padded = F.pad(x, (0, 0, band.before, rest + band.after), value=outside)
    return padded.unfold(-2, band.before + block + band.after, block).transpose(-1, -2)


def _by_remainder(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    band: Band,
    scoring: Callable[[Tensor, Tensor, Tensor], Scoring],
    documents: tuple[Tensor, Tensor] | None,
    extra: Extra | None,
    dropout: float,
) -> Tensor:
    """The same for a dilated band: the tokens of each remainder modulo D are a sequence with a plain band."""
    batch, _, tokens, _ = q.shape
    dilation, rest = band.dilation, -tokens % band.dilation

    def split(x: Tensor, dim: int, outside: int = 0) -> Tensor:
        """(B or 1, ..., T, C) as (B * D, ..., T / D, C): the tokens are dimension `dim`, the last or the one before."""
        ends = (0, rest) if dim == x.ndim - 1 else (0, 0, 0, rest)
        parts = F.pad(x, ends, value=outside).unflatten(dim, (-1, dilation)).movedim(dim + 1, 1)  # (B or 1, D, ...)
        return parts.expand(batch, *parts.shape[1:]).flatten(0, 1)

    if documents is None and rest and band.after:  # those who look ahead must not see the padding
        inside = q.new_zeros(1, tokens, dtype=torch.int64)
        documents = (inside, inside)
    if documents is not None:
        documents = (split(documents[0], 1, OUTSIDE), split(documents[1], 1, OUTSIDE))
    if extra is not None:
        position = extra.position
        if position is not None:
            position = split(position if position.ndim == 4 else position[None], 2)  # (B * D, H, T / D, X)
        keys, values = (x.repeat_interleave(dilation, 0) for x in (extra.keys, extra.values))  # (B * D, G, X, d)
        extra = Extra(keys, values, split(extra.visible, 1), position)
    y = attend_band(
        *(split(x, 2) for x in (q, k, v)),
        Band(band.before, band.after),
        lambda q, k, distance: scoring(q, k, distance * dilation),
        documents,
        extra,
        dropout,
    )  # (B * D, H, T / D, d)
    return y.unflatten(0, (batch, dilation)).movedim(1, 3).flatten(2, 3)[:, :, :tokens]


def _with_extra(
    k: Tensor, v: Tensor, mask: Tensor, scoring: Scoring, extra: Extra, distance: Tensor, sizes: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor, Scoring]:
    """The keys, values and mask of every block with the extra ones behind them, and the scoring of all of them."""
    batch, blocks, rest = sizes
    seen = F.pad(extra.visible, (0, 0, 0, rest)).unflatten(1, (blocks, -1))  # (B or 1, N, c, X)
    rows = max(mask.shape[0], seen.shape[0])
    mask = torch.cat([mask.expand(rows, -1, -1, -1), seen.expand(rows, -1, -1, -1)], dim=-1)  # (., N, c, K + X)
    k, v = (
        torch.cat([x, more.repeat_interleave(blocks, 0)], dim=2) for x, more in ((k, extra.keys), (v, extra.values))
    )  # (B * N, G, K + X, d)
    if scoring.position is None and extra.position is None:
        return k, v, mask, scoring
    count, heads = extra.keys.shape[2], (extra.position if scoring.position is None else scoring.position).shape[-3]
    near = distance.new_zeros(heads, *distance.shape) if scoring.position is None else scoring.position
    near = near.expand(batch * blocks, -1, -1, -1)  # (B * N, H, c, K)
    if extra.position is None:
        far = near.new_zeros(1, 1, 1, 1).expand(*near.shape[:3], count)
    else:
        rows = extra.position if extra.position.ndim == 4 else extra.position[None]  # (B or 1, H, T, X)
        far = F.pad(rows, (0, 0, 0, rest)).unflatten(2, (blocks, -1)).movedim(2, 1)  # (B or 1, N, H, c, X)
        far = far.expand(batch, -1, -1, -1, -1).flatten(0, 1)  # (B * N, H, c, X)
    position = torch.cat([near.to(far.dtype), far], dim=-1)  # (B * N, H, c, K + X)
    return k, v, mask, replace(scoring, position=position)

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

from models.attention.kernels.sdpa import AttentionMask, ScoreMod, attend
from models.cpu.bias_attention import attend_masked
from models.cpu.dispatch import trains_bias

OUTSIDE = -2  # the document of what lies before the first token or behind the last
SMALLEST, LARGEST = 64, 256  # tokens of a block: smaller ones copy their keys too often, larger ones see too many
ALIGNED = 16  # keys before and behind a block are a multiple: products of odd widths are slower


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


class Anchors(NamedTuple):
    """The first tokens of each document, which every later token of it sees, in the band or not.

    Attributes:
        starts: (B or 1, T) int64, for each token the number of the first of its document.
        count: how many.
        bias: of distances (T, X) from such keys to queries, (H, T, X) that is added to their scores; or None.
    """

    starts: Tensor
    count: int
    bias: Callable[[Tensor], Tensor] | None = None


class _Beside(NamedTuple):
    """Keys beside the band as every block has them.

    Attributes:
        keys, values: (B * N, G, X, d).
        visible: (B or 1, N, c, X).
        position: (B * N, H, c, X), or None.
    """

    keys: Tensor
    values: Tensor
    visible: Tensor
    position: Tensor | None


def attend_band(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    band: Band,
    scoring: Callable[[Tensor, Tensor, Tensor], ScoreMod],
    documents: tuple[Tensor, Tensor] | None = None,
    extra: Extra | None = None,
    dropout: float = 0.0,
    anchors: Anchors | None = None,
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
        anchors: what every query sees of its document's beginning; a dilated band costs then as much as one that is
            not, over the same distance.

    Returns:
        (B, H, T, d).
    """
    if band.dilation > 1 and anchors is None:
        return _by_remainder(q, k, v, band, scoring, documents, extra, dropout)
    batch, _, tokens, _ = q.shape
    before, after = (-(-side * band.dilation // ALIGNED) * ALIGNED for side in (band.before, band.after))
    block = min(max(before, after, SMALLEST), LARGEST, tokens)
    blocks = -(-tokens // block)
    rest = blocks * block - tokens
    steps = torch.arange(block, device=q.device)
    columns = torch.arange(-before, block + after, device=q.device)  # (K,)
    distance = steps[:, None] - columns  # (c, K)
    firsts = torch.arange(blocks, device=q.device)[:, None] * block  # (N, 1)
    rows, numbers = firsts + steps, firsts + columns  # (N, c), (N, K)
    held = band.holds(distance)[None]  # (1, c, K)
    if anchors is not None:
        starts = F.pad(anchors.starts, (0, rest)).unflatten(1, (blocks, block))  # (B or 1, N, c)
        place = numbers[:, None] - starts[..., None]  # (B or 1, N, c, K), in the document of the query
        held = held | ((place >= 0) & (place < anchors.count) & (distance >= 0))
    inside = (numbers >= 0) & (numbers < tokens)  # (N, K)
    mask = (held & inside[:, None]).view(-1, blocks, block, len(columns))  # (B or 1, N, c, K)
    if documents is not None:
        own = F.pad(documents[0], (0, rest), value=OUTSIDE).unflatten(1, (blocks, block))  # (B or 1, N, c)
        theirs = _reach(documents[1][..., None], before, after, block, rest, OUTSIDE)[..., 0]  # (B or 1, N, K)
        mask = mask & (own[..., :, None] == theirs[..., None, :])
    mask = mask | (rows >= tokens)[..., None]  # an empty row would be not a number, and so would its block's gradients
    beside = [] if extra is None else [_spread(extra, batch, blocks, rest)]
    if anchors is not None:
        beside.append(_anchored(k, v, anchors, starts, rows, before))
    q = F.pad(q, (0, 0, 0, rest)).unflatten(2, (blocks, block)).movedim(2, 1).flatten(0, 1)  # (B * N, H, c, d)
    k, v = (_reach(x, before, after, block, rest, 0).movedim(2, 1).flatten(0, 1) for x in (k, v))  # (B * N, G, K, d)
    found = scoring(q, k, distance)
    for more in beside:
        k, v, mask, found = _joined(k, v, mask, found, more)
    mask = mask.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]  # (B * N, 1, c, K + X)
    bias = found.position if found.additive else None
    if trains_bias(q, bias) and q.shape[1] == k.shape[1] and q.dtype == bias.dtype:
        y = attend_masked(q, k, v, bias, mask, found.scale, dropout)
    else:
        y = attend(q, k, v, AttentionMask(mask, causal=False), found, dropout)
    return y.unflatten(0, (batch, blocks)).movedim(1, 2).flatten(2, 3)[:, :, :tokens]


def _reach(x: Tensor, before: int, after: int, block: int, rest: int, outside: int) -> Tensor:
    """The keys x (..., T, d) that each block can see, (..., N, K, d), with `outside` beyond both ends.

    Block by block of the keys: backward adds up a few long runs, which is faster than that of overlapping windows.
    """
    length, keys = x.shape[-2] + rest, before + block + after  # N c, K
    runs = range(0, keys, block)
    padded = F.pad(x, (0, 0, before, rest + max(after, runs[-1] - before)), value=outside)
    parts = [padded.narrow(-2, first, length).unflatten(-2, (-1, block))[..., : keys - first, :] for first in runs]
    return torch.cat(parts, dim=-2)


def _by_remainder(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    band: Band,
    scoring: Callable[[Tensor, Tensor, Tensor], ScoreMod],
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


def _spread(extra: Extra, batch: int, blocks: int, rest: int) -> _Beside:
    """The same extra keys for every block."""
    keys, values = (x.repeat_interleave(blocks, 0) for x in (extra.keys, extra.values))
    visible = F.pad(extra.visible, (0, 0, 0, rest)).unflatten(1, (blocks, -1))
    position = extra.position
    if position is not None:
        position = position if position.ndim == 4 else position[None]  # (B or 1, H, T, X)
        position = F.pad(position, (0, 0, 0, rest)).unflatten(2, (blocks, -1)).movedim(2, 1)  # (B or 1, N, H, c, X)
        position = position.expand(batch, -1, -1, -1, -1).flatten(0, 1)
    return _Beside(keys, values, visible, position)


def _anchored(k: Tensor, v: Tensor, anchors: Anchors, starts: Tensor, rows: Tensor, before: int) -> _Beside:
    """The anchors of the document that each block begins in, as far as they lie before the keys that the block sees.

    All others are among those keys: a document that begins inside a block has its first tokens there, as far as they
    are before the block's queries.

    Args:
        k, v: (B, G, T, d) of all tokens.
        anchors: which.
        starts: (B or 1, N, c) number of the first token of each query's document.
        rows: (N, c) number of each query.
        before: how far the keys of a block reach back from its first token.
    """
    batch, groups, tokens, _ = k.shape
    first = starts[:, :, :1]  # (B or 1, N, 1)
    numbers = first + torch.arange(anchors.count, device=k.device)  # (B or 1, N, X)
    beyond = numbers < rows[:, :1] - before  # (B or 1, N, X)
    visible = beyond[:, :, None] & (starts == first)[..., None]  # (B or 1, N, c, X)
    index = numbers.clamp(max=tokens - 1).flatten(1)[:, None, :, None]  # (B or 1, 1, N * X, 1)

    def chosen(x: Tensor) -> Tensor:
        found = x.gather(2, index.expand(batch, groups, -1, x.shape[-1]))  # (B, G, N * X, d)
        return found.unflatten(2, (-1, anchors.count)).movedim(2, 1).flatten(0, 1)  # (B * N, G, X, d)

    position = None
    if anchors.bias is not None:
        distance = rows[..., None] - numbers[:, :, None]  # (B or 1, N, c, X)
        position = anchors.bias(distance.flatten(0, -2)).unflatten(1, distance.shape[:-1])  # (H, B or 1, N, c, X)
        position = position.movedim(0, 2).expand(batch, -1, -1, -1, -1).flatten(0, 1)
    return _Beside(chosen(k), chosen(v), visible, position)


def _joined(
    k: Tensor, v: Tensor, mask: Tensor, scoring: ScoreMod, beside: _Beside
) -> tuple[Tensor, Tensor, Tensor, ScoreMod]:
    """The keys, values and mask of every block with those beside the band behind them, and the scoring of all."""
    batch = max(mask.shape[0], beside.visible.shape[0])
    mask = torch.cat([x.expand(batch, -1, -1, -1) for x in (mask, beside.visible)], dim=-1)  # (., N, c, K + X)
    near, far, seen = scoring.position, beside.position, k.shape[2]
    k, v = torch.cat([k, beside.keys], dim=2), torch.cat([v, beside.values], dim=2)  # (B * N, G, K + X, d)
    if near is None and far is None:
        return k, v, mask, scoring
    heads, queries = (far if near is None else near).shape[-3:-1]
    near = k.new_zeros(heads, queries, seen) if near is None else near
    far = near.new_zeros(heads, queries, k.shape[2] - seen) if far is None else far
    parts = [x.expand(len(k), -1, -1, -1) for x in (near.to(far.dtype), far)]
    return k, v, mask, replace(scoring, position=torch.cat(parts, dim=-1))  # (B * N, H, c, K + X)

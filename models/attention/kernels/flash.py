"""FlashAttention in PyTorch's operations: exact attention whose memory grows with the length, not with its square.

B batch, G key/value heads, R query heads of each, T queries, S keys, d channels of a head, t and s those of a tile.

The scores exist for one tile of queries and keys at a time (arXiv 2205.14135, algorithms 1 and 4, in the order of loops
of 2307.08691). A tile of queries goes over the keys with a softmax that is corrected as larger scores come,

    m' = max(m, rowmax S)    l' = e^(m - m') l + rowsum e^(S - m')    O' = e^(m - m') O + e^(S - m') V

and ends with O / l and the logsumexp L = m + log l, from which the backward (backward.py) makes the probabilities anew,
P = exp(S - L).

PyTorch's own kernels do the same faster; this is the one to read, and to check others against.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from models.attention.kernels.backward import per_group, tile_gradients
from models.fp32 import without_autocast


class Tiles(NamedTuple):
    """Queries and keys of a tile."""

    queries: int = 128
    keys: int = 128


TILES = Tiles()


class VisiblePairs(NamedTuple):
    """Mask rule of tiled attention (causal or not, within documents), and the scale of the scores.

    Attributes:
        causal: whether the queries, which are the last T of the S tokens, see only keys up to themselves.
        scale: of the scores.
        tiles: queries and keys of a tile.
    """

    causal: bool
    scale: float
    tiles: Tiles

    def rows(self, queries: int) -> Iterator[slice]:
        """The tiles of the queries."""
        for start in range(0, queries, self.tiles.queries):
            yield slice(start, min(start + self.tiles.queries, queries))

    def columns(self, rows: slice, queries: int, keys: int) -> Iterator[slice]:
        """The tiles of the keys that a tile of queries sees something of."""
        end = keys - queries + rows.stop if self.causal else keys
        for start in range(0, end, self.tiles.keys):
            yield slice(start, min(start + self.tiles.keys, end))


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    scale: float | None = None,
    documents: tuple[Tensor, Tensor] | None = None,
    tiles: Tiles = TILES,
) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V, without all scores in memory at any time, nor in the backward.

    Args:
        q: (B, G * R, T, d).
        k, v: (B, G, S, d), S at least T where causal.
        causal: whether the queries, the last T of S tokens, see only keys up to themselves.
        scale: of the scores; nothing: 1 / sqrt(d).
        documents: (B or 1, T) of the queries and (B or 1, S) of the keys; a query sees those of its own document, of
            which there must be one.
        tiles: queries and keys that are looked at together.

    Returns:
        (B, G * R, T, d), computed tile by tile in at least fp32.
    """
    pattern = VisiblePairs(causal, q.shape[-1] ** -0.5 if scale is None else scale, tiles)
    own, theirs = (None, None) if documents is None else documents
    # the backward is outside of any autocast, and must make the very probabilities of the forward
    if not torch.amp.is_autocast_available(q.device.type):  # meta
        return TiledAttention.apply(q, k, v, own, theirs, pattern)
    with without_autocast(q.device):
        return TiledAttention.apply(q, k, v, own, theirs, pattern)


class TiledAttention(torch.autograd.Function):
    """`apply(q, k, v, own, theirs, pattern)`: the arguments of `tiled_attention`, with its two documents apart."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        own: Tensor | None,
        theirs: Tensor | None,
        pattern: VisiblePairs,
    ) -> Tensor:
        groups, queries, keys = k.shape[1], q.shape[2], k.shape[2]
        exact = torch.promote_types(q.dtype, torch.float32)
        y = torch.empty_like(q)
        logsumexp = q.new_empty(q.shape[:3], dtype=exact)  # (B, H, T)
        for rows in pattern.rows(queries):
            tile = per_group(q[:, :, rows].to(exact), groups)  # (B, G, R t, d)
            top = tile.new_full((*tile.shape[:3], 1), torch.finfo(exact).min)  # (B, G, R t, 1)
            total, sums = torch.zeros_like(top), tile.new_zeros(*tile.shape[:3], v.shape[-1])  # (B, G, R t, 1 and d)
            for columns in pattern.columns(rows, queries, keys):
                scores = _scores(tile, k, own, theirs, pattern, rows, columns, queries)  # (B, G, R t, s)
                higher = torch.maximum(top, scores.amax(-1, keepdim=True))
                p, shrink = torch.exp(scores - higher), torch.exp(top - higher)
                total = shrink * total + p.sum(-1, keepdim=True)
                sums = shrink * sums + p @ v[:, :, columns].to(exact)
                top = higher
            y[:, :, rows] = _per_head(sums / total, q.shape[1]).to(y.dtype)
            logsumexp[:, :, rows] = _per_head(top + total.log(), q.shape[1])[..., 0]
        ctx.save_for_backward(q, k, v, own, theirs, y, logsumexp)
        ctx.pattern = pattern
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, own, theirs, y, logsumexp = ctx.saved_tensors
        pattern, (heads, queries), (groups, keys) = ctx.pattern, q.shape[1:3], k.shape[1:3]
        exact = logsumexp.dtype
        dq, dk, dv = torch.empty_like(q), *(torch.zeros_like(x, dtype=exact) for x in (k, v))
        delta = (dy.to(exact) * y).sum(-1, keepdim=True)  # (B, H, T, 1)
        for rows in pattern.rows(queries):
            tile, upstream, lse, row_delta = (
                per_group(x[:, :, rows].to(exact), groups) for x in (q, dy, logsumexp[..., None], delta)
            )  # (B, G, R t, d) twice, (B, G, R t, 1) twice
            dtile = torch.zeros_like(tile)
            for columns in pattern.columns(rows, queries, keys):
                p = torch.exp(_scores(tile, k, own, theirs, pattern, rows, columns, queries) - lse)  # (B, G, R t, s)
                near_k, near_v = (x[:, :, columns].to(exact) for x in (k, v))
                gradients = tile_gradients(upstream, tile, near_k, near_v, p, row_delta, pattern.scale)
                for total, part in zip((dtile, dk[:, :, columns], dv[:, :, columns]), gradients, strict=True):
                    total += part
            dq[:, :, rows] = _per_head(dtile, heads).to(dq.dtype)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _per_head(x: Tensor, heads: int) -> Tensor:
    """(B, G, R * t, C) as (B, G * R, t, C)."""
    return x.unflatten(2, (heads // x.shape[1], -1)).flatten(1, 2)


def _scores(
    tile: Tensor,
    k: Tensor,
    own: Tensor | None,
    theirs: Tensor | None,
    pattern: VisiblePairs,
    rows: slice,
    columns: slice,
    queries: int,
) -> Tensor:
    """Scores (B, G, R t, s) of queries (B, G, R t, d), `rows` of all, with the keys `columns`; -inf where unseen."""
    scores = pattern.scale * (tile @ k[:, :, columns].to(tile.dtype).transpose(-1, -2))
    first = k.shape[2] - queries + rows.start  # number of the first query among the keys
    count = rows.stop - rows.start
    seen = None
    if pattern.causal and columns.stop > first + 1:
        numbers = torch.arange(columns.start, columns.stop, device=k.device)
        seen = (numbers <= torch.arange(first, first + count, device=k.device)[:, None])[None]  # (1, t, s)
    if own is not None:
        same = own[:, rows, None] == theirs[:, None, columns]  # (B or 1, t, s)
        seen = same if seen is None else same & seen
    if seen is None:
        return scores
    per_head = scores.unflatten(2, (-1, count))  # (B, G, R, t, s)
    return per_head.masked_fill(~seen[:, None, None], float("-inf")).flatten(2, 3)

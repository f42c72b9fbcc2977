"""Attention of sorted tokens to near ones, for `lsh`: block by block, forward and backward.

B batch, H heads, R rounds, T tokens, d channels of a head, P places of a round, c places of a block, K places that a
block sees, W = K / c.

The places of all rounds, heads and rows stand in one line of L, `before` empty ones in front of each round, so that no
block reaches into another round's tokens. What the M blocks see are then overlapping windows of that line, which a
product reads without copies. The rounds are one softmax, so with dO spread to the places, w the weights of the rounds
and delta = rowsum(dO * O), the scores' gradient is P * (w dO V^T - w delta) as in FlashAttention (arXiv 2205.14135,
appendix B.2); and what a block of keys gets is a product over the W blocks of queries that see it. Tokens are a
permutation of filled places, so what backward gathers is gathered too, never scattered.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from models.attention.kernels.backward import score_gradients


class Layout(NamedTuple):
    """Tokens in sorted order, and who sees whom: in a round, i sees j where 0 <= n_i - n_j <= reach.

    Attributes:
        tokens: (B, H, R, P) which token lies at a place, T at an empty one; P is a multiple of `block`.
        numbers: (B, H, R, T) int32 n of each token, from 0 on and not falling along the places.
        reach: see above.
        block: c, places that are computed together.
        before, after: how many places before and behind its own a block sees, multiples of `block`, the first not below
            the second.
    """

    tokens: Tensor
    numbers: Tensor
    reach: int
    block: int
    before: int
    after: int

    @property
    def keys(self) -> int:
        """K."""
        return self.before + self.block + self.after


class Weighing(NamedTuple):
    """Normalisation of scores in buckets.

    Attributes:
        scale: of the scores.
        duplicates: whether a key counts once for each round that brings it.
        dropout: of the probabilities.
    """

    scale: float
    duplicates: bool = False
    dropout: float = 0.0


SELF = -1e5  # the score of a query with itself: what is left where it sees no other


def bucketed_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scoring: Weighing) -> Tensor:
    """Attention of each query to the keys that the rounds bring it.

    Args:
        q, k, v: (B, H, T, d).
        layout: who that is.
        scoring: how they are weighed.

    Returns:
        (B, H, T, d). Memory is O(B H R T K), with K about twice the chunk.
    """
    rounds, tokens = layout.tokens.shape[2], q.shape[2]
    front = F.pad(layout.tokens, (layout.before, 0), value=tokens)  # (B, H, R, before + P)
    shape, device = front.shape, q.device
    line = torch.arange(front.numel(), device=device).view(shape)
    place = torch.zeros(*shape[:3], tokens + 1, dtype=torch.int64, device=device).scatter(-1, front, line)
    place = place[..., :tokens].flatten()  # (B * H * R * T,) of each token in the line
    hidden = _hidden(layout, front, 0)  # (M, c, K)
    times = None
    if rounds > 1 and not scoring.duplicates:
        times = torch.ones_like(hidden, dtype=torch.uint8)
        for other in range(1, rounds):
            times += ~_hidden(layout, front, other)
    return BucketedAttention.apply(q, k, v, layout, scoring, front, place, hidden, times)


def _hidden(layout: Layout, front: Tensor, other: int) -> Tensor:
    """Whom no query sees in the `other`-th round after each place's own: (M, c, K) bool."""
    numbers = F.pad(layout.numbers.roll(-other, 2), (0, 1), value=-layout.reach - 1)  # empty places are seen by none
    numbers = F.pad(numbers.gather(-1, front).flatten(), (0, layout.after), value=-layout.reach - 1)  # (L,)
    seen = _windows(numbers[:, None], layout).transpose(1, 2)  # (M, 1, K)
    own = _own(numbers[:, None], layout)  # (M, c, 1)
    return (own - layout.reach > seen) | (seen > own)


def _own(x: Tensor, layout: Layout) -> Tensor:
    """The queries' places (M, c, C) in a line x (L, C)."""
    return x[layout.before : len(x) - layout.after].unflatten(0, (-1, layout.block))


def _windows(x: Tensor, layout: Layout) -> Tensor:
    """Overlapping windows of a contiguous line x (L, C), as a view: (M, K, C), M = (L - K) / c + 1."""
    count, channels = (len(x) - layout.keys) // layout.block + 1, x.shape[1]
    return x.as_strided((count, layout.keys, channels), (layout.block * channels, channels, 1))


def _spread(x: Tensor, front: Tensor, before: int, after: int) -> Tensor:
    """Tokens x (B, H, T, d) at the places `front` (B, H, R, .) and empty ones at both ends: (before + . + after, d)."""
    x = F.pad(x, (0, 0, 0, 1)).flatten(0, 1)  # (B * H, T + 1, d), the last of each zero
    heads, size, _ = x.shape
    first = torch.arange(heads, device=x.device)[:, None] * size
    at = F.pad((front.flatten(0, 1).flatten(1) + first).flatten(), (before, after), value=size - 1)
    return x.flatten(0, 1).index_select(0, at)


def _by_key(x: Tensor, layout: Layout) -> Tensor:
    """Pairs x (M, c, K) by blocks of keys: (L / c, K queries that may see them, c)."""
    block, keys = layout.block, layout.keys
    more = keys // block - 1
    x = F.pad(x, (0, 0, 0, 0, more, more))
    shape = len(x) - more, more + 1, block, block
    strides = block * keys, block * (keys - 1), keys, 1
    return x.as_strided(shape, strides, more * block).reshape(-1, keys, block)


class BucketedAttention(torch.autograd.Function):
    """`apply(q, k, v, layout, scoring, front, place, hidden, times)`, see `bucketed_attention`."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scoring: Weighing, front: Tensor,
        place: Tensor, hidden: Tensor, times: Tensor | None,
    ) -> Tensor:  # fmt: skip
        batch, heads, rounds, _ = front.shape
        exact = torch.promote_types(q.dtype, torch.float32)
        lines = [_spread(x, front, 0, layout.after) for x in (q, k, v)]  # (L, d)
        near_k, near_v = (_windows(x, layout) for x in lines[1:])  # (M, K, d)
        scores = torch.bmm(_own(lines[0], layout), near_k.transpose(1, 2)).to(exact).mul_(scoring.scale)  # (M, c, K)
        scores.diagonal(layout.before, 1, 2).fill_(SELF)
        if times is not None:
            scores -= times.to(exact).log_()
        scores.masked_fill_(hidden, torch.finfo(exact).min / 2)  # finite: empty places have rows of nothing else
        p = scores.softmax(-1)
        total = scores.amax(-1) - p.amax(-1).log()  # (M, c) logsumexp
        keep = F.dropout(torch.ones_like(p), scoring.dropout) if scoring.dropout else None
        y = torch.bmm((p if keep is None else p * keep).to(v.dtype), near_v).flatten(0, 1)  # (M * c, d)
        found = place - layout.before
        weights = total.flatten().index_select(0, found).view(batch, heads, rounds, -1).softmax(2)  # (B, H, R, T)
        y = y.index_select(0, found).view(*weights.shape, -1)  # (B, H, R, T, d)
        y = (y * weights.to(y.dtype)[..., None]).sum(2)
        ctx.save_for_backward(q, k, v, y, p, weights, front, place, keep)
        ctx.layout, ctx.scale = layout, scoring.scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, p, weights, front, place, keep = ctx.saved_tensors
        layout, shape = ctx.layout, (*weights.shape, -1)
        before, after = layout.before, layout.after
        delta = weights * (dy * y).to(weights.dtype).sum(-1)[:, :, None]  # (B, H, R, T)
        weights, delta = (
            F.pad(F.pad(x, (0, 1)).gather(-1, front).flatten(), (after, before + after))[:, None]
            for x in (weights, delta)
        )  # (L + before + after, 1)
        dy = _spread(dy, front, after, before + after) * weights.to(dy.dtype)  # what reaches each round
        asks = slice(after + before, len(dy) - before - after)
        blocks = -1, layout.block
        near_k, near_v = (_windows(_spread(x, front, 0, after), layout) for x in (k, v))  # (M, K, d)
        ds = torch.bmm(dy[asks].unflatten(0, blocks), near_v.transpose(1, 2)).to(p.dtype)  # (M, c, K)
        ds = score_gradients(ds, p, delta[asks].unflatten(0, blocks), keep).to(q.dtype)
        ds.diagonal(before, 1, 2).fill_(0)  # the score of a token with itself is given
        p = (p if keep is None else p * keep).to(v.dtype)
        dq = torch.bmm(ds, near_k).flatten(0, 1).index_select(0, place - before)
        q = _spread(q, front, after, before + after)
        dk, dv = (
            torch.bmm(_by_key(pairs, layout).transpose(1, 2), _windows(x, layout)).flatten(0, 1).index_select(0, place)
            for pairs, x in ((ds, q), (p, dy))
        )
        dq, dk, dv = (x.view(shape).sum(2) for x in (dq, dk, dv))
        return dq * ctx.scale, dk * ctx.scale, dv, None, None, None, None, None, None

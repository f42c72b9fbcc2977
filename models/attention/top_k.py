"""Top-k attention: each query reads only the keys with its k largest logits (arXiv 1912.11637, section 3).

B batch, H query heads, G key/value heads, T new tokens, S visible tokens, d channels of a head.

The pattern is found by comparing all logits, so time and memory are O(T S), as without it: what it buys is a sparse
distribution, not speed. Of the T x S tensors only the probabilities are kept for the backward, and of a decoder without
packed documents only those of the keys that its blocks of queries see, little more than half.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from models.attention.full import Full, FullAttention, token_distance
from models.attention.kernels.sdpa import AttentionMask, ScoreMod, logits, weigh
from models.attention.protocol import Context
from models.cache import Kept
from models.errors import UserError
from models.specs import ATTENTIONS, Place

ROWS = 256  # queries of a causal block: fewer skip more keys and make more calls


@ATTENTIONS.register("top_k")
@dataclass(frozen=True, kw_only=True)
class TopK(Full):
    """Attention over the keys with the largest logits; all other options are those of `full`.

    Args:
        keep: k, how many keys a query reads, fewer where it sees fewer. Of equal logits the earlier keys' are kept.
    """

    takes = Full.takes

    keep: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep < 1:
            raise UserError(f"keep must be at least 1 key, got {self.keep}")

    def build(self, place: Place) -> nn.Module:
        return TopKAttention(self, place)


class TopKAttention(FullAttention):
    """The module of `TopK`."""

    def __init__(self, spec: TopK, place: Place) -> None:
        super().__init__(spec, place)
        self.keep = spec.keep

    def mix(self, q: Tensor, kept: Kept, context: Context) -> Tensor:
        biases = context.positional[self.positional].biases
        scoring = self.scoring(q, kept.keys, token_distance(q, kept, context) if biases else None, context)
        return top_k_attention(q, kept.keys, kept.values, self.keep, context.visible, scoring, self.drop())


def top_k_attention(
    q: Tensor, k: Tensor, v: Tensor, keep: int, visible: AttentionMask, scoring: ScoreMod, dropout: float = 0.0
) -> Tensor:
    """Softmax over the `keep` largest logits of each query, (B, H, T, d).

    The gradient flows through the kept logits only. A sink is beside the keys: it is always there and not counted.

    Args:
        q: (B, H, T, d).
        k, v: (B, G, S, d).
        keep: at least 1.
        visible: which keys each query may see.
        scoring: what becomes of the logits before they are compared.
        dropout: of the probabilities.
    """
    if scoring.additive and scoring.position is None:
        scale = q.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
        return PlainTopK.apply(q, k, v, keep, visible, scale, dropout)
    scores = logits(q, k, scoring)  # (B, H, T, S)
    if (mask := visible.dense(q, k)) is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if keep < k.shape[2]:
        scores = scores.masked_fill(~largest(scores.detach(), keep), -math.inf)
    return weigh(scores, q, v, scoring, dropout)


def largest(scores: Tensor, count: int) -> Tensor:
    """Which `count` of each row's scores (..., S) are its largest, of equal ones the first: (..., S) bool.

    `count` is below S. Where fewer scores are finite, it is these and any others.
    """
    best = scores.topk(count + 1, dim=-1).values[..., -2:]  # (..., 2) the last that is kept, the first that is not
    bound = best[..., :1]
    tied = (bound == best[..., 1:]) & (bound > -math.inf)  # (..., 1)
    if scores.device.type != "cpu" or torch.compiler.is_compiling():  # asking whether there are any would wait
        return torch.where(tied, _first(scores, bound, count), scores >= bound)
    kept = scores >= bound
    if tied.any():
        rows = tied[..., 0]
        kept[rows] = _first(scores[rows], bound[rows], count)
    return kept


def _first(scores: Tensor, bound: Tensor, count: int) -> Tensor:
    """Those of scores (..., S) above bound (..., 1), and of those at it the first, `count` in all: (..., S) bool."""
    above, level = scores > bound, scores == bound
    room = count - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1, dtype=torch.int32) <= room))


class PlainTopK(torch.autograd.Function):
    """`apply(q, k, v, keep, visible, scale, dropout)`, see `top_k_attention`, where nothing is added to the logits.

    The gradient of a logit is P * (dP - rowsum(P * dP)), zero where the key is not kept since P is, so no mask is kept.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keep: int,
        visible: AttentionMask,
        scale: float,
        dropout: float,
    ) -> Tensor:
        exact, mask = torch.promote_types(q.dtype, torch.float32), visible.dense(q, k)  # (B or 1, 1, T, S)
        q3, k3, v3 = (x.contiguous() for x in (q, k, v))
        y, saved, spans = torch.empty_like(q3), [], _spans(q, k, visible)
        for first, last, seen in spans:
            scores = _products(q3[:, :, first:last], k3[:, :, :seen], transposed=True).to(exact).mul_(scale)
            if mask is not None:
                scores.masked_fill_(~mask[..., first:last, :seen], -math.inf)  # (B, H, t, s)
            if keep < seen:
                scores.masked_fill_(~largest(scores, keep), -math.inf)
            p = scores.softmax(-1)
            kept = F.dropout(torch.ones_like(p), dropout) if dropout else None
            y[:, :, first:last] = _products((p if kept is None else p * kept).to(v.dtype), v3[:, :, :seen])
            saved += [p, kept]
        ctx.save_for_backward(q3, k3, v3, y, *saved)
        ctx.spans, ctx.scale = spans, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, *saved = ctx.saved_tensors
        delta = (dy * y).to(saved[0].dtype).sum(-1, keepdim=True)  # (B, H, T, 1)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (first, last, seen), p, kept in zip(ctx.spans, saved[::2], saved[1::2], strict=True):
            rows, above = slice(first, last), dy[:, :, first:last].contiguous()
            ds = _products(above, v[:, :, :seen], transposed=True).to(p.dtype)  # (B, H, t, s)
            ds = (ds if kept is None else ds.mul_(kept)).sub_(delta[:, :, rows]).mul_(p).mul_(ctx.scale).to(q.dtype)
            dq[:, :, rows] = _products(ds, k[:, :, :seen])
            dk[:, :, :seen] += _over_queries(ds, q[:, :, rows], k.shape[1])
            dv[:, :, :seen] += _over_queries((p if kept is None else p * kept).to(v.dtype), above, v.shape[1])
        return dq, dk, dv, None, None, None, None


def _spans(q: Tensor, k: Tensor, visible: AttentionMask) -> list[tuple[int, int, int]]:
    """Queries that are computed together, from and up to which, and how many keys: behind those they see none."""
    new, seen = q.shape[2], k.shape[2]
    if visible.mask is not None or not visible.causal:
        return [(0, new, seen)]
    return [(first, min(first + ROWS, new), min(first + ROWS, seen)) for first in range(0, new, ROWS)]


def _products(x: Tensor, y: Tensor, transposed: bool = False) -> Tensor:
    """x (B, G * R, t, .) times y (B, G, s, .) of its group, or times its transpose."""
    groups = y.shape[1]
    rows = x.reshape(x.shape[0] * groups, -1, x.shape[-1])  # (B * G, R * t, .)
    other = y.flatten(0, 1)
    return torch.bmm(rows, other.transpose(1, 2) if transposed else other).view(*x.shape[:3], -1)


def _over_queries(pairs: Tensor, x: Tensor, groups: int) -> Tensor:
    """pairs (B, G * R, t, s) transposed times x (B, G * R, t, d), summed over the queries of a group: (B, G, s, d)."""
    pairs, x = (y.reshape(y.shape[0] * groups, -1, y.shape[-1]) for y in (pairs, x))  # (B * G, R * t, .)
    return torch.bmm(pairs.transpose(1, 2), x).unflatten(0, (-1, groups))

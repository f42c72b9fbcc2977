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

from models.attention.full import Full, FullAttention, in_sight, token_distance
from models.attention.kernels.backward import per_group, tile_gradients
from models.attention.kernels.sdpa import AttentionMask, ScoreMod, logits, weigh
from models.attention.protocol import ForwardInputs
from models.cache import Kept
from models.errors import UserError
from models.specs import ATTENTIONS, LayerContext

ROWS = 256  # queries of a causal block: fewer skip more keys and make more calls


@ATTENTIONS.register("top_k")
@dataclass(frozen=True, kw_only=True)
class TopK(Full):
    """Attention over the keys with the largest logits; all other options are those of `full`.

    Args:
        keep: k, how many keys a query reads, fewer where it sees fewer. Of equal logits the earlier keys' are kept.
    """

    position_types = Full.position_types

    keep: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep < 1:
            raise UserError(f"keep must be at least 1 key, got {self.keep}")

    def build(self, place: LayerContext) -> nn.Module:
        return TopKAttention(self, place)


class TopKAttention(FullAttention):
    """The module of `TopK`."""

    def __init__(self, spec: TopK, place: LayerContext) -> None:
        super().__init__(spec, place)
        self.keep = spec.keep

    def mix(self, q: Tensor, kept: Kept, inputs: ForwardInputs) -> Tensor:
        biases = inputs.positional[self.positional].biases
        kept, visible = in_sight(kept, inputs, ordered=biases)
        scoring = self.scoring(q, kept.keys, token_distance(q, kept, inputs) if biases else None, inputs)
        return top_k_attention(q, kept.keys, kept.values, self.keep, visible, scoring, self.drop())


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
    """Mask of the `count` largest scores of each row (..., S), of equal ones the first: (..., S) bool.

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
    """Mask of the scores (..., S) above bound (..., 1) and the first of those at it, `count` in all: (..., S) bool."""
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
        q, k, v = (x.contiguous() for x in (q, k, v))
        y, saved, spans, groups = torch.empty_like(q), [], _spans(q, k, visible), k.shape[1]
        for first, last, seen in spans:
            scores = _heads(per_group(q[:, :, first:last], groups) @ k[:, :, :seen].mT, q).to(exact).mul_(scale)
            if mask is not None:
                scores.masked_fill_(~mask[..., first:last, :seen], -math.inf)  # (B, H, t, s)
            if keep < seen:
                scores.masked_fill_(~largest(scores, keep), -math.inf)
            p = scores.softmax(-1)
            kept = F.dropout(torch.ones_like(p), dropout) if dropout else None
            weights = per_group((p if kept is None else p * kept).to(v.dtype), groups)
            y[:, :, first:last] = _heads(weights @ v[:, :, :seen], q)
            saved += [p, kept]
        ctx.save_for_backward(q, k, v, y, *saved)
        ctx.spans, ctx.scale = spans, scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, *saved = ctx.saved_tensors
        delta = (dy * y).to(saved[0].dtype).sum(-1, keepdim=True)  # (B, H, T, 1)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for (first, last, seen), p, kept in zip(ctx.spans, saved[::2], saved[1::2], strict=True):
            tile, upstream, offset = (per_group(x[:, :, first:last], k.shape[1]) for x in (q, dy, delta))
            p, kept = (None if x is None else per_group(x, k.shape[1]) for x in (p, kept))  # (B, G, R t, s)
            near = k[:, :, :seen], v[:, :, :seen]
            dtile, dk_part, dv_part = tile_gradients(upstream, tile, *near, p, offset, ctx.scale, kept)
            dq[:, :, first:last] = _heads(dtile, q)
            dk[:, :, :seen] += dk_part
            dv[:, :, :seen] += dv_part
        return dq, dk, dv, None, None, None, None


def _spans(q: Tensor, k: Tensor, visible: AttentionMask) -> list[tuple[int, int, int]]:
    """Queries that are computed together, from and up to which, and how many keys: behind those they see none."""
    new, seen = q.shape[2], k.shape[2]
    if visible.mask is not None or not visible.causal:
        return [(0, new, seen)]
    return [(first, min(first + ROWS, new), min(first + ROWS, seen)) for first in range(0, new, ROWS)]


def _heads(x: Tensor, q: Tensor) -> Tensor:
    """(B, G, R * t, C) as (B, H, t, C), for queries q (B, H, ., d)."""
    return x.view(len(x), q.shape[1], -1, x.shape[-1])

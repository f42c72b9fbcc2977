"""Top-k attention: each query reads only the keys with its k largest logits (arXiv 1912.11637, section 3).

B batch, H query heads, G key/value heads, T new tokens, S visible tokens, d channels of a head.

The pattern is found by comparing all logits, so time and memory are O(T S), as without it: what it buys is a sparse
distribution, not speed. Of the T x S tensors, one of probabilities and one mask of bytes are kept for the backward.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.full import Full, FullAttention, token_distance
from models.attention.protocol import ATTENTIONS, Context, Place
from models.attention.standard import Scoring, Visible
from models.cache import Kept
from models.errors import UserError


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
    q: Tensor, k: Tensor, v: Tensor, keep: int, visible: Visible, scoring: Scoring, dropout: float = 0.0
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
    scores = logits(q, k, scoring)  # (B, H, T, S)
    if (mask := visible.dense(q, k)) is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    if keep < k.shape[2]:
        scores = scores.masked_fill(~largest(scores.detach(), keep), -math.inf)
    if scoring.sink is not None:
        sink = scoring.sink.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)  # (B, H, T, 1)
        scores = torch.cat([scores, sink], dim=-1)
    p = F.dropout(scores.softmax(-1)[..., : k.shape[2]], dropout)  # (B, H, T, S)
    y = (p.to(q.dtype).unflatten(1, (k.shape[1], -1)) @ v[:, :, None]).flatten(1, 2)
    return y if scoring.values is None else y + scoring.values.mix(p).to(q.dtype)


def logits(q: Tensor, k: Tensor, scoring: Scoring) -> Tensor:
    """What `scoring` makes of Q K^T, in at least fp32: q (B, H, T, d), k (B, G, S, d) -> (B, H, T, S)."""
    exact = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    grouped = q.unflatten(1, (k.shape[1], -1))  # (B, G, R, T, d)
    scores = ((grouped @ k[:, :, None].transpose(-1, -2)).to(exact) * scale).flatten(1, 2)  # (B, H, T, S)
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    return scores if scoring.position is None else scores + scoring.position


def largest(scores: Tensor, count: int) -> Tensor:
    """Which `count` of each row's scores (..., S) are its largest, of equal ones the first: (..., S) bool."""
    bound = scores.topk(count, dim=-1).values[..., -1:]  # (..., 1), the same whichever of equal scores it came from
    above, level = scores > bound, scores == bound
    room = count - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1, dtype=torch.int32) <= room))

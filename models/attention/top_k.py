"""Top-k attention: each query reads only the keys with its k largest logits (arXiv 1912.11637, section 3).

B batch, H query heads, G key/value heads, T new tokens, S visible tokens, d channels of a head.

The pattern is found by comparing all logits, so time and memory are O(T S), as without it: what it buys is a sparse
distribution, not speed. Of the T x S tensors, one of probabilities and one mask of bytes are kept for the backward.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.attention.full import Full, FullAttention, token_distance
from models.attention.protocol import ATTENTIONS, Context, Place
from models.attention.standard import Scoring, Visible, logits, weigh
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
    return weigh(scores, q, v, scoring, dropout)


def largest(scores: Tensor, count: int) -> Tensor:
    """Which `count` of each row's scores (..., S) are its largest, of equal ones the first: (..., S) bool."""
    bound = scores.topk(count, dim=-1).values[..., -1:]  # (..., 1), the same whichever of equal scores it came from
    above, level = scores > bound, scores == bound
    room = count - above.sum(-1, keepdim=True)
    return above | (level & (level.cumsum(-1, dtype=torch.int32) <= room))

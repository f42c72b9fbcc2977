"""Softmax attention: dispatch to PyTorch's scaled dot-product attention, or to plain products where it has no kernel.

B batch, G key/value heads, R query heads of each, T tokens, d channels of a head.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.cpu.dispatch import attention_dtype
from models.cpu.short_attention import ShortAttention


@dataclass(frozen=True)
class AttentionMask:
    """Attention mask: the keys that a query may see.

    Attributes:
        mask: (B or 1, 1, T, S) bool, True = may attend, no row empty; or None.
        causal: without a mask, whether query i sees only the keys up to i (False: all of them).
        bias: the same as `training_bias` made it, or None.
    """

    mask: Tensor | None
    causal: bool
    bias: Tensor | None = None

    def dense(self, q: Tensor, k: Tensor) -> Tensor | None:
        """The mask spelled out, or None where everything is visible."""
        if self.mask is not None or not self.causal:
            return self.mask
        return torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()


@dataclass(frozen=True)
class ValueTerms:
    """Relative values: vectors added to the values by the distance of query and key (arXiv 1803.02155).

    Attributes:
        vectors: (N, d).
        index: (T, S) int64, which of them; keys behind the S, if there are more, get none.
    """

    vectors: Tensor
    index: Tensor

    def mix(self, p: Tensor) -> Tensor:
        """Their mean (B, H, T, d) under probabilities p (B, H, T, S or more), summed by vector first."""
        index = self.index.expand(*p.shape[:2], -1, -1)
        by_vector = p.new_zeros(*p.shape[:3], len(self.vectors)).scatter_add(-1, index, p[..., : index.shape[-1]])
        return by_vector.to(self.vectors.dtype) @ self.vectors


@dataclass(frozen=True)
class ScoreMod:
    """Score modification: scale, position bias, relative values, soft cap, sink.

    Attributes:
        scale: takes the place of 1 / sqrt(d).
        position: (H, T, S) or (B, H, T, S), added to them.
        softcap: c, where they become c tanh(scores / c) (Gemma 2, arXiv 2408.00118, section 2.2), before `position`.
        sink: (H,) attention sink: one extra logit without a value (arXiv 2309.17453).
        values: added to the values, or None.
    """

    scale: float | None = None
    position: Tensor | None = None
    softcap: float | None = None
    sink: Tensor | None = None
    values: ValueTerms | None = None

    @property
    def additive(self) -> bool:
        """Whether nothing but `scale` and `position` takes part, as in PyTorch's kernels."""
        return self.softcap is None and self.sink is None and self.values is None


PLAIN = ScoreMod()


def attend(
    q: Tensor, k: Tensor, v: Tensor, visible: AttentionMask, scoring: ScoreMod = PLAIN, dropout: float = 0.0
) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V over the keys that each query may see.

    Args:
        q: (B, G * R, T, d).
        k, v: (B, G, S, d).
        visible: which keys those are.
        scoring: what else becomes of the scores.
        dropout: of the probabilities.

    Returns:
        (B, G * R, T, d).
    """
    if not scoring.additive:
        return reference_attention(q, k, v, visible, scoring, dropout)
    plain = scoring.scale is None and scoring.position is None
    if plain and visible.bias is not None and torch.compiler.is_compiling() and q.requires_grad and not dropout:
        return ShortAttention.apply(q, k, v, visible.bias)
    dtype, mask, causal = attention_dtype(q), visible.mask, visible.causal
    if scoring.position is not None:
        mask, causal = scoring.position.to(dtype), False  # (H, T, S) or (B, H, T, S)
        mask = mask[None] if mask.ndim == 3 else mask
        if (seen := visible.dense(q, k)) is not None:
            mask = mask.masked_fill(~seen, -math.inf)
    y = F.scaled_dot_product_attention(
        q.to(dtype),
        k.to(dtype),
        v.to(dtype),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal,
        scale=scoring.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return y.to(q.dtype)


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: AttentionMask, scoring: ScoreMod = PLAIN, dropout: float = 0.0
) -> Tensor:
    """The same as `attend`, written down plainly: all scores in memory, softmax in at least fp32."""
    scores = logits(q, k, scoring)  # (B, H, T, S)
    if (mask := visible.dense(q, k)) is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return weigh(scores, q, v, scoring, dropout)


def logits(q: Tensor, k: Tensor, scoring: ScoreMod) -> Tensor:
    """Modified scores Q K^T in at least fp32: q (B, H, T, d), k (B, G, S, d) -> (B, H, T, S)."""
    exact = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    grouped = q.unflatten(1, (k.shape[1], -1))  # (B, G, R, T, d)
    scores = ((grouped @ k[:, :, None].transpose(-1, -2)).to(exact) * scale).flatten(1, 2)  # (B, H, T, S)
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    return scores if scoring.position is None else scores + scoring.position


def weigh(scores: Tensor, q: Tensor, v: Tensor, scoring: ScoreMod, dropout: float) -> Tensor:
    """The values v (B, G, S, d) by the softmax of scores (B, H, T, S), the sink among them: (B, H, T, d) as q."""
    if scoring.sink is not None:
        sink = scoring.sink.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)  # (B, H, T, 1)
        scores = torch.cat([scores, sink], dim=-1)
    p = F.dropout(scores.softmax(-1)[..., : v.shape[2]], dropout)  # (B, H, T, S)
    y = (p.to(q.dtype).unflatten(1, (v.shape[1], -1)) @ v[:, :, None]).flatten(1, 2)
    return y if scoring.values is None else y + scoring.values.mix(p).to(q.dtype)

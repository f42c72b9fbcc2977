"""Softmax attention by PyTorch's kernel, or as two matrix products where that is faster or the only way.

B batch, G key/value heads, R query heads of each, T tokens, d channels of a head.

On CPU the backward of PyTorch's kernel runs at a tenth of the rate of a bf16 matrix product. Short sequences therefore
train as standard attention does, with the T x T probabilities in memory and everything around the products fused by
torch.compile; the backward is FlashAttention's (arXiv 2205.14135, appendix B.2), which needs of the forward only the
output O and the logsumexp L (here to the base 2, whose exponential torch.compile keeps inside the fused loops):

    P = exp(Q K^T / sqrt(d) + bias - L)      dV = P^T dO      dS = P * (dO V^T - rowsum(dO * O)) / sqrt(d)
                                             dQ = dS K        dK = dS^T Q
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from models import products
from models.products import attention_dtype

LONGEST = 512  # tokens, for which one layer keeps 2 * 512 * 512 bytes of scores for each head


@dataclass(frozen=True)
class AttentionMask:
    """Which keys a query may see.

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
    """What is added to the value of a pair of query and key.

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
    """What is done to the scores, beside dividing them by sqrt(d), and to the values.

    Attributes:
        scale: takes the place of 1 / sqrt(d).
        position: (H, T, S) or (B, H, T, S), added to them.
        softcap: c, where they become c tanh(scores / c) (Gemma 2, arXiv 2408.00118, section 2.2), before `position`.
        sink: (H,) logit of one more key without a value, which takes the attention that no key deserves.
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
        return StandardAttention.apply(q, k, v, visible.bias)
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
    """What `scoring` makes of Q K^T, in at least fp32: q (B, H, T, d), k (B, G, S, d) -> (B, H, T, S)."""
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


def training_bias(x: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """What is added to the scores of a training step that `StandardAttention` should compute, None for any other.

    Args:
        x: (B, T, D) embedded tokens, none of them cached.
        mask: (B or 1, 1, T, T) bool, or None.
        causal: without a mask, whether a token sees none behind it.

    Returns:
        (B or 1, 1, T, T) fp32: 0 where a query may look, -inf elsewhere.
    """
    length = x.shape[1]
    fits = x.device.type == "cpu" and x.dtype == torch.bfloat16 and length <= LONGEST
    if not (products.ROUTE == "torch" and fits and torch.is_grad_enabled()):
        return None
    if mask is None:
        bias = x.new_full((1, 1, length, length), -math.inf if causal else 0.0, dtype=torch.float32)
        return bias.triu(1)
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -math.inf)


class StandardAttention(torch.autograd.Function):
    """`apply(q, k, v, bias)` with the shapes of `attend` where S = T, and a bias (B or 1, 1, T, T)."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        groups = k.shape[1]
        q3, k3, v3 = (_per_group(x, groups) for x in (q, k, v))
        scores = _scores(q3, k3, bias, groups)  # (B, G, R, T, T)
        top = scores.amax(-1, keepdim=True)  # (B, G, R, T, 1)
        p = torch.exp2(scores - top)
        total = p.sum(-1, keepdim=True)
        y = torch.bmm(_per_group(p, groups, q.dtype), v3).view(*p.shape[:-1], -1)  # (B, G, R, T, d)
        y = (y / total).to(q.dtype)
        ctx.save_for_backward(q3, k3, v3, bias, y, top + total.log2())
        return y.view(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        q3, k3, v3, bias, y, logsumexp = ctx.saved_tensors
        batch, groups, repeats, length, width = y.shape
        dy3 = _per_group(dy, groups)  # (B * G, R * T, d)
        delta = (dy.view(y.shape).to(logsumexp.dtype) * y).sum(-1, keepdim=True)  # (B, G, R, T, 1)
        dp = torch.bmm(dy3, v3.transpose(1, 2)).view(batch, groups, repeats, length, -1)  # (B, G, R, T, T)
        p = torch.exp2(_scores(q3, k3, bias, groups) - logsumexp)
        ds = _per_group(p * (dp - delta) * width**-0.5, groups, dy.dtype)  # (B * G, R * T, T)
        p = _per_group(p, groups, dy.dtype)
        dq = torch.bmm(ds, k3).view(dy.shape)
        dk = torch.bmm(ds.transpose(1, 2), q3).view(batch, groups, -1, width)
        dv = torch.bmm(p.transpose(1, 2), dy3).view(batch, groups, -1, width)
        return dq, dk, dv, None


def _per_group(x: Tensor, groups: int, dtype: torch.dtype | None = None) -> Tensor:
    """(B, G * R, T, C) or (B, G, R, T, C) as (B * G, R * T, C): the heads of one group below one another."""
    return x.to(dtype or x.dtype).reshape(x.shape[0] * groups, -1, x.shape[-1])


def _scores(q: Tensor, k: Tensor, bias: Tensor, groups: int) -> Tensor:
    """Q K^T / sqrt(d) + bias in units of log 2, (B, G, R, T, T) in at least fp32, of the factors per group."""
    length, width = k.shape[1:]
    scores = torch.bmm(q, k.transpose(1, 2)).view(q.shape[0] // groups, groups, -1, length, length)
    return scores.to(torch.promote_types(q.dtype, torch.float32)) * (width**-0.5 * math.log2(math.e)) + bias[:, :, None]

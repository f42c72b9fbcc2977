"""Standard attention for short sequences: two products with the T x T scores in memory, for training in bf16 on CPU.

B batch, G key/value heads, R query heads of each, T tokens, d channels of a head.

The backward of PyTorch's CPU kernel runs at a tenth of the rate of a bf16 matrix product. Here everything around the
products is fused by torch.compile, and the backward, FlashAttention's (attention/kernels/backward.py), needs of the
forward only the output O and the logsumexp L, here to the base 2, whose exponential torch.compile keeps inside the
fused loops: P = exp2(scores / log 2 - L).
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from models.attention.kernels.backward import per_group, tile_gradients
from models.cpu.dispatch import takes_short_attention


def training_bias(x: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """Bias of the scores in a training step that `ShortAttention` should compute, None for any other.

    Args:
        x: (B, T, D) embedded tokens, none of them cached.
        mask: (B or 1, 1, T, T) bool, or None.
        causal: without a mask, whether a token sees none behind it.

    Returns:
        (B or 1, 1, T, T) fp32: 0 where a query may look, -inf elsewhere.
    """
    if not takes_short_attention(x):
        return None
    if mask is None:
        length = x.shape[1]
        bias = x.new_full((1, 1, length, length), -math.inf if causal else 0.0, dtype=torch.float32)
        return bias.triu(1)
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -math.inf)


class ShortAttention(torch.autograd.Function):
    """`apply(q, k, v, bias)`: q (B, G * R, T, d), k and v (B, G, T, d), bias (B or 1, 1, T, T) -> (B, G * R, T, d)."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        groups = k.shape[1]
        rows = per_group(q, groups)  # (B, G, R * T, d)
        scores = _scores(rows, k, bias)  # (B, G, R, T, T)
        top = scores.amax(-1, keepdim=True)  # (B, G, R, T, 1)
        p = torch.exp2(scores - top)
        total = p.sum(-1, keepdim=True)
        y = (p.flatten(2, 3).to(q.dtype) @ v).view(*p.shape[:-1], -1)  # (B, G, R, T, d)
        y = (y / total).to(q.dtype)
        ctx.save_for_backward(rows, k, v, bias, y, top + total.log2())
        return y.view(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
        rows, k, v, bias, y, logsumexp = ctx.saved_tensors
        delta = (dy.view(y.shape).to(logsumexp.dtype) * y).sum(-1, keepdim=True)  # (B, G, R, T, 1)
        p = torch.exp2(_scores(rows, k, bias) - logsumexp)  # (B, G, R, T, T)
        p, delta = p.flatten(2, 3), delta.flatten(2, 3)
        upstream = per_group(dy, k.shape[1])  # (B, G, R * T, d)
        dq, dk, dv = tile_gradients(upstream, rows, k, v, p, delta, k.shape[-1] ** -0.5)
        return dq.view(dy.shape), dk, dv, None


def _scores(rows: Tensor, k: Tensor, bias: Tensor) -> Tensor:
    """Q K^T / sqrt(d) + bias in units of log 2, (B, G, R, T, T) in at least fp32, of queries (B, G, R * T, d)."""
    scores = (rows @ k.mT).unflatten(2, (-1, k.shape[2]))
    exact = torch.promote_types(rows.dtype, torch.float32)
    return scores.to(exact) * (k.shape[-1] ** -0.5 * math.log2(math.e)) + bias[:, :, None]

"""Softmax attention with a trained bias, for CPU: whole, or in tiles of the queries.

No kernel of PyTorch's has that gradient on CPU, and what it does instead takes more passes over the scores than needed.

B batch, G key/value heads, R query heads of each, T queries, S keys, d channels of a head, t queries of a tile, s keys
that its last one sees.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.utils.flop_counter import register_flop_formula

from models.attention.kernels.backward import per_group, tile_gradients
from models.fp32 import without_autocast

TILE = 128  # queries: the scores of eight heads with a few thousand keys stay near the caches


def attend_masked(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor, scale: float | None, dropout: float
) -> Tensor:
    """Softmax attention with a trained bias: q (B, H, T, d) and k, v (B, H, S, d) of one dtype -> (B, H, T, d).

    Args:
        bias: (B or 1, H or 1, T, S) of the same dtype, added to the scores.
        mask: (B or 1, 1, T, S) bool, True = may attend, no row empty.
        scale: of the scores; None: 1 / sqrt(d).
        dropout: of the probabilities.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bias = bias.masked_fill(~mask, -math.inf)
    scores = ((q * scale) @ k.transpose(-1, -2)).add_(bias)  # (B, H, T, S)
    return F.dropout(scores.softmax(-1), dropout) @ v


def attend_causal(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Softmax attention with a trained bias in a decoder without dropout, tile by tile of the queries.

    No scores behind a tile's queries are computed, nor are all scores in memory at any time: of the order of T x S are
    what is added to them and its gradient alone.

    Args:
        q: (B, G * R, T, d), the last T of S tokens.
        k, v: (B, G, S, d), all of one dtype.
        bias: (H, T, S), (B or 1, H, T, S) or (B or 1, 1, T, S), added to the scores.
        mask: (T, S) or (B or 1, 1, T, S) bool, which keys a query sees: one at least, and none behind itself.
        scale: of the scores; None: 1 / sqrt(d).

    Returns:
        (B, G * R, T, d).
    """
    bias = bias.to(torch.promote_types(bias.dtype, torch.float32))
    bias = bias[None] if bias.ndim == 3 else bias  # (B or 1, G * R or 1, T, S)
    bias = bias.masked_fill(~mask, -math.inf)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with without_autocast(q.device):  # the backward must make the very probabilities of the forward
        return causal_attention(q, k, v, bias, scale)


# operators of their own, as torch.compile would unroll the loops over the tiles
@torch.library.custom_op("espalier::causal_attention", mutates_args=())
def causal_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """As `attend_causal`, with a bias (B or 1, G * R or 1, T, S) in at least fp32, -inf where a query sees no key."""
    y = torch.empty_like(q)
    for rows, keys in _tiles(q.shape[2], k.shape[2]):
        p = _probabilities(per_group(q[:, :, rows], k.shape[1]), k[:, :, keys], bias[:, :, rows, keys], scale)
        y[:, :, rows] = (p.to(v.dtype) @ v[:, :, keys]).view(y[:, :, rows].shape)
    return y


@torch.library.custom_op("espalier::causal_attention_gradients", mutates_args=())
def causal_attention_gradients(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, y: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of q, k, v and bias, in their shapes."""
    exact = torch.promote_types(q.dtype, torch.float32)
    dq, dbias = torch.empty_like(q), torch.zeros_like(bias)
    dk, dv = (torch.zeros_like(x, dtype=exact) for x in (k, v))
    delta = (dy * y).sum(-1, keepdim=True, dtype=exact)  # (B, G * R, T, 1)
    for rows, keys in _tiles(q.shape[2], k.shape[2]):
        tile, upstream, offset = (per_group(x[:, :, rows], k.shape[1]) for x in (q, dy, delta))
        near_k, near_v = k[:, :, keys], v[:, :, keys]  # (B, G, s, d)
        p = _probabilities(tile, near_k, bias[:, :, rows, keys], scale)  # (B, G, R t, s)
        dtile, dk_part, dv_part = tile_gradients(
            upstream, tile, near_k, near_v, p, offset, scale, dbias=dbias[:, :, rows, keys]
        )
        dq[:, :, rows] = dtile.view(dq[:, :, rows].shape)
        dk[:, :, keys] += dk_part
        dv[:, :, keys] += dv_part
    return dq, dk.to(k.dtype), dv.to(v.dtype), dbias


@causal_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    return torch.empty_like(q)


@causal_attention_gradients.register_fake
def _(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, y: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), torch.empty_like(bias)


def _keep(ctx: FunctionCtx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output)


def _backward(ctx: FunctionCtx, dy: Tensor) -> tuple[Tensor | None, ...]:
    with without_autocast(dy.device):
        return *causal_attention_gradients(dy, *ctx.saved_tensors, ctx.scale), None


causal_attention.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.espalier.causal_attention)
def _flops(q: Sequence[int], k: Sequence[int], *others: object, out_shape: object = None) -> int:
    """As of attention that is not cut into tiles: two products with all keys."""
    return 4 * math.prod(q) * k[2]


@register_flop_formula(torch.ops.espalier.causal_attention_gradients)
def _gradient_flops(
    dy: Sequence[int], q: Sequence[int], k: Sequence[int], *others: object, out_shape: object = None
) -> int:
    """Four products; scores that are computed again are not counted."""
    return 8 * math.prod(q) * k[2]


def _tiles(queries: int, keys: int) -> Iterator[tuple[slice, slice]]:
    """The tiles of the queries, and the keys up to the last of each."""
    for start in range(0, queries, TILE):
        stop = min(start + TILE, queries)
        yield slice(start, stop), slice(keys - queries + stop)


def _probabilities(tile: Tensor, k: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Of queries (B, G, R t, d), keys (B, G, s, d) and a bias (B or 1, G R or 1, t, s), (B, G, R t, s)."""
    scores = (tile @ k.transpose(-1, -2)).to(bias.dtype).mul_(scale)
    scores.view(len(scores), -1, *bias.shape[2:]).add_(bias)
    p = scores.softmax(-1)
    return F.threshold_(p, torch.finfo(p.dtype).eps ** 4, 0.0)  # nothing beside the rest, and subnormals are slow

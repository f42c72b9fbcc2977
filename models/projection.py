"""The output projection in chunks of tokens: losses and figures of next-token predictions, without all the logits.

N tokens, C tokens of one chunk, D model width, V vocabulary.

`log_probabilities` is for figures: NLL, KL divergence and the most likely tokens are read from a chunk at a time.

`linear_cross_entropy` walks over chunks of tokens and computes the gradient in the forward, while a chunk's logits are
at hand, as Liger-Kernel does (arXiv 2410.10989, section 3.2). With P = softmax(H W^T), Y the
one-hot targets and l = logsumexp of the logits, per token and before the mean:

    nll = l - logit[target]      dH = (P - Y) W                            dW = (P - Y)^T H
    z   = l^2                    dH = 2 l P W = 2 l ((P - Y) W + Y W)      dW = (P - Y)^T (2 l H) + Y^T (2 l H)

so the loss costs three matrix products, and the z-term a fourth. The gradients of the two are kept apart until the
backward, where the caller's weights of the two are known.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from models.products import product

IGNORED = -100
# Bytes of one chunk's logits. On CPU small enough to stay in the cache, large enough for the matrix product.
CPU_CHUNK_BYTES = 8 * 2**20
CPU_COMPILED_CHUNK_BYTES = 32 * 2**20  # of fp32, which torch.compile keeps in registers
GPU_CHUNK_BYTES = 512 * 2**20
LOGITS_AT_ONCE = 2**25  # fp32 logits of one model that figures are read from at a time: 128 MiB
SoftmaxError = Callable[..., tuple[Tensor, Tensor, Tensor]]


def log_probabilities(
    projections: Sequence[Callable[[Tensor], Tensor]], hidden: Sequence[Tensor], vocabulary: int
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Log-probabilities (C, V) in fp32 of several models on the same tokens, chunk by chunk: (slice of N, one each).

    Args:
        projections: of each model, (C, D) -> logits (C, V).
        hidden: of each model, (N, D) after the final norm; D may differ.
        vocabulary: V, from which the size of a chunk follows.
    """
    rows = max(1, LOGITS_AT_ONCE // vocabulary)
    for begin in range(0, len(hidden[0]), rows):
        part = slice(begin, begin + rows)
        yield part, [project(h[part]).float().log_softmax(-1) for project, h in zip(projections, hidden, strict=True)]


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats (C,), from log-probabilities (C, V)."""
    return (p.exp() * (p - q)).sum(1)


def reference_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, z_loss: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Mean NLL in nats of targets (N,) under logits hidden (N, D) @ weight (V, D)^T, and the mean squared logsumexp.

    Means are over the targets that are not -100; both are 0 where there are none.
    """
    logits = F.linear(hidden, weight)  # (N, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    kept = targets != IGNORED
    count = kept.sum().clamp(min=1)
    nll = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / count
    if not z_loss:
        return nll, None
    squared = logits.logsumexp(-1).square()  # (N,)
    return nll, torch.where(kept, squared, 0.0).sum() / count


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    z_loss: bool = False,
    chunk_bytes: int | None = None,
    compiled: SoftmaxError | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same two means as `reference_linear_cross_entropy`, without the logits.

    Matrix products run in the autocast dtype where autocast is on and in the dtype of `hidden` otherwise; softmax, sums
    and both results are fp32 (fp64 for fp64 inputs). Differentiable once, with any weights of the two results.

    Args:
        hidden: (N, D).
        weight: (V, D), also of another floating dtype.
        targets: (N,) int64 below V; -100 where there is none.
        z_loss: whether the mean squared logsumexp is returned too; otherwise None stands in its place.
        chunk_bytes: size of one chunk's logits; by default what suits the device.
        compiled: `softmax_error` after torch.compile, where there is one.

    Raises:
        IndexError or RuntimeError: a target is neither -100 nor in [0, V).
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    if chunk_bytes is None:
        on_cpu = CPU_COMPILED_CHUNK_BYTES if compiled else CPU_CHUNK_BYTES
        chunk_bytes = on_cpu if device == "cpu" else GPU_CHUNK_BYTES
    how = _How(z_loss, chunk_bytes, compiled)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        nll, squared = _LinearCrossEntropy.apply(hidden, weight, targets, how)
    else:
        nll, squared, _ = _walk(hidden, weight, targets, how, (False, False))
    return nll, squared if z_loss else None


class _How(NamedTuple):
    """Arguments of `linear_cross_entropy`."""

    z_loss: bool
    chunk_bytes: int
    compiled: SoftmaxError | None


class _Gradients(NamedTuple):
    """Gradients of one term's *sum* over tokens; None where nothing asked for it."""

    hidden: Tensor | None  # (N, D)
    weight: Tensor | None  # (V, D), at least fp32


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor, targets: Tensor, how: _How) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[:2]
        nll, squared, gradients = _walk(hidden, weight, targets, how, wanted)
        ctx.count = (targets != IGNORED).sum().clamp(min=1)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        ctx.save_for_backward(*(tensor for term in gradients for tensor in term))
        if not how.z_loss:
            ctx.mark_non_differentiable(squared)
        return nll, squared

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        terms = [_Gradients(*saved[i : i + 2]) for i in range(0, len(saved), 2)]
        scales = [gradient / ctx.count for gradient in upstream]
        result = []
        for field, dtype in zip(_Gradients._fields, ctx.dtypes, strict=True):
            parts = [getattr(term, field) for term in terms]
            scaled = [part * scale for part, scale in zip(parts, scales, strict=False) if part is not None]
            result.append(sum(scaled[1:], scaled[0]).to(dtype) if scaled else None)
        return *result, None, None


class _Chunk(NamedTuple):
    """One chunk of tokens after its softmax."""

    part: slice  # of the N tokens
    hidden: Tensor  # (C, D)
    target: Tensor  # (C,), 0 where there is none
    error: Tensor  # (C, V) P - Y
    scales: tuple[Tensor, Tensor]  # (C,) what multiplies a token's gradient, for each term; 0 where there is no target


def _walk(
    hidden: Tensor, weight: Tensor, targets: Tensor, how: _How, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor, list[_Gradients]]:
    """Both means, and for each term asked for the gradients of its sum that are `wanted` (of hidden, of weight)."""
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    exact = torch.promote_types(hidden.dtype, torch.float32)
    chunks = max(1, -(-tokens * vocabulary * exact.itemsize // how.chunk_bytes))
    rows = max(1, -(-tokens // chunks))
    terms = [
        _Gradients(
            torch.empty_like(hidden) if wanted[0] else None,
            torch.zeros_like(weight, dtype=exact) if wanted[1] else None,
        )
        for _ in range(1 + how.z_loss if any(wanted) else 0)
    ]
    nll, squared = hidden.new_zeros((), dtype=exact), hidden.new_zeros((), dtype=exact)
    buffers = () if how.compiled else [hidden.new_empty(rows, vocabulary, dtype=exact) for _ in range(2)]  # (C, V) each
    for begin in range(0, tokens, rows):
        part = slice(begin, min(begin + rows, tokens))
        count = part.stop - begin
        kept = targets[part] != IGNORED  # (C,)
        target = targets[part].masked_fill(~kept, 0)
        chunk = hidden[part], weight, target, *(buffer[:count] for buffer in buffers)
        log, chunk_nll, error = (how.compiled or softmax_error)(*chunk)
        nll += torch.where(kept, chunk_nll, 0.0).sum()
        squared += torch.where(kept, log.square(), 0.0).sum()
        scales = (kept.to(hidden.dtype), torch.where(kept, 2 * log, 0.0).to(hidden.dtype))
        _add_gradients(terms, _Chunk(part, hidden[part], target, error, scales), weight)
    count = (targets != IGNORED).sum().clamp(min=1)
    return nll / count, squared / count, terms


def softmax_error(
    hidden: Tensor, weight: Tensor, target: Tensor, logits: Tensor | None = None, probabilities: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logsumexp (C,), NLL (C,) and P - Y (C, V) in the dtype of `weight` of one chunk.

    The last two arguments are buffers (C, V) of at least fp32 that are used again by every chunk: memory that is new
    to the process costs a page fault for every 4 KiB. Under torch.compile nearly all of it stays in registers.
    """
    logits = product(hidden, weight.t(), out=logits)
    column = target[:, None]  # (C, 1)
    probabilities = torch.softmax(logits, -1, out=probabilities)
    # The largest probability is 1 / sum(exp(logit - max)): the logsumexp without another pass of exponentials.
    log = logits.amax(-1) - probabilities.amax(-1).log()  # (C,)
    nll = log - logits.gather(1, column)[:, 0]  # (C,)
    sure = torch.expm1(-nll)[:, None].to(weight.dtype)  # (C, 1) p - 1 of the target, exact where p is nearly 1
    return log, nll, probabilities.to(weight.dtype).scatter_(1, column, sure)


def _add_gradients(terms: list[_Gradients], chunk: _Chunk, weight: Tensor) -> None:
    """Add one chunk's gradients to those of the NLL (first term) and of the squared logsumexp (second)."""
    back = product(chunk.error, weight) if terms and terms[0].hidden is not None else None  # (C, D)
    for index, (term, scale) in enumerate(zip(terms, chunk.scales, strict=False)):
        if term.hidden is not None:
            whole = back + weight[chunk.target] if index else back
            torch.mul(whole, scale[:, None], out=term.hidden[chunk.part])
        if term.weight is not None:
            scaled = chunk.hidden * scale[:, None]  # (C, D)
            product(chunk.error.t(), scaled, out=term.weight, accumulate=True)
            if index:
                term.weight.index_add_(0, chunk.target, scaled.to(term.weight.dtype))

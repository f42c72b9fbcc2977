"""The output projection in chunks of tokens: losses and figures of next-token predictions, without all the logits.

N tokens, C tokens of one chunk, D model width, V vocabulary.

Figures: `log_probabilities` gives one chunk after the other; NLL, `kl_divergence` and the most likely tokens are read
from it.

Losses: `sums_over_chunks` adds up what a function finds in each chunk's logits, and computes the gradient in the
forward, while they are at hand, as Liger-Kernel does (arXiv 2410.10989, section 3.2). `linear_cross_entropy` has such a
function, compress/distillation/losses/logit.py another. With P = softmax(H W^T), Y the one-hot targets and
l = logsumexp of the logits, per token and before the mean:

    nll = l - logit[target]      dH = (P - Y) W                            dW = (P - Y)^T H
    z   = l^2                    dH = 2 l P W = 2 l ((P - Y) W + Y W)      dW = (P - Y)^T (2 l H) + Y^T (2 l H)

so the loss costs three matrix products, and the z-term a fourth. The gradients of the two are kept apart until the
backward, where the caller's weights of the two are known.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import checkpoint

from models.cpu.matmul import product

IGNORED = -100
# Bytes of one chunk's logits. On CPU small enough to stay in the cache, large enough for the matrix product.
CPU_CHUNK_BYTES = 8 * 2**20
CPU_COMPILED_CHUNK_BYTES = 32 * 2**20  # of fp32, which torch.compile keeps in registers
GPU_CHUNK_BYTES = 512 * 2**20
LOGITS_AT_ONCE = 2**25  # fp32 logits of one model held at a time where figures are read from them: 128 MiB
SoftmaxError = Callable[..., tuple[Tensor, Tensor, Tensor]]


class Chunk(NamedTuple):
    """A chunk of tokens before its logits.

    Attributes:
        part: which of the N tokens.
        hidden: (C, D).
        weight: (V, D), in the same dtype.
        buffers: (C, V) each, at least fp32, used again by every chunk: memory that is new to the process costs a page
            fault for every 4 KiB.
    """

    part: slice
    hidden: Tensor
    weight: Tensor
    buffers: tuple[Tensor, ...]

    def logits(self) -> Tensor:
        """(C, V) in at least fp32, in the first buffer."""
        return product(self.hidden, self.weight.t(), out=self.buffers[0])


class Term(NamedTuple):
    """The gradient of one sum with respect to a chunk's logits: scale * (error + one-hot of the label).

    Attributes:
        scale: (C, 1), or a number.
        label: (C,) int64, or None where no one-hot is added.
    """

    scale: Tensor | float = 1.0
    label: Tensor | None = None


class Found(NamedTuple):
    """Loss terms and gradients of a chunk.

    Attributes:
        sums: scalars, each summed over the chunk's tokens.
        error: (C, V), what the gradients of the sums have in common.
        terms: of the first sums; the sums behind them have no gradient.
    """

    sums: tuple[Tensor, ...]
    error: Tensor
    terms: tuple[Term, ...]


Loss = Callable[[Chunk], Found]


def sums_over_chunks(
    hidden: Tensor, weight: Tensor, loss: Loss, *, buffers: int = 1, chunk_bytes: int | None = None
) -> tuple[Tensor, ...]:
    """Sums over all tokens of what `loss` finds in the logits hidden (N, D) @ weight (V, D)^T, never held at once.

    Matrix products run in the autocast dtype where autocast is on and in the dtype of `hidden` otherwise. The gradient
    is computed in the forward; the first sums are differentiable once, with any weights of them.

    Args:
        hidden: (N, D).
        weight: (V, D), also of another floating dtype.
        loss: chunk -> its sums and their gradients.
        buffers: how many (C, V) a chunk is given.
        chunk_bytes: size of one chunk's logits; by default what suits the device.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    chunk_bytes = chunk_bytes or (CPU_CHUNK_BYTES if device == "cpu" else GPU_CHUNK_BYTES)
    given = hidden, weight, loss, buffers, chunk_bytes
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _SumsOverChunks.apply(*given)
    return _walk(*given, (False, False))[0]


class _Gradients(NamedTuple):
    """Gradients of one sum over all tokens; None where nothing asked for it."""

    hidden: Tensor | None  # (N, D)
    weight: Tensor | None  # (V, D), at least fp32


class _SumsOverChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor, *how: Any) -> tuple[Tensor, ...]:
        sums, gradients = _walk(hidden, weight, *how, ctx.needs_input_grad[:2])
        ctx.dtypes = (hidden.dtype, weight.dtype)
        ctx.save_for_backward(*(tensor for gradient in gradients for tensor in gradient))
        ctx.mark_non_differentiable(*sums[len(gradients) :])
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        gradients = [_Gradients(*saved[i : i + 2]) for i in range(0, len(saved), 2)]
        result = []
        for field, dtype in zip(_Gradients._fields, ctx.dtypes, strict=True):
            parts = [getattr(gradient, field) for gradient in gradients]
            scaled = [part * scale for part, scale in zip(parts, upstream, strict=False) if part is not None]
            result.append(sum(scaled[1:], scaled[0]).to(dtype) if scaled else None)
        return *result, None, None, None


@torch.no_grad()
def _walk(
    hidden: Tensor, weight: Tensor, loss: Loss, buffers: int, chunk_bytes: int, wanted: tuple[bool, ...]
) -> tuple[tuple[Tensor, ...], list[_Gradients]]:
    """The sums, and of each that has one the gradients that are `wanted` (of hidden, of weight)."""
    tokens, vocabulary = hidden.shape[0], weight.shape[0]
    exact = torch.promote_types(hidden.dtype, torch.float32)
    chunks = max(1, -(-tokens * vocabulary * exact.itemsize // chunk_bytes))
    rows = max(1, -(-tokens // chunks))
    held = [hidden.new_empty(rows, vocabulary, dtype=exact) for _ in range(buffers)]
    sums, gradients = [], []
    for begin in range(0, max(1, tokens), rows):
        part = slice(begin, min(begin + rows, tokens))
        chunk = Chunk(part, hidden[part], weight, tuple(buffer[: part.stop - begin] for buffer in held))
        found = loss(chunk)
        if not begin:
            sums = [torch.zeros_like(value) for value in found.sums]
            gradients = [
                _Gradients(
                    torch.empty_like(hidden) if wanted[0] else None,
                    torch.zeros_like(weight, dtype=exact) if wanted[1] else None,
                )
                for _ in (found.terms if any(wanted) else ())
            ]
        for total, value in zip(sums, found.sums, strict=True):
            total += value
        if gradients:
            _add_gradients(gradients, chunk, found)
    return tuple(sums), gradients


def _add_gradients(gradients: list[_Gradients], chunk: Chunk, found: Found) -> None:
    """Add one chunk's gradients to those of each sum."""
    weight, error = chunk.weight, found.error.to(chunk.weight.dtype)
    back = product(error, weight) if gradients[0].hidden is not None else None  # (C, D)
    for gradient, (scale, label) in zip(gradients, found.terms, strict=True):
        if gradient.hidden is not None:
            whole = back if label is None else back + weight[label]
            torch.mul(whole, scale, out=gradient.hidden[chunk.part])
        if gradient.weight is not None:
            scaled = chunk.hidden * scale  # (C, D)
            product(error.t(), scaled, out=gradient.weight, accumulate=True)
            if label is not None:
                gradient.weight.index_add_(0, label, scaled.to(gradient.weight.dtype))


def reference_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, z_loss: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Mean NLL in nats of targets (N,) under logits hidden (N, D) @ weight (V, D)^T, and the mean squared logsumexp.

    Means are over the targets that are not -100; both are 0 where there are none.
    """
    count = (targets != IGNORED).sum().clamp(min=1)
    nll, squared = _sums(F.linear(hidden, weight), targets, z_loss)
    return nll / count, squared / count if z_loss else None


def _sums(logits: Tensor, targets: Tensor, z_loss: bool) -> tuple[Tensor, Tensor]:
    """Sums of the NLL and, with the z-loss, of the squared logsumexp of logits (C, V) over targets (C,) but -100."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    return nll, torch.where(targets != IGNORED, logits.logsumexp(-1).square(), 0.0).sum() if z_loss else nll.detach()


def projected_cross_entropy(
    project: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, vocabulary: int, *, z_loss: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The same two means where the output projection (C, D) -> (C, V) is no plain matrix, such as a packed one.

    The backward makes the logits of a chunk again.
    """
    nll, squared = hidden.new_zeros(2, dtype=torch.promote_types(hidden.dtype, torch.float32))
    for part in _parts(len(hidden), vocabulary):
        chunk = hidden[part], targets[part]
        found = checkpoint(
            lambda h, t: _sums(project(h), t, z_loss), *chunk, use_reentrant=False, preserve_rng_state=False
        )
        nll, squared = nll + found[0], squared + found[1]
    count = (targets != IGNORED).sum().clamp(min=1)
    return nll / count, squared / count if z_loss else None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    z_loss: bool = False,
    chunk_bytes: int | None = None,
    compiled: SoftmaxError | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The same two means as `reference_linear_cross_entropy`, by `sums_over_chunks`.

    Softmax, sums and both results are fp32 (fp64 for fp64 inputs).

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

    def loss(chunk: Chunk) -> Found:
        kept = targets[chunk.part] != IGNORED  # (C,)
        target = targets[chunk.part].masked_fill(~kept, 0)
        log, nll, error = (compiled or softmax_error)(chunk.hidden, chunk.weight, target, *chunk.buffers)
        sums = torch.where(kept, nll, 0.0).sum(), torch.where(kept, log.square(), 0.0).sum()
        scale, z_scale = (x[:, None].to(chunk.hidden.dtype) for x in (kept, torch.where(kept, 2 * log, 0.0)))  # (C, 1)
        return Found(sums, error, (Term(scale), Term(z_scale, target))[: 1 + z_loss])

    if chunk_bytes is None and compiled and hidden.device.type == "cpu":
        chunk_bytes = CPU_COMPILED_CHUNK_BYTES
    nll, squared = sums_over_chunks(hidden, weight, loss, buffers=0 if compiled else 2, chunk_bytes=chunk_bytes)
    count = (targets != IGNORED).sum().clamp(min=1)
    return nll / count, squared / count if z_loss else None


def softmax_error(
    hidden: Tensor, weight: Tensor, target: Tensor, logits: Tensor | None = None, probabilities: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Logsumexp (C,), NLL (C,) and P - Y (C, V) in the dtype of `weight` of one chunk.

    The last two arguments are buffers (C, V) of at least fp32. Under torch.compile nearly all of it stays in registers.
    """
    logits = product(hidden, weight.t(), out=logits)
    column = target[:, None]  # (C, 1)
    probabilities = torch.softmax(logits, -1, out=probabilities)
    # The largest probability is 1 / sum(exp(logit - max)): the logsumexp without another pass of exponentials.
    log = logits.amax(-1) - probabilities.amax(-1).log()  # (C,)
    nll = log - logits.gather(1, column)[:, 0]  # (C,)
    sure = torch.expm1(-nll)[:, None].to(weight.dtype)  # (C, 1) p - 1 of the target, exact where p is nearly 1
    return log, nll, probabilities.to(weight.dtype).scatter_(1, column, sure)


def log_probabilities(
    projections: Sequence[Callable[[Tensor], Tensor]], hidden: Sequence[Tensor], vocabulary: int
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Log-probabilities (C, V) in fp32 of several models on the same tokens, chunk by chunk: (slice of N, one each).

    Args:
        projections: of each model, (C, D) -> logits (C, V).
        hidden: of each model, (N, D) after the final norm; D may differ.
        vocabulary: V, from which the size of a chunk follows.
    """
    for part in _parts(len(hidden[0]), vocabulary):
        yield part, [project(h[part]).float().log_softmax(-1) for project, h in zip(projections, hidden, strict=True)]


def _parts(tokens: int, vocabulary: int) -> Iterator[slice]:
    rows = max(1, LOGITS_AT_ONCE // vocabulary)
    return (slice(begin, begin + rows) for begin in range(0, tokens, rows))


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) in nats (C,), from log-probabilities (C, V)."""
    return (p.exp() * (p - q)).sum(1)

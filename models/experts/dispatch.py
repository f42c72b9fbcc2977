"""Tokens on their way to the experts and back, and matrix products of groups of rows with their experts' weights.

    group           sorts the pairs by expert: one stretch of rows an expert, dropped pairs behind the last
    take_rows       x (N, D) -> (P, D) in that order
    grouped_linear  (P, K) -> (P, F), each row with the weights (F, K) of its expert
    sum_pairs       (P, D) -> (N, D), each token's rows weighted and summed in at least fp32

There is no loop over experts in Python, and nothing waits for the device, where `torch.nn.functional.grouped_mm` takes
the inputs: bf16 on a GPU of compute capability 8.0, bf16 and fp32 on CPU, and rows of a multiple of 16 bytes. All else
(fp64, odd widths, fp32 on a GPU) is one product an expert, for which a GPU has to tell how many rows each has. So are
bf16 products where they are slow (models/cpu/dispatch.py). torch.compile takes either as it is.

The products leave the rows behind the last stretch undefined, and NaN times 0 is NaN: those rows are masked wherever
rows become tokens, forward and backward.

N tokens, k experts of a token, P pairs of a token and an expert, E experts, D model width, K summed, F columns.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from models.cpu import dispatch
from models.cpu.matmul import product
from models.experts.assignments import Assignments

ALIGNMENT = 16  # bytes: where rows begin that grouped_mm reads
GROUPED_CAPABILITY = (8, 0)


class Groups(NamedTuple):
    """Pairs in the order of their experts.

    Attributes:
        order: (P,) int64, the pair that stands there; pairs of one expert keep their order.
        ends: (E,) int32, where each expert's rows end.
        experts: (P,) int64, of the pair that stands there; E if that was dropped.
        tokens: (P,) int64, likewise.
        places: (N, k) int64, where a token's pairs stand, if they were given side by side and are to be summed so.
    """

    order: Tensor
    ends: Tensor
    experts: Tensor
    tokens: Tensor
    places: Tensor | None

    @property
    def kept(self) -> Tensor:
        """(P, 1) whether the pair that stands there was not dropped."""
        return (self.experts < self.ends.numel())[:, None]


def group(pairs: Assignments, count: int) -> Groups:
    """Sort the pairs by expert, for `count` experts."""
    experts, order = pairs.experts.sort(stable=True)
    numbers = torch.arange(count, device=experts.device)
    ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)  # (E,)
    places = None
    # Several threads that add rows to the same token need atomic additions, in any order; k neighbours have one order.
    # Outside torch.compile, on CPU, one thread adds the rows up, and does so quicker than it sums neighbours.
    if pairs.per_token and (torch.compiler.is_compiling() or experts.device.type != "cpu"):
        steps = torch.arange(order.numel(), device=order.device)
        places = torch.empty_like(order).scatter(0, order, steps).view(-1, pairs.per_token)  # (N, k)
    return Groups(order, ends, experts, pairs.tokens.index_select(0, order), places)


def take_rows(x: Tensor, groups: Groups) -> Tensor:
    """The tokens' rows of x (N, D) in the order of the experts: (P, D)."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _TakeRows.apply(x, *groups)
    return x.index_select(0, groups.tokens)


def sum_pairs(rows: Tensor, weights: Tensor, groups: Groups, tokens: int) -> Tensor:
    """The weighted rows of each of `tokens` tokens, summed: (N, D) in the dtype of the rows.

    Args:
        rows: (P, D) in the order of the experts; those of dropped pairs may be anything.
        weights: (P,) of the pairs in the order in which they were given.
        groups: of the pairs.
        tokens: N.
    """
    weights = weights.index_select(0, groups.order)[:, None]  # (P, 1)
    if torch.is_grad_enabled() and (rows.requires_grad or weights.requires_grad):
        return _SumPairs.apply(rows, weights, tokens, *groups)
    return _sum(rows, weights, groups, tokens)


def _sum(rows: Tensor, weights: Tensor | None, groups: Groups, tokens: int) -> Tensor:
    """As `sum_pairs`, with weights (P, 1) in the order of the experts, or None where all are 1."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    scaled = rows.to(wide) if weights is None else rows * weights.to(wide)
    scaled = torch.where(groups.kept, scaled, 0.0)  # (P, D)
    if groups.places is None:
        total = scaled.new_zeros(tokens, rows.shape[1]).index_add_(0, groups.tokens, scaled)
    else:
        total = scaled.index_select(0, groups.places.flatten()).view(*groups.places.shape, -1).sum(1)
    return total.to(rows.dtype)


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, *groups: Tensor | None) -> Tensor:
        ctx.save_for_backward(*groups)
        ctx.tokens = x.shape[0]
        return x.index_select(0, Groups(*groups).tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        groups = Groups(*ctx.saved_tensors)
        return _sum(gradient, None, groups, ctx.tokens), *[None] * len(groups)


class _SumPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, rows: Tensor, weights: Tensor, tokens: int, *groups: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows, weights, *groups)
        return _sum(rows, weights, Groups(*groups), tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, *saved = ctx.saved_tensors
        groups = Groups(*saved)
        gradient = gradient.index_select(0, groups.tokens)  # (P, D)
        wide = torch.promote_types(rows.dtype, torch.float32)
        drows = torch.where(groups.kept, gradient * weights.to(wide), 0.0).to(rows.dtype)
        dweights = torch.where(groups.kept, rows.to(wide) * gradient, 0.0).sum(1, keepdim=True).to(weights.dtype)
        return drows, dweights, None, *[None] * len(groups)


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None, groups: Groups) -> Tensor:
    """Each row times the weights of its expert: x (P, K), weight (E, F, K), bias (E, F) -> (P, F), all of one dtype.

    An expert without rows gets gradients of zero.
    """
    if torch.is_grad_enabled():
        y = _GroupedLinear.apply(x, weight, groups.ends)
    else:
        y = grouped_product(x, weight.mT, groups.ends)
    return y if bias is None else y + _Biases.apply(bias, groups.experts)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return grouped_product(x, weight.mT, ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ends = ctx.saved_tensors
        gradient = gradient.contiguous()  # an expanded one has no layout that grouped_mm reads
        dx = grouped_product(gradient, weight, ends) if ctx.needs_input_grad[0] else None
        dw = grouped_outer(gradient, x, ends) if ctx.needs_input_grad[1] else None
        return dx, dw, None


class _Biases(torch.autograd.Function):
    """bias (E, F) -> (P, F), what each row's expert adds; a product in the backward, so that sums have one order."""

    @staticmethod
    def forward(ctx: FunctionCtx, bias: Tensor, experts: Tensor) -> Tensor:
        ctx.save_for_backward(experts)
        ctx.count = bias.shape[0]
        return bias.index_select(0, experts.clamp(max=bias.shape[0] - 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (experts,) = ctx.saved_tensors
        mine = experts == torch.arange(ctx.count, device=experts.device)[:, None]  # (E, P)
        kept = torch.where((experts < ctx.count)[:, None], gradient, 0.0)  # (P, F)
        return mine.to(gradient.dtype) @ kept, None


def grouped_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Rows times their group's matrix: a (P, K), b (E, K, F) -> (P, F); group e ends at `ends` (E,) int32.

    Sums are at least fp32, the result has the dtype of a; rows behind the last end are undefined. Not differentiable.
    """
    if a.device.type == "cuda" and _grouped_mm_takes(a, b):
        return F.grouped_mm(a, b, offs=ends)
    if torch.compiler.is_compiling() or a.is_meta:
        return _traced_product(a, b, ends)
    return _product(a, b, ends)


def grouped_outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """One matrix a group: a (P, F), b (P, K) -> (E, F, K), transposed rows of a times rows of b; 0 without rows.

    Otherwise as `grouped_product`.
    """
    if a.device.type == "cuda" and _grouped_mm_takes(a, b):
        found = F.grouped_mm(a.t(), b, offs=ends)
        filled = torch.diff(ends, prepend=ends.new_zeros(1)) > 0
        return torch.where(filled[:, None, None], found, 0.0)  # pytorch#172439: empty groups are not 0 on every GPU
    if torch.compiler.is_compiling() or a.is_meta:
        return _traced_outer(a, b, ends)
    return _outer(a, b, ends)


def _grouped_mm_takes(a: Tensor, b: Tensor) -> bool:
    """Whether grouped_mm computes products of these, and quickly."""
    if type(a) is not Tensor or type(b) not in (Tensor, nn.Parameter) or not a.numel():
        return False
    if any(stride * a.itemsize % ALIGNMENT for matrix in (a, b) for stride in matrix.stride() if stride != 1):
        return False
    if a.device.type == "cuda":
        return a.dtype == torch.bfloat16 and torch.cuda.get_device_capability(a.device) >= GROUPED_CAPABILITY
    wanted = (torch.float32,) if dispatch.WIDENS_BF16 else (torch.float32, torch.bfloat16)
    return a.device.type == "cpu" and a.dtype in wanted


def _product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    if _grouped_mm_takes(a, b):
        return F.grouped_mm(a, b, offs=ends)
    out = a.new_empty(a.shape[0], b.shape[2])
    begin = 0
    for matrix, end in zip(b.unbind(), ends.tolist(), strict=True):
        if end > begin:
            out[begin:end] = product(a[begin:end], matrix)
        begin = end
    return out


def _outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    if _grouped_mm_takes(a, b):
        return F.grouped_mm(a.t(), b, offs=ends)
    out = a.new_zeros(len(ends), a.shape[1], b.shape[1])
    begin = 0
    for matrix, end in zip(out, ends.tolist(), strict=True):
        if end > begin:
            matrix.copy_(product(a[begin:end].t(), b[begin:end]))
        begin = end
    return out


@torch.library.custom_op("espalier::grouped_product", mutates_args=())
def _traced_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return _product(a, b, ends)


@_traced_product.register_fake
def _(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[2])


@torch.library.custom_op("espalier::grouped_outer", mutates_args=())
def _traced_outer(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return _outer(a, b, ends)


@_traced_outer.register_fake
def _(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return a.new_empty(len(ends), a.shape[1], b.shape[1])

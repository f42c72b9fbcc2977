"""Matrix products in at least fp32; on processors where bf16 products are slower than fp32's (dispatch.py) those of
bf16 matrices of 16 rows or more run in fp32, on the same inputs made wider.

Everywhere else, and for every other dtype, these functions are PyTorch's own.

M rows, K summed, N columns.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from models.cpu import dispatch

WIDENED_ROWS = 16  # from which making the weights wider costs less than the bf16 product


def widens(a: Tensor, b: Tensor) -> bool:
    """Whether a (M, K) @ b (K, N) runs in fp32 though both are bf16.

    Both have to be in this machine's memory: no subclass, whose data may lie elsewhere (DTensor).
    """
    return (
        dispatch.WIDENS_BF16
        and a.shape[0] >= WIDENED_ROWS
        and all(
            matrix.dtype == torch.bfloat16 and matrix.device.type == "cpu" and type(matrix) in (Tensor, nn.Parameter)
            for matrix in (a, b)
        )
    )


def product(a: Tensor, b: Tensor, *, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    """a (M, K) @ b (K, N) in at least fp32, computed in the dtype of a and b. Not differentiable.

    Args:
        a, b: of one dtype, in any layout.
        out: (M, N) contiguous, fp32 (fp64 for fp64 inputs), that takes the result.
        accumulate: add the result to `out`.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    if widens(a, b):
        a, b = a.float(), b.float()
    if a.dtype == wide:
        if accumulate:
            return out.addmm_(a, b)
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    result = torch.mm(a, b)
    if out is None:
        return result.to(wide)
    return out.add_(result) if accumulate else out.copy_(result)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, autocast included: x (..., K), weight (N, K), bias (N,) -> (..., N)."""
    if not dispatch.WIDENS_BF16 or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    rows = x.reshape(-1, x.shape[-1])  # (M, K)
    if not widens(rows, weight) or not x.numel():
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        y = _Linear.apply(rows, weight)
    else:
        y = product(rows, weight.t()).to(x.dtype)
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


class _Linear(torch.autograd.Function):
    """Three products, what is rounded to bf16 around which torch.compile fuses."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight.t()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dx = product(gradient, weight).to(x.dtype) if ctx.needs_input_grad[0] else None
        dw = product(gradient.t(), x).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return dx, dw

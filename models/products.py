"""Matrix products in bf16 with fp32 results, on processors where PyTorch's own are slower than fp32's (models/cpu.py).

Where oneDNN cannot use AMX, they fall back to vector instructions, at a seventh of AMX's rate. The x86 builds of
PyTorch also contain MKL, which sets its tiles up by itself, and export its documented C interface:
`cblas_gemm_bf16bf16f32` (oneMKL Developer Reference). So a bf16 product goes there: the same inputs, products summed
in fp32, and the sum is not rounded.

Where the processor has no bf16 instructions, oneDNN emulates them at a fifth of fp32's rate. There a product of 16 rows
or more runs in fp32, on the same inputs made wider: 3.3 times as fast at 256 x 2048 x 2048 on one core with AVX-512.

Everywhere else, and for every other dtype, these functions are PyTorch's own.

M rows, K summed, N columns.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from models.cpu import has_bf16, isa_cap, read_cpuinfo

ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112  # values of the CBLAS enumerations
WIDENED_ROWS = 16  # from which making the weights wider costs less than the emulated product


def _find_gemm() -> Callable[..., None] | None:
    """MKL's bf16 product where it is needed and there, and computes what it should."""
    if isa_cap(read_cpuinfo()) is None:
        return None
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        gemm = ctypes.CDLL(str(library)).cblas_gemm_bf16bf16f32
    except (OSError, AttributeError):
        return None
    size, pointer, scalar = ctypes.c_int, ctypes.c_void_p, ctypes.c_float
    gemm.argtypes = [size] * 6 + [scalar, pointer, size, pointer, size, scalar, pointer, size]
    gemm.restype = None
    a = torch.arange(6.0).view(2, 3).bfloat16()
    b = torch.arange(12.0).view(3, 4).bfloat16()
    return gemm if torch.equal(_call(gemm, a, b, torch.empty(2, 4), 0.0), a.float() @ b.float()) else None


def _layout(matrix: Tensor) -> tuple[Tensor, int, int]:
    """The matrix in a layout that BLAS reads, whether that is transposed, and its leading dimension."""
    rows, columns = matrix.shape
    if matrix.stride(1) == 1 and matrix.stride(0) >= columns:
        return matrix, PLAIN, matrix.stride(0)
    if matrix.stride(0) == 1 and matrix.stride(1) >= rows:
        return matrix, TRANSPOSED, matrix.stride(1)
    return matrix.contiguous(), PLAIN, max(1, columns)


def _call(gemm: Callable[..., None], a: Tensor, b: Tensor, out: Tensor, beta: float) -> Tensor:
    """out = a @ b + beta * out, for a (M, K) and b (K, N) bf16 and out (M, N) fp32 with contiguous rows."""
    (m, k), n = a.shape, b.shape[1]
    a, a_order, a_step = _layout(a)
    b, b_order, b_step = _layout(b)
    pointers = a.data_ptr(), b.data_ptr(), out.data_ptr()
    gemm(ROW_MAJOR, a_order, b_order, m, n, k, 1.0, pointers[0], a_step, pointers[1], b_step, beta, pointers[2], n)
    return out


def _choose_route() -> str:
    """Through what bf16 products run fastest here: `mkl`, `widened` to fp32, or PyTorch's own (`torch`)."""
    if _GEMM is not None:
        return "mkl"
    cpuinfo = read_cpuinfo()
    native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "torch" if native and (has_bf16(cpuinfo) or not cpuinfo) else "widened"


_GEMM = _find_gemm()
ROUTE = _choose_route()


def takes(a: Tensor, b: Tensor) -> bool:
    """Whether a (M, K) @ b (K, N) runs through a route of this module.

    Both have to be bf16 in this machine's memory: no subclass, whose data may lie elsewhere (DTensor).
    """
    if ROUTE == "torch" or (ROUTE == "widened" and a.shape[0] < WIDENED_ROWS):
        return False
    return all(
        matrix.dtype == torch.bfloat16 and matrix.device.type == "cpu" and type(matrix) in (Tensor, nn.Parameter)
        for matrix in (a, b)
    )


def product(a: Tensor, b: Tensor, *, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    """a (M, K) @ b (K, N) in at least fp32, computed in the dtype of a and b. Not differentiable.

    Args:
        a, b: of one dtype, in any layout.
        out: (M, N) contiguous, fp32 (fp64 for fp64 inputs), that takes the result.
        accumulate: add the result to `out`.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    if takes(a, b) and a.numel() and b.numel():
        if ROUTE == "mkl":
            if torch.compiler.is_compiling():
                return _traced_product(a, b)
            out = a.new_empty(a.shape[0], b.shape[1], dtype=wide) if out is None else out
            return _call(_GEMM, a, b, out, float(accumulate))
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
    if ROUTE == "torch" or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    rows = x.reshape(-1, x.shape[-1])  # (M, K)
    if not takes(rows, weight) or not x.numel():
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        y = _Linear.apply(rows, weight)
    else:
        y = product(rows, weight.t()).to(x.dtype)
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias


def attention_dtype(q: Tensor) -> torch.dtype:
    """The dtype in which scaled dot-product attention should run for queries q: theirs, with one exception.

    Without bf16 products of its own, the backward of PyTorch's CPU kernel takes at least twice as long in bf16 as in
    fp32 (65 against 30 ms for 64 heads of 256 tokens and 64 channels, on one core whose AMX oneDNN cannot use; 111
    against 33 ms on one without bf16 instructions), more than the forward saves (8 against 14, and 12 against 14 ms).
    """
    bf16 = ROUTE != "torch" and q.device.type == "cpu" and q.dtype == torch.bfloat16
    trains = bf16 and type(q) in (Tensor, nn.Parameter) and q.requires_grad and torch.is_grad_enabled()
    return torch.float32 if trains else q.dtype


@torch.library.custom_op("espalier::bf16_product", mutates_args=(), device_types="cpu")
def _traced_product(a: Tensor, b: Tensor) -> Tensor:
    return _call(_GEMM, a, b, a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32), 0.0)


@_traced_product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.float32)


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

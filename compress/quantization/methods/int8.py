"""8-bit weights times inputs that are rounded to 8 bits as they come: LLM.int8 (arXiv 2208.07339), and W8A8.

The product is one of integers on every device, by `int8_kernels.eager_product` where the table has no kernel: what is
measured is what runs, in every dtype. Where a gradient is asked for, the forward is the same, and the gradient of the
input is that of the dense product (straight through).

N outputs, K inputs, B rows of x.
"""

import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from compress.calibration.records import LayerRecord
from compress.calibration.statistics import Statistic
from compress.quantization.formats.packed import PackedLinear
from compress.quantization.kernels import int8 as int8_kernels
from compress.quantization.kernels.dispatch import Choice
from compress.quantization.kernels.int8 import ACTIVATIONS, Int8Format, Outliers, Rows
from compress.quantization.methods.rtn import bits_per_weight, checked_weight, relative_error
from compress.quantization.quantizer import METHODS, Quantizer, requested
from models.registry import read_dataclass


class Int8Weights(NamedTuple):
    """A weight matrix in 8 bits."""

    rows: Rows
    format: Int8Format


class Int8Linear(PackedLinear):
    """`nn.Linear` of 8-bit weights and 8-bit inputs. Buffers: `codes` (N, K) int8, `absmax` (N,) fp32."""

    def __init__(
        self, rows: int, width: int, format: Int8Format, bias: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(rows, width, format, bias, dtype)
        self.register_buffer("codes", torch.empty(rows, width, dtype=torch.int8))
        self.register_buffer("absmax", torch.empty(rows))

    @staticmethod
    def read_format(spec: dict[str, Any]) -> Int8Format:
        return read_dataclass(Int8Format, spec, "8-bit weights")

    def fill(self, quantized: Int8Weights) -> None:
        self.codes, self.absmax = quantized.rows

    def dense(self, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        return Rows(self.codes[start:stop], self.absmax[start:stop]).dequantize().to(dtype)

    def stored_bytes(self) -> int:
        return self.shape[0] * (self.shape[1] + 4)

    def choice(self, device: str, batch: int, dtype: torch.dtype) -> Choice:
        chosen = super().choice(device, batch, dtype)
        return chosen if chosen.kernel else chosen._replace(name="integers as fp64, then matmul")

    def multiply(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        flat = x.reshape(-1, self.shape[1])  # (B, K)
        return _StraightThrough.apply(flat, self, self._kernel(device, 1, x.dtype)).view(*x.shape[:-1], self.shape[0])


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, layer: Int8Linear, kernel: Any) -> Tensor:
        ctx.layer = layer
        return int8_kernels.multiply(x, Rows(layer.codes, layer.absmax), layer.format.activations, kernel)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.layer.dense(gradient.dtype, 0, ctx.layer.shape[0]), None, None


@METHODS.register("int8")
@dataclass(frozen=True)
class Int8(Quantizer):
    """Round weights to 8 bits, one scale a row, and inputs as they come. Needs no data.

    Args:
        activations: `dynamic` (all inputs in 8 bits), or `outliers` (those from a `threshold` on stay in 16 bits).
    """

    activations: Any = field(default=Outliers(), metadata={"registry": ACTIVATIONS})

    def compress(self, name: str, module: nn.Module, statistic: Statistic | None) -> tuple[nn.Module, LayerRecord]:
        started = time.perf_counter()
        weight = checked_weight(name, module)
        new = Int8Linear.of(module, Int8Weights(int8_kernels.quantize_rows(weight), Int8Format(self.activations)))
        achieved = {"bits": bits_per_weight(new), "error_of": "weights"}
        error, seconds = relative_error(weight, new.dequantize()), time.perf_counter() - started
        return new, LayerRecord(name, tuple(weight.shape), requested(self), achieved, error, seconds)

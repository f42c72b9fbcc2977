"""8-bit floats (e4m3) as weights, one scale a row, and as inputs where the method says so (arXiv 2209.05433).

GPUs from compute capability 8.9 on multiply them as they are. On every other device the weights, and with `dynamic`
activations the inputs, are rounded to e4m3 all the same and multiplied as what they stand for: the numbers of the
kernel but for the order of its sums, at the speed of an unpacked layer. Where a gradient is asked for, inputs are not
rounded.

N outputs, K inputs, B rows of x.
"""

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compress.calibration.records import LayerRecord
from compress.calibration.statistics import Statistic
from compress.quantization.formats.packed import PackedLinear
from compress.quantization.kernels.fp8 import FP8, Fp8Format, Rows, ScaledMm, quantize_rows
from compress.quantization.methods.rtn import bits_per_weight, checked_weight, relative_error
from compress.quantization.quantizer import METHODS, Quantizer, requested
from models.registry import read_dataclass


class Fp8Weights(NamedTuple):
    """A weight matrix in e4m3."""

    rows: Rows
    format: Fp8Format


class Fp8Linear(PackedLinear):
    """`nn.Linear` of e4m3 weights. Buffers: `codes` (N, K) e4m3, `scales` (N,) fp32."""

    def __init__(
        self, rows: int, width: int, format: Fp8Format, bias: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(rows, width, format, bias, dtype)
        self.register_buffer("codes", torch.empty(rows, width, dtype=FP8))
        self.register_buffer("scales", torch.empty(rows))

    @staticmethod
    def read_format(spec: dict[str, Any]) -> Fp8Format:
        return read_dataclass(Fp8Format, spec, "fp8 weights")

    def fill(self, quantized: Fp8Weights) -> None:
        self.codes, self.scales = quantized.rows

    def dense(self, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        return Rows(self.codes[start:stop], self.scales[start:stop]).dequantize().to(dtype)

    def stored_bytes(self) -> int:
        return self.shape[0] * (self.shape[1] + 4)

    def repack(self, kernel: ScaledMm) -> None:
        self.kernel = kernel  # which reads the layout that is stored

    def run(self, kernel: ScaledMm, x: Tensor) -> Tensor:
        return kernel.multiply(quantize_rows(x), Rows(self.codes, self.scales), x.dtype)

    def unpacked(self, x: Tensor) -> Tensor:
        if self.format.activations == "dynamic":
            x = quantize_rows(x).dequantize().to(x.dtype)
        return super().unpacked(x)


@METHODS.register("fp8")
@dataclass(frozen=True)
class Fp8(Quantizer):
    """Round weights to 8-bit floats, one scale a row. Needs no data.

    Args:
        activations: `dynamic` rounds inputs to 8-bit floats as they come, `none` leaves them in 16 bits.
    """

    activations: str = "dynamic"

    def __post_init__(self) -> None:
        Fp8Format(self.activations)

    def compress(self, name: str, module: nn.Module, statistic: Statistic | None) -> tuple[nn.Module, LayerRecord]:
        started = time.perf_counter()
        weight = checked_weight(name, module)
        new = Fp8Linear.of(module, Fp8Weights(quantize_rows(weight), Fp8Format(self.activations)))
        achieved = {"bits": bits_per_weight(new), "error_of": "weights"}
        error, seconds = relative_error(weight, new.dequantize()), time.perf_counter() - started
        return new, LayerRecord(name, tuple(weight.shape), requested(self), achieved, error, seconds)

"""NF4 (QLoRA, arXiv 2305.14314): 4-bit codes on the quantiles of a normal distribution, as `bitsandbytes` has them.

`nf4_kernels.py` says how the weights lie. The products run through the package where it has a kernel for the device;
without it, and for every other dtype, the weights are unpacked exactly.

N outputs (or vocabulary), K inputs (or width), n blocks.
"""

import time
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from compress.calibration.records import LayerRecord
from compress.calibration.statistics import Statistic
from compress.quantization.formats.packed import Packed, PackedEmbedding, PackedLinear
from compress.quantization.kernels import nf4 as nf4_kernels
from compress.quantization.kernels.nf4 import OUTER, Absmax, Nf4Format
from compress.quantization.methods.rtn import bits_per_weight, checked_weight, relative_error
from compress.quantization.quantizer import METHODS, Quantizer, requested
from models.registry import read_dataclass


class Nf4Weights(NamedTuple):
    """A weight matrix in NF4: codes (ceil(N K / 2),) uint8, and the largest values of its blocks."""

    codes: Tensor
    absmax: Absmax
    format: Nf4Format


class PackedNf4(Packed):
    """A matrix (N, K) in NF4.

    Buffers: `codes` (ceil(N K / 2),) uint8, `absmax` (n,) fp32, or, quantized themselves, (n,) uint8 with `scales`
    (ceil(n / 256),) and `mean` () in fp32.
    """

    def __init__(self, rows: int, width: int, format: Nf4Format, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(rows, width, format, dtype)
        blocks, double = format.blocks(rows, width), format.double_quantization
        self.register_buffer("codes", torch.empty(-(-rows * width // 2), dtype=torch.uint8))
        self.register_buffer("absmax", torch.empty(blocks, dtype=torch.uint8 if double else torch.float32))
        if double:
            self.register_buffer("scales", torch.empty(-(-blocks // OUTER)))
            self.register_buffer("mean", torch.empty(()))

    @staticmethod
    def read_format(spec: dict[str, Any]) -> Nf4Format:
        return read_dataclass(Nf4Format, spec, "NF4 weights")

    def fill(self, quantized: Nf4Weights) -> None:
        self.as_stored()
        self.codes, self.absmax = quantized.codes, quantized.absmax.values
        if self.format.double_quantization:
            self.scales, self.mean = quantized.absmax.scales, quantized.absmax.mean

    def largest(self) -> Absmax:
        """The largest absolute value of each block."""
        return Absmax(self.absmax, *((self.scales, self.mean) if self.format.double_quantization else ()))

    def dense(self, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        width, block = self.shape[1], self.format.block_size
        shape, first = (stop - start, width), start * width
        if first % block or first % 2:  # the rows begin inside a block: unpack all that is before them too
            return self.dense(dtype, 0, stop)[start:]
        absmax = self.largest().dequantize(first // block, -(-stop * width // block))
        if self.held is not None:
            codes = self.kernel.restore(self.held, start, stop, width)
        else:
            codes = self.codes[first // 2 : -(-stop * width // 2)]
        return nf4_kernels.fast_dequantize(codes, absmax, block, shape, dtype)

    def rows(self, index: Tensor) -> Tensor:
        width = self.shape[1]
        held = self.held is not None
        codes = self.kernel.codes(self.held, index, width) if held else nf4_kernels.pick(self.codes, index, width)
        place = index[:, None] * width + torch.arange(width, device=index.device)  # (n, K) among all weights
        absmax = self.largest().dequantize()[place // self.format.block_size]
        return (nf4_kernels.levels(index.device)[codes.int()] * absmax).to(self.dtype)

    def stored_bytes(self) -> int:
        blocks, codes = self.format.blocks(*self.shape), -(-self.shape[0] * self.shape[1] // 2)
        return codes + (blocks + 4 * -(-blocks // OUTER) + 4 if self.format.double_quantization else 4 * blocks)

    def repack(self, kernel: Any) -> None:
        self.as_stored()
        self.held = kernel.repack(self.codes, self.largest().dequantize(), self.format, self.shape)
        self.kernel, self.codes = kernel, None

    def as_stored(self) -> None:
        if self.held is not None:
            self.codes = self.kernel.restore(self.held, 0, *self.shape)
            self.kernel = self.held = None

    def run(self, kernel: Any, x: Tensor) -> Tensor:
        return kernel.multiply(x, self.held, self.format, self.shape[0])


class Nf4Linear(PackedLinear, PackedNf4):
    """`nn.Linear` in NF4."""


class Nf4Embedding(PackedEmbedding, PackedNf4):
    """`nn.Embedding` in NF4."""


@METHODS.register("nf4")
@dataclass(frozen=True)
class Nf4(Quantizer):
    """Round to the nearest level of NF4. Needs no data.

    Args:
        block_size: weights that share a largest absolute value: 32, 64, 128, ... 4096.
        double_quantization: store those values in 8 bits too: 4.13 bits a weight instead of 4.5.
    """

    embedding_bits: ClassVar[tuple[int, ...]] = (4,)

    block_size: int = 64
    double_quantization: bool = False

    def __post_init__(self) -> None:
        Nf4Format(self.block_size, self.double_quantization)

    def compress(self, name: str, module: nn.Module, statistic: Statistic | None) -> tuple[nn.Module, LayerRecord]:
        started = time.perf_counter()
        weight = checked_weight(name, module)
        format = Nf4Format(self.block_size, self.double_quantization)
        kind = Nf4Embedding if isinstance(module, nn.Embedding) else Nf4Linear
        new = kind.of(module, Nf4Weights(*nf4_kernels.quantize(weight, format), format))
        achieved = {"bits": bits_per_weight(new), "error_of": "weights"}
        error, seconds = relative_error(weight, new.dequantize()), time.perf_counter() - started
        odd = weight.numel() % self.block_size
        note = f"blocks of {self.block_size} do not divide {weight.numel()} weights: the last has {odd}" if odd else ""
        return new, LayerRecord(name, tuple(weight.shape), requested(self), achieved, error, seconds, note)

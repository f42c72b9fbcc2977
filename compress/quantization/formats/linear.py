"""The layers that hold packed integers and run them (see `packed.py`): in place of `nn.Linear` and of `nn.Embedding`.

N outputs (or vocabulary), K inputs (or width), G groups a row.
"""

from typing import Any

import torch
from torch import Tensor

from compress.quantization.affine import IntFormat, Quantized, dequantize
from compress.quantization.formats.bit_packing import pack, packed_bytes, unpack
from compress.quantization.formats.packed import Packed, PackedEmbedding, PackedLinear
from compress.quantization.kernels.packed_int import IntKernel
from models.registry import read_dataclass


class PackedInt(Packed):
    """Integer codes of a matrix (N, K), packed at their true size.

    Buffers: `codes` (N, packed_bytes(K)) uint8, `scales` (N, G) or (1, 1), and for an affine grid `zeros`
    (N or 1, packed_bytes(G)) uint8.
    """

    def __init__(self, rows: int, width: int, format: IntFormat, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(rows, width, format, dtype)
        scales = format.scales_shape(rows, width)
        self.register_buffer("codes", torch.empty(rows, packed_bytes(width, format.bits), dtype=torch.uint8))
        self.register_buffer("scales", torch.empty(scales, dtype=format.dtype))
        if not format.symmetric:
            zeros = torch.empty(scales[0], packed_bytes(scales[1], format.bits), dtype=torch.uint8)
            self.register_buffer("zeros", zeros)

    @staticmethod
    def read_format(spec: dict[str, Any]) -> IntFormat:
        return read_dataclass(IntFormat, spec, "packed integers")

    def fill(self, quantized: Quantized) -> None:
        self.as_stored()
        self.codes = pack(quantized.codes, self.format.bits)
        self.scales = quantized.scales.contiguous()
        if quantized.zeros is not None:
            self.zeros = pack(quantized.zeros, self.format.bits)

    def quantized(self, start: int = 0, stop: int | None = None) -> Quantized:
        """The weights on their grid, unpacked: the rows from `start` (a multiple of 64) to `stop`, or all."""
        count, width = self.shape
        stop = count if stop is None else stop
        zeros = self._zeros(slice(start, stop))
        if self.held is None:
            codes = unpack(self.codes[start:stop], self.format.bits, width)
            scales = self.scales if len(self.scales) == 1 else self.scales[start:stop]
            return Quantized(codes, scales, zeros, self.format)
        held = self.held if (start, stop) == (0, count) else self.kernel.part(self.held, start, stop)
        return Quantized(*self.kernel.restore(held, zeros, self.format, (stop - start, width)), zeros, self.format)

    def dense(self, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        return dequantize(*self.quantized(start, stop), dtype=dtype)

    def rows(self, index: Tensor) -> Tensor:
        zeros = self._zeros(index)
        if self.held is None:
            codes = unpack(self.codes[index], self.format.bits, self.shape[1])  # (n, K)
            scales = self.scales if len(self.scales) == 1 else self.scales[index]
        else:
            codes, scales = self.kernel.pick(self.held, zeros, self.format, self.shape[1], index)
        return dequantize(codes, scales, zeros, self.format, self.dtype)

    def stored_bytes(self) -> int:
        rows, width = self.shape
        scales = self.format.scales_shape(rows, width)
        zeros = 0 if self.format.symmetric else scales[0] * packed_bytes(scales[1], self.format.bits)
        return rows * packed_bytes(width, self.format.bits) + scales[0] * scales[1] * self.format.dtype.itemsize + zeros

    def repack(self, kernel: IntKernel) -> None:
        quantized = self.quantized()
        self.held = kernel.repack(quantized.codes, quantized.scales, quantized.zeros, self.format)
        self.kernel, self.codes, self.scales = kernel, None, None

    def as_stored(self) -> None:
        if self.held is not None:
            quantized = self.quantized()
            self.kernel = self.held = None
            self.codes = pack(quantized.codes, self.format.bits)
            self.scales = quantized.scales.contiguous()

    def _zeros(self, index: slice | Tensor) -> Tensor | None:
        """Zero points (n or 1, G) of some rows."""
        if self.format.symmetric:
            return None
        zeros = self.zeros if len(self.zeros) == 1 else self.zeros[index]
        return unpack(zeros, self.format.bits, self.format.scales_shape(*self.shape)[1])


class PackedIntLinear(PackedLinear, PackedInt):
    """`nn.Linear` of packed integers."""


class PackedIntEmbedding(PackedEmbedding, PackedInt):
    """`nn.Embedding` of packed integers."""

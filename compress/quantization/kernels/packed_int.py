"""PyTorch's kernels for packed integers: 2-, 3- and 4-bit codes as 4-bit ones, and 8-bit ones, on CPU and on CUDA.

A kernel holds the weights in a layout of its own, in place of the stored one, and gives the stored one back exactly.
All take x in bf16 and need scales that are stored in bf16; their weights equal `dequantize()` to the bit, except for
4-bit affine grids, whose offsets (8 - zero) * scale are rounded to bf16. The CUDA ones are written to PyTorch's sources
and have not been run on a GPU.

B rows of x, N outputs, K inputs, g columns of a kernel's group.
"""

from dataclasses import dataclass
from functools import cache
from typing import ClassVar, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.quantization.affine import IntFormat
from models.cpu.dispatch import WIDENS_BF16
from models.cpu.features import read_cpuinfo

GROUPS = (256, 128, 64, 32)  # those that the int4 kernels know, on CPU and on CUDA
AMX = "amx_bf16" in read_cpuinfo()  # then dense products are faster, and these kernels are not
INT8_CPU_ROWS = 96 if WIDENS_BF16 else 32  # without bf16 instructions the dense product takes longer
BF16 = (torch.bfloat16,)
CENTRE = 8  # the int4 kernels compute (code - 8) * scale + offset


class IntWeights(NamedTuple):
    """Weights in the layout of a kernel: `packed`, and in `grid` what stands for the scales."""

    packed: Tensor
    grid: Tensor


class IntKernel(Protocol):
    """A row of `kernels.TABLE` for packed integers."""

    def repack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None, format: IntFormat) -> IntWeights:
        """Codes (N, K), scales and zeros (N, G) or (1, 1) in the kernel's layout."""

    def restore(
        self, held: IntWeights, zeros: Tensor | None, format: IntFormat, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """The inverse: codes (N, K) and scales."""

    def pick(
        self, held: IntWeights, zeros: Tensor | None, format: IntFormat, width: int, index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`restore` for the rows `index` (n,), whose `zeros` are given: codes (n, K), scales (n, G) or (1, 1)."""

    def part(self, held: IntWeights, start: int, stop: int) -> IntWeights:
        """The rows from `start`, a multiple of 64, to `stop`, a multiple of 64 or the end."""

    def multiply(self, x: Tensor, held: IntWeights, rows: int) -> Tensor:
        """x (B, K) bf16 times the transposed weights: (B, N) bf16."""


def kernel_group(format: IntFormat, width: int) -> int | None:
    """The int4 kernels' group for this form: the largest that divides its groups, or pads a whole row least."""
    if format.group(width) == width:
        return min(GROUPS, key=lambda g: -(-width // g) * g)
    return next((g for g in GROUPS if format.group_size % g == 0), None)


def _scales_of(values: Tensor, format: IntFormat, width: int, g: int) -> Tensor:
    """One value a kernel group, (N, ceil(K / g)) of (N, G) or (1, 1)."""
    groups = -(-width // g)
    if values.shape[1] == 1:
        return values.expand(-1, groups)
    return values.repeat_interleave(format.group_size // g, dim=1)[:, :groups]


def _scales_back(values: Tensor, format: IntFormat, width: int) -> Tensor:
    """The inverse of `_scales_of` for rows (n, ceil(K / g)): (n, G), or (1, 1)."""
    if format.group_size == "tensor":
        return values[:1, :1]
    groups = format.scales_shape(1, width)[1]
    return values[:, :: format.group_size // kernel_group(format, width)] if groups > 1 else values[:, :1]


def _int4_grid(codes: Tensor, scales: Tensor, zeros: Tensor | None, format: IntFormat) -> tuple[Tensor, Tensor]:
    """Codes (N, K'), `scales and offsets` (K' / g, N, 2) bf16: rows as they are, columns padded to groups."""
    rows, width = codes.shape
    g = kernel_group(format, width)
    scales = _scales_of(scales.expand(rows, -1), format, width, g)  # (N, K' / g)
    offsets = torch.zeros_like(scales)
    codes = codes.int()
    shift = _shift(zeros, format, width)
    if shift is None:
        zero = _scales_of(zeros.expand(rows, -1), format, width, g).float()
        offsets = ((CENTRE - zero) * scales.float()).to(scales.dtype)
    else:
        codes = codes + shift
    codes = F.pad(codes, (0, -width % g), value=CENTRE)
    return codes, torch.stack([scales, offsets], dim=-1).transpose(0, 1).contiguous()


def _shift(zeros: Tensor | None, format: IntFormat, width: int) -> Tensor | int | None:
    """Shift that moves each code's zero to 8; None for 4-bit affine codes, which have no room for it."""
    if zeros is None:
        return CENTRE - 2 ** (format.bits - 1)
    if format.bits == 4:
        return None
    zeros = zeros if zeros.shape[1] == 1 else zeros.repeat_interleave(format.group_size, dim=1)[:, :width]
    return CENTRE - zeros.int()


def _unshift(codes: Tensor, zeros: Tensor | None, format: IntFormat) -> Tensor:
    shift = _shift(zeros, format, codes.shape[1])
    return codes if shift is None else (codes.short() - shift).to(torch.uint8)


def _no_int4(format: IntFormat, width: int) -> str:
    """Why a 4-bit kernel cannot run this form; empty when it can."""
    if format.bits > 4:
        return f"{format.bits}-bit codes do not fit the 4-bit kernel"
    if kernel_group(format, width) is None:
        return f"the 4-bit kernel takes groups of a multiple of 32, not of {format.group_size}"
    return "" if format.scale_dtype == "bfloat16" else f"the kernels need bfloat16 scales, not {format.scale_dtype}"


@dataclass(frozen=True)
class Int4Cpu:
    """2-, 3- and 4-bit codes as 4-bit ones on the CPU, columns padded to groups and rows to 64."""

    name: str = "aten::_weight_int4pack_mm_for_cpu"
    device: str = "cpu"
    largest_batch: int = 48 if AMX else 128
    picks: bool = True
    format: ClassVar[type] = IntFormat
    dtypes: ClassVar[tuple[torch.dtype, ...]] = BF16

    def refuses(self, format: IntFormat, rows: int, width: int) -> str:
        unknown = "" if _cpu_layout() else "this processor's layout of the 4-bit kernel is not known"
        return _no_int4(format, width) or unknown

    def repack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None, format: IntFormat) -> IntWeights:
        codes, grid = _int4_grid(codes, scales, zeros, format)
        more = -codes.shape[0] % 64
        codes = F.pad(codes, (0, 0, 0, more), value=CENTRE)  # (N', K')
        grid = F.pad(grid, (0, 0, 0, more)).contiguous()  # (K' / g, N', 2)
        return IntWeights(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1), grid)

    def restore(
        self, held: IntWeights, zeros: Tensor | None, format: IntFormat, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        rows, width = shape
        codes = _cpu_unpack(held.packed, *_cpu_layout())[:rows, :width]
        scales = held.grid[:, :rows, 0].contiguous().T  # (N, K' / g), which lies as the codes do
        return _unshift(codes, zeros, format), _scales_back(scales, format, width)

    def pick(
        self, held: IntWeights, zeros: Tensor | None, format: IntFormat, width: int, index: Tensor
    ) -> tuple[Tensor, Tensor]:
        block, halves = _cpu_layout()
        place = index % block
        byte = place % (block // 2) if halves else place // 2
        high = place >= block // 2 if halves else place % 2 == 1
        tiles = held.packed.view(-1, held.packed.shape[1] * 2, block // 2)  # (N' / block, K', block / 2)
        both = tiles[index // block, :, byte]  # (n, K')
        codes = torch.where(high[:, None], both >> 4, both & 15)[:, :width]
        return _unshift(codes, zeros, format), _scales_back(held.grid[:, index, 0].T, format, width)

    def part(self, held: IntWeights, start: int, stop: int) -> IntWeights:
        stop += -stop % 64  # what pads the rows goes along, as `restore` expects
        return IntWeights(held.packed[start:stop], held.grid[:, start:stop])

    def multiply(self, x: Tensor, held: IntWeights, rows: int) -> Tensor:
        padded = held.packed.shape[1] * 2
        if padded != x.shape[1]:
            x = F.pad(x, (0, padded - x.shape[1]))
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, held.packed, padded // held.grid.shape[0], held.grid)
        return y[:, :rows]


def _cpu_unpack(packed: Tensor, block: int, halves: bool) -> Tensor:
    """Codes (N', K') uint8 of the CPU kernel's bytes: tiles of `block` rows, column by column, two rows to a byte.

    A byte holds rows j and j + block / 2 of its tile (`halves`), or rows 2 j and 2 j + 1, the first in its low bits.
    The result lies column by column, as the bytes do: that order costs a fifth of the other.
    """
    rows, width = packed.shape[0], packed.shape[1] * 2
    tiles = packed.view(rows // block, width, block // 2).transpose(0, 1)  # (K', tiles, block / 2)
    codes = packed.new_empty(width, rows // block, *((2, block // 2) if halves else (block // 2, 2)))
    low, high = codes.unbind(2 if halves else 3)
    low.copy_(tiles & 15)
    high.copy_(tiles >> 4)
    return codes.view(width, rows).T


@cache
def _cpu_layout() -> tuple[int, bool] | None:
    """(block, halves) of the layout on this processor, found by trying; None where no known one fits."""
    codes = torch.arange(64 * 32).view(64, 32).mul(7).div(3, rounding_mode="floor").remainder(16).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    for block in (64, 32, 16):
        for halves in (True, False):
            if torch.equal(_cpu_unpack(packed, block, halves).int(), codes):
                return block, halves
    return None


@dataclass(frozen=True)
class Int8:
    """Symmetric 8-bit codes, one scale a row, columns padded to 16: at other widths the CPU kernel reads astray."""

    name: str = "aten::_weight_int8pack_mm"
    device: str = "cpu"
    largest_batch: int = 32
    picks: bool = True
    format: ClassVar[type] = IntFormat
    dtypes: ClassVar[tuple[torch.dtype, ...]] = BF16

    def refuses(self, format: IntFormat, rows: int, width: int) -> str:
        if format.bits != 8:
            return f"the 8-bit kernel reads no {format.bits}-bit codes"
        if not format.symmetric:
            return "the 8-bit kernel knows no zero points"
        if format.group(width) != width:
            return "the 8-bit kernel takes one scale a row (group_size: channel)"
        return "" if format.scale_dtype == "bfloat16" else f"the kernels need bfloat16 scales, not {format.scale_dtype}"

    def repack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None, format: IntFormat) -> IntWeights:
        rows, width = codes.shape
        signed = (codes ^ 128).view(torch.int8)
        return IntWeights(F.pad(signed, (0, -width % 16)).contiguous(), scales.expand(rows, 1)[:, 0].contiguous())

    def restore(
        self, held: IntWeights, zeros: Tensor | None, format: IntFormat, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        scales = held.grid[:1, None] if format.group_size == "tensor" else held.grid[:, None]
        return held.packed[:, : shape[1]].view(torch.uint8) ^ 128, scales

    def pick(
        self, held: IntWeights, zeros: Tensor | None, format: IntFormat, width: int, index: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.restore(IntWeights(held.packed[index], held.grid[index]), zeros, format, (len(index), width))

    def part(self, held: IntWeights, start: int, stop: int) -> IntWeights:
        return IntWeights(held.packed[start:stop], held.grid[start:stop])

    def multiply(self, x: Tensor, held: IntWeights, rows: int) -> Tensor:
        if held.packed.shape[1] != x.shape[1]:
            x = F.pad(x, (0, held.packed.shape[1] - x.shape[1]))
        return torch.ops.aten._weight_int8pack_mm(x.contiguous(), held.packed, held.grid)


@dataclass(frozen=True)
class Int4Cuda:
    """2-, 3- and 4-bit codes as 4-bit ones on CUDA (compute capability 8.0 on), columns padded to groups, rows to 8.

    How a GPU's layout orders the codes is left to the kernel: `restore` multiplies with the identity, whose products
    (code - 8) * 1 + 8 are exact in bf16. That costs as much as K rows of x, and it gives no single rows back.
    """

    name: str = "aten::_weight_int4pack_mm"
    device: str = "cuda"
    largest_batch: int = 4096
    picks: bool = False
    format: ClassVar[type] = IntFormat
    dtypes: ClassVar[tuple[torch.dtype, ...]] = BF16

    def refuses(self, format: IntFormat, rows: int, width: int) -> str:
        if reason := _no_int4(format, width):
            return reason
        old = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)
        return "the 4-bit kernel needs compute capability 8.0" if old else ""

    def repack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None, format: IntFormat) -> IntWeights:
        codes, grid = _int4_grid(codes, scales, zeros, format)
        more = -codes.shape[0] % 8
        codes = F.pad(codes, (0, 0, 0, more), value=CENTRE).to(torch.uint8)  # (N', K')
        grid = F.pad(grid, (0, 0, 0, more)).contiguous()  # (K' / g, N', 2)
        tiles = next(tiles for tiles in (8, 4, 2) if codes.shape[1] % (16 * tiles) == 0)
        pairs = (codes[:, ::2] << 4) | codes[:, 1::2]  # (N', K' / 2)
        return IntWeights(torch.ops.aten._convert_weight_to_int4pack(pairs.contiguous(), tiles), grid)

    def restore(
        self, held: IntWeights, zeros: Tensor | None, format: IntFormat, shape: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        rows, width = shape
        plain = torch.ones_like(held.grid)
        plain[..., 1] = CENTRE
        identity = torch.eye(width, dtype=torch.bfloat16, device=held.grid.device)
        codes = self.multiply(identity, IntWeights(held.packed, plain), rows).to(torch.uint8).T  # (N, K)
        return _unshift(codes, zeros, format), _scales_back(held.grid[:, :rows, 0].contiguous().T, format, width)

    def pick(
        self, held: IntWeights, zeros: Tensor | None, format: IntFormat, width: int, index: Tensor
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("this layout gives no single rows back; `picks` says so")

    def part(self, held: IntWeights, start: int, stop: int) -> IntWeights:
        raise NotImplementedError("how this layout orders its rows is left to the kernel")

    def multiply(self, x: Tensor, held: IntWeights, rows: int) -> Tensor:
        _, tiles, _, words = held.packed.shape  # (N' / 8, K' / (32 words), 32, words) int32
        padded = tiles * words * 32
        x = F.pad(x, (0, padded - x.shape[1])).contiguous()
        return torch.ops.aten._weight_int4pack_mm(x, held.packed, padded // held.grid.shape[0], held.grid)[:, :rows]

"""NormalFloat4 (QLoRA, arXiv 2305.14314) as `bitsandbytes` stores it, to the bit, and the package's kernels for it.

The weights of a matrix, row after row, are cut into blocks; a block is 16 fixed levels between -1 and 1 times its
largest absolute value. Two codes lie in a byte, the first in its high bits. With double quantization the largest values
less their mean are stored in 8 bits on a fixed map (arXiv 2110.02861), in blocks of 256 with a largest value of their
own.

N outputs, K inputs, g weights of a block, n blocks, B rows of x.
"""

from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.quantization.kernels.bitsandbytes import has_avx512_bf16, missing
from models.errors import UserError

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
OUTER = 256  # largest values that share a largest value in double quantization
TINY = 1e-38
TILE = 32  # rows of a tile of the CPU kernel
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)  # the quantiles of a normal distribution, with an exact zero
ZERO = 7  # the code of 0


@dataclass(frozen=True)
class Nf4Format:
    """Layout of NF4 weights.

    Args:
        block_size: weights that share a largest absolute value.
        double_quantization: store those values in 8 bits too.

    Raises:
        UserError: a block size that `bitsandbytes` does not have.
    """

    block_size: int = 64
    double_quantization: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.block_size, bool) or self.block_size not in BLOCKS:
            raise UserError(f"block_size must be one of {', '.join(map(str, BLOCKS))}, got {self.block_size!r}")

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def blocks(self, rows: int, width: int) -> int:
        """Blocks of a matrix."""
        return -(-rows * width // self.block_size)


class Absmax(NamedTuple):
    """The blocks' largest values: fp32 (n,); or codes (n,) uint8, their scales (ceil(n / 256),) and mean () in fp32."""

    values: Tensor
    scales: Tensor | None = None
    mean: Tensor | None = None

    def dequantize(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Scales from `start` to `stop`, or all: (n,) fp32."""
        values = self.values[start:stop]
        if self.scales is None:
            return values
        index = torch.arange(start, start + len(values), device=values.device) // OUTER
        return _dynamic_map(values.device)[values.int()] * self.scales[index] + self.mean


def _spread(values: Tensor, of: Tensor, block: int) -> Tensor:
    """One value a block, repeated for each of the elements `of`."""
    return values.repeat_interleave(block)[: of.numel()]


@cache
def levels(device: torch.device) -> Tensor:
    return torch.tensor(LEVELS, device=device)


@cache
def _dynamic_map(device: torch.device) -> Tensor:
    """The 256 levels of the signed dynamic map: seven decades, each with twice the levels of the one below."""
    found = [torch.zeros(1), torch.ones(1)]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1)
        middles = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        found += [middles, -middles]
    return torch.cat(found).sort().values.to(device)


def _nearest(values: Tensor, levels: Tensor) -> Tensor:
    """Codes uint8 of the nearest levels (sorted)."""
    return torch.bucketize(values, (levels[:-1] + levels[1:]) / 2, out_int32=True).to(torch.uint8)


def _blockwise(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Values (m,) between -1 and 1, and the largest absolute value of each block (n,)."""
    absmax = F.pad(values, (0, -len(values) % block)).view(-1, block).abs().amax(1)  # (n,)
    scale = 1.0 / absmax.clamp(min=TINY)
    return (values * _spread(scale, values, block)).clamp(-1, 1), absmax


def quantize(weight: Tensor, format: Nf4Format) -> tuple[Tensor, Absmax]:
    """Codes (ceil(N K / 2),) uint8 of a weight matrix (N, K), and the largest values of its blocks."""
    scaled, absmax = _blockwise(weight.reshape(-1).float(), format.block_size)
    codes = F.pad(_nearest(scaled, levels(weight.device)), (0, len(scaled) % 2), value=ZERO)
    codes = codes[::2] << 4 | codes[1::2]
    if not format.double_quantization:
        return codes, Absmax(absmax)
    mean = absmax.mean()
    scaled, scales = _blockwise(absmax - mean, OUTER)
    return codes, Absmax(_nearest(scaled, _dynamic_map(weight.device)), scales, mean)


def unpack(packed: Tensor, count: int) -> Tensor:
    """The first `count` codes (count,) uint8 of packed ones."""
    return torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[:count]


def dequantize(packed: Tensor, absmax: Tensor, block: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The weights (N, K), computed in fp32 and rounded once to `dtype`: the eager reference."""
    values = levels(packed.device)[unpack(packed, shape[0] * shape[1]).int()]  # (N K,)
    return (values * _spread(absmax, values, block)).view(shape).to(dtype)


def fast_dequantize(packed: Tensor, absmax: Tensor, block: int, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """`dequantize` by `bitsandbytes` where it is there; the same to the bit.

    Not where blocks reach over the end of a row: there version 0.50.2 takes the wrong block's value on the CPU.
    """
    known = dtype in (torch.float32, torch.bfloat16, torch.float16) and packed.numel() and shape[1] % block == 0
    if not known or packed.device.type not in ("cpu", "cuda") or missing():
        return dequantize(packed, absmax, block, shape, dtype)
    return torch.ops.bitsandbytes.dequantize_4bit(packed, absmax, block, "nf4", shape, dtype)


def pick(packed: Tensor, index: Tensor, width: int) -> Tensor:
    """The codes of the rows `index` (m,), unpacked: (m, K)."""
    place = index[:, None] * width + torch.arange(width, device=index.device)
    both = packed[place // 2]
    return torch.where(place % 2 == 0, both >> 4, both & 15)


class Nf4Weights(NamedTuple):
    """Weights in the layout of a kernel, and the largest values as it reads them."""

    packed: Tensor
    absmax: Tensor


@dataclass(frozen=True)
class Nf4Cpu:
    """The fused product of `bitsandbytes` on AVX512-BF16: tiles of 32 rows, two columns of a tile after the other.

    A byte holds rows j and j + 16 of its tile, the first in its low bits. It reads the largest values in bf16, so its
    products are within bf16 rounding of the exact ones.
    """

    name: str = "bitsandbytes::gemv_4bit"
    device: str = "cpu"
    largest_batch: int = 256
    picks: bool = True
    format: ClassVar[type] = Nf4Format
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16,)

    def refuses(self, format: Nf4Format, rows: int, width: int) -> str:
        """See `kernels.Kernel`."""
        if reason := missing():
            return reason
        if width % format.block_size:
            return f"the NF4 kernel takes inputs in whole blocks of {format.block_size}, and there are {width}"
        return "" if _cpu_kernel() else "the NF4 kernel of bitsandbytes needs a processor with AVX512-BF16"

    def repack(self, packed: Tensor, absmax: Tensor, format: Nf4Format, shape: tuple[int, int]) -> Nf4Weights:
        """Codes as stored, largest values (n,) fp32 -> codes (N' / 32, K / 2, 16, 2) uint8, values (K / g, N') bf16."""
        rows, width = shape
        more = -rows % TILE
        codes = F.pad(unpack(packed, rows * width).view(shape), (0, 0, 0, more), value=ZERO)  # (N', K)
        halves = codes.view(-1, 2, TILE // 2, width // 2, 2).permute(1, 0, 3, 2, 4)  # (2, N' / 32, K / 2, 16, 2)
        absmax = F.pad(absmax.view(rows, -1), (0, 0, 0, more)).t().bfloat16()
        return Nf4Weights((halves[0] | halves[1] << 4).contiguous(), absmax.contiguous())

    def codes(self, held: Nf4Weights, index: Tensor, width: int) -> Tensor:
        """The codes of the rows `index` (m,), unpacked: (m, K)."""
        both = held.packed[index // TILE, :, index % (TILE // 2)]  # (m, K / 2, 2)
        high = (index % TILE >= TILE // 2)[:, None, None]
        return torch.where(high, both >> 4, both & 15).flatten(1)

    def restore(self, held: Nf4Weights, start: int, stop: int, width: int) -> Tensor:
        """The codes of the rows from `start` to `stop` as they are stored."""
        first, last = start // TILE, -(-stop // TILE)
        pairs = held.packed[first:last].view(torch.int16)[..., 0].transpose(1, 2).contiguous()  # (tiles, 16, K / 2)
        codes = pairs.new_empty(len(pairs), 2, *pairs.shape[1:], dtype=torch.uint8)
        codes[:, 0] = (pairs & 15) << 4 | pairs >> 8 & 15
        codes[:, 1] = pairs & 240 | pairs >> 12 & 15
        return codes.view(-1, width // 2)[start - first * TILE : stop - first * TILE].flatten()

    def multiply(self, x: Tensor, held: Nf4Weights, format: Nf4Format, rows: int) -> Tensor:
        """x (B, K) bf16 times the transposed weights: (B, N) bf16."""
        shape = (held.absmax.shape[1], x.shape[1])
        table = levels(x.device)
        y = torch.ops.bitsandbytes.gemv_4bit(
            x.contiguous(), held.packed.view(shape[0], -1), shape, held.absmax, table, format.block_size
        )
        return y[:, :rows]


@cache
def _cpu_kernel() -> bool:
    """Whether the fused product is there and reads this layout, found by trying."""
    if not has_avx512_bf16():
        return False
    format, kernel, x = Nf4Format(), Nf4Cpu(), torch.eye(64, dtype=torch.bfloat16)
    weight = torch.tensor(LEVELS).bfloat16().float()[torch.arange(64 * 64).mul(7) % 16].view(64, 64)
    packed, absmax = quantize(weight, format)
    y = kernel.multiply(x, kernel.repack(packed, absmax.dequantize(), format, (64, 64)), format, 64)
    return torch.equal(y, weight.t().bfloat16())


@dataclass(frozen=True)
class Nf4Cuda:
    """The product of `bitsandbytes` on CUDA, from the stored layout: a fused one at few rows, else unpacked inside."""

    name: str = "bitsandbytes::gemm_4bit"
    device: str = "cuda"
    largest_batch: int | None = None
    picks: bool = True
    format: ClassVar[type] = Nf4Format
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16, torch.float16)

    def refuses(self, format: Nf4Format, rows: int, width: int) -> str:
        """See `kernels.Kernel`."""
        old = not missing() and tuple(map(int, version("bitsandbytes").split(".")[:2])) < (0, 50)
        return missing() or ("the NF4 kernel for CUDA needs bitsandbytes 0.50 or newer" if old else "")

    def repack(self, packed: Tensor, absmax: Tensor, format: Nf4Format, shape: tuple[int, int]) -> Nf4Weights:
        """Codes as stored, largest values (n,) fp32."""
        return Nf4Weights(packed, absmax)

    def codes(self, held: Nf4Weights, index: Tensor, width: int) -> Tensor:
        """See `Nf4Cpu.codes`."""
        return pick(held.packed, index, width)

    def restore(self, held: Nf4Weights, start: int, stop: int, width: int) -> Tensor:
        """See `Nf4Cpu.restore`; the rows begin with a whole byte."""
        return held.packed[start * width // 2 : -(-stop * width // 2)]

    def multiply(self, x: Tensor, held: Nf4Weights, format: Nf4Format, rows: int) -> Tensor:
        """x (B, K) times the transposed weights: (B, N)."""
        packed = held.packed.view(-1, 1)
        return torch.ops.bitsandbytes.gemm_4bit(x, packed, (rows, x.shape[1]), held.absmax, format.block_size, "nf4")

"""Integer grids: which numbers a quantized weight can take, and the nearest of them.

Codes are unsigned, 0 .. 2^b - 1, and a weight is (code - zero) * scale. The grid of a set of weights is

    symmetric   scale = max|w| / ((2^b - 1) / 2), zero = 2^(b-1)          (the convention of compressed-tensors)
    affine      scale = (max - min) / (2^b - 1), zero = round(-min / scale), with min <= 0 <= max forced

Zero is on every grid, so a pruned weight stays zero. The scale is rounded to the dtype that it is stored in before any
weight is rounded to the grid: what is stored is what was optimised. Ties round to even.

N rows (outputs), K columns (inputs), G groups a row, g columns a group.
"""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import UserError, did_you_mean
from models.registry import Registry

BITS = (2, 3, 4, 8)
CLIPS = Registry("clip", example="mse")
SCALE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class IntFormat:
    """Integer format of a weight matrix: bits, group size, symmetry.

    Args:
        bits: 2, 3, 4 or 8.
        group_size: columns that share a scale, or `channel` (one scale a row) or `tensor` (one in all). The last group
            of a row is shorter where the size does not divide the width.
        symmetric: without a zero point.
        scale_dtype: `bfloat16`, `float16` or `float32`.

    Raises:
        UserError: a value that is none of these.
    """

    bits: int = 4
    group_size: int | str = 64
    symmetric: bool = True
    scale_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in BITS:
            raise UserError(f"bits must be one of {', '.join(map(str, BITS))}, got {self.bits!r}")
        size = self.group_size
        if isinstance(size, str):
            if size not in ("channel", "tensor"):
                hint = did_you_mean(size, ["channel", "tensor"])
                raise UserError(f"group_size must be a whole number of columns, channel or tensor, got {size!r}{hint}")
        elif isinstance(size, bool) or not isinstance(size, int) or size < 2:
            raise UserError(
                f"group_size must be at least 2, or channel (one scale a row), or tensor (one in all), got {size!r}"
            )
        if not isinstance(self.symmetric, bool):
            raise UserError(f"symmetric must be true or false, got {self.symmetric!r}")
        if self.scale_dtype not in SCALE_DTYPES:
            hint = did_you_mean(str(self.scale_dtype), SCALE_DTYPES)
            raise UserError(f"unknown scale_dtype {self.scale_dtype!r}{hint}")

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the scales."""
        return SCALE_DTYPES[self.scale_dtype]

    def group(self, width: int) -> int:
        """Columns of a group in a matrix of `width` columns."""
        return width if isinstance(self.group_size, str) else min(self.group_size, width)

    def scales_shape(self, rows: int, width: int) -> tuple[int, int]:
        """(N, G), or (1, 1) for one scale in all."""
        return (1, 1) if self.group_size == "tensor" else (rows, -(-width // self.group(width)))

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


class Quantized(NamedTuple):
    """A weight matrix on its grid.

    Attributes:
        codes: (N, K) uint8.
        scales: (N, G) or (1, 1) in the format's scale dtype.
        zeros: like the scales, uint8; None for a symmetric grid.
        format: how it lies.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    format: IntFormat

    def dequantize(self) -> Tensor:
        """The weights (N, K) fp32 that the codes stand for: exact for scales of 16 bits."""
        return dequantize(self.codes, self.scales, self.zeros, self.format)


def dequantize(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, format: IntFormat, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(code - zero) * scale, (N, K), rounded once to `dtype`; `scales` and `zeros` (N, G) or (1, 1).

    A code less its zero is exact in every 16-bit float; times a scale of the same dtype it is rounded once, as it is
    when the exact product in fp32 is converted. Other scales go through fp32.
    """
    working = dtype if dtype == scales.dtype else torch.float32
    rows, width = codes.shape
    groups = scales.shape[1]
    weight = codes.to(working)
    whole = width % groups == 0 and width // groups == format.group(width)
    split = weight.view(rows, groups, width // groups) if whole else weight  # (N, G, g), or (N, K)
    if zeros is None:
        split -= 2.0 ** (format.bits - 1)
    else:
        split -= zeros.to(working)[..., None] if whole else spread(zeros.to(working), width, format)
    split *= scales.to(working)[..., None] if whole else spread(scales.to(working), width, format)
    return weight.to(dtype)


def spread(values: Tensor, width: int, format: IntFormat) -> Tensor:
    """One value a column (N, K) of one a group (N, G); a single group broadcasts by itself."""
    if values.shape[1] == 1:
        return values
    return values.repeat_interleave(format.group(width), dim=1)[:, :width]


@CLIPS.register("mse")
@dataclass(frozen=True)
class MseClip:
    """Search for the range with the least squared error: shrink min and max together.

    Args:
        steps: ranges tried beside the full one.
        smallest: the last of them, as a share of the full range.
    """

    steps: int = 25
    smallest: float = 0.5

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.smallest < 1:
            wrong = f"{self.steps} and {self.smallest}"
            raise UserError(f"clipping needs at least 1 step and a smallest share between 0 and 1, got {wrong}")

    def shares(self) -> list[float]:
        """The shares tried after the full range, largest first."""
        return [1 - (1 - self.smallest) * step / self.steps for step in range(1, self.steps + 1)]


def fit(values: Tensor, format: IntFormat, clip: MseClip | None = None) -> tuple[Tensor, Tensor]:
    """The grid of each row of `values` (R, n): scale (R,), already rounded to its stored dtype, and zero (R,)."""
    low, high = values.amin(1).clamp(max=0), values.amax(1).clamp(min=0)  # (R,)
    scale, zero = _grid(low, high, format)
    if clip is None:
        return scale, zero
    best = _squared_error(values, scale, zero, format)
    for share in clip.shares():
        tried, shifted = _grid(low * share, high * share, format)
        error = _squared_error(values, tried, shifted, format)
        better = error < best
        best, scale, zero = error.minimum(best), tried.where(better, scale), shifted.where(better, zero)
    return scale, zero


def _grid(low: Tensor, high: Tensor, format: IntFormat) -> tuple[Tensor, Tensor]:
    smallest = torch.finfo(format.dtype).tiny  # a group of zeros has some scale, and none is stored as 0
    if format.symmetric:
        scale = torch.maximum(-low, high) / (format.top / 2)
    else:
        scale = (high - low) / format.top
    scale = scale.clamp(min=smallest).to(format.dtype).to(low.dtype)
    if format.symmetric:
        return scale, torch.full_like(scale, 2.0 ** (format.bits - 1))
    return scale, (-low / scale).round().clamp(0, format.top)


def _squared_error(values: Tensor, scale: Tensor, zero: Tensor, format: IntFormat) -> Tensor:
    codes = encode(values, scale[:, None], zero[:, None], format)
    return ((codes - zero[:, None]) * scale[:, None] - values).square().sum(1)  # (R,)


def encode(values: Tensor, scale: Tensor, zero: Tensor, format: IntFormat, out: Tensor | None = None) -> Tensor:
    """The nearest codes, in the dtype of `values`, into `out` if given; `scale` and `zero` broadcast against it."""
    return torch.div(values, scale, out=out).round_().add_(zero).clamp_(0, format.top)


def fit_matrix(weight: Tensor, format: IntFormat, clip: MseClip | None = None) -> tuple[Tensor, Tensor]:
    """The grids of a matrix (N, K): scale and zero, (N, G) or (1, 1). What pads the last group are zeros: no effect."""
    rows, width = weight.shape
    shape = format.scales_shape(rows, width)
    if shape == (1, 1):
        grouped = weight.reshape(1, -1)
    else:
        padded = F.pad(weight, (0, shape[1] * format.group(width) - width))  # (N, G g)
        grouped = padded.reshape(rows * shape[1], -1)  # (N G, g)
    scale, zero = fit(grouped, format, clip)
    return scale.view(shape), zero.view(shape)


def quantize(weight: Tensor, format: IntFormat, clip: MseClip | None = None) -> Quantized:
    """Round a weight matrix (N, K) to the nearest point of its grid."""
    weight = weight.float()
    scale, zero = fit_matrix(weight, format, clip)
    width = weight.shape[1]
    codes = encode(weight, spread(scale, width, format), spread(zero, width, format), format)
    return Quantized(*stored(codes, scale, zero, format), format)


def stored(codes: Tensor, scale: Tensor, zero: Tensor, format: IntFormat) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scales and zeros in the dtypes that they are kept in."""
    return codes.to(torch.uint8), scale.to(format.dtype), None if format.symmetric else zero.to(torch.uint8)

"""Products of 8-bit integers: weights (N, K) times rows of x that are quantized as they come.

A row of weights or of x is code * absmax / 127, rounded to the nearest code: `LLM.int8` (arXiv 2208.07339), and
`bitsandbytes` to the bit. B rows of x, N outputs, K inputs.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.quantization.kernels.bitsandbytes import missing
from models.errors import UserError
from models.registry import Registry

TOP = 127
ACTIVATIONS = Registry("rounding of activations", example="{kind: outliers, threshold: 6.0}")


class Rows(NamedTuple):
    """Rows on their 8-bit grids: codes (n, K) int8, and the largest absolute value of each row, (n,) fp32."""

    codes: Tensor
    absmax: Tensor

    def dequantize(self) -> Tensor:
        """The numbers (n, K) fp32 that the codes stand for."""
        return self.codes.float() * self.absmax[:, None] * (1 / TOP)


def quantize_rows(values: Tensor) -> Rows:
    """Round each row of (n, K) to the nearest of its 255 codes; a row of zeros stays zeros, NaN stays in absmax."""
    absmax = values.abs().amax(1).float() if values.shape[1] else values.new_zeros(len(values)).float()  # (n,)
    scale = torch.where(absmax > 0, TOP / absmax, 0.0)
    return Rows((values.float() * scale[:, None]).round_().to(torch.int8), absmax)


@ACTIVATIONS.register("dynamic")
@dataclass(frozen=True)
class Dynamic:
    """Every input in 8 bits, one scale a row of x (W8A8)."""

    def split(self, x: Tensor) -> tuple[Rows, Tensor | None]:
        """Rows of x (B, K) in 8 bits, and the columns that are left to a product in the dtype of x, or None."""
        return quantize_rows(x), None


@ACTIVATIONS.register("outliers")
@dataclass(frozen=True)
class Outliers:
    """Inputs in which some row of x is large stay in 16 bits, the others in 8 (LLM.int8, arXiv 2208.07339).

    Which inputs those are is a matter of all rows that are multiplied at once, as in the paper.

    Args:
        threshold: absolute value from which on an element of x is an outlier.
    """

    threshold: float = 6.0

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise UserError(f"threshold must be above 0, got {self.threshold!r}; for none, use activations: dynamic")

    def split(self, x: Tensor) -> tuple[Rows, Tensor | None]:
        """See `Dynamic.split`."""
        large = x.abs() >= self.threshold  # (B, K)
        columns = large.any(0).nonzero()[:, 0]
        if not len(columns):
            return quantize_rows(x), None
        rows = quantize_rows(x.masked_fill(large, 0))
        rows.codes[:, columns] = 0
        return rows, columns


@dataclass(frozen=True)
class Int8Format:
    """Weights in 8 bits, one scale a row.

    Args:
        activations: how the rows of x are rounded.
    """

    activations: Any = field(default=Outliers(), metadata={"registry": ACTIVATIONS})

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"activations": ACTIVATIONS.dump(self.activations)}


@dataclass(frozen=True)
class IntMm:
    """PyTorch's product of 8-bit integers; on CUDA it wants more than 16 rows, which zeros make up."""

    name: str = "aten::_int_mm"
    device: str = "cpu"
    largest_batch: int | None = None
    picks: bool = False
    format: ClassVar[type] = Int8Format
    dtypes: ClassVar[tuple[torch.dtype, ...]] = ()

    def refuses(self, format: Int8Format, rows: int, width: int) -> str:
        """See `kernels.Kernel`."""
        odd = self.device == "cuda" and (rows % 8 or width % 8)
        return "aten::_int_mm takes inputs and outputs in multiples of 8" if odd else ""

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """Codes of x (B, K) times the transposed codes (N, K): (B, N) int32."""
        rows = len(x)
        if self.device == "cuda" and rows <= 16:
            x = F.pad(x, (0, 0, 0, 24 - rows))
        return torch._int_mm(x.contiguous(), weight.t())[:rows]


@dataclass(frozen=True)
class BitsAndBytesInt8:
    """The product of `bitsandbytes`."""

    name: str = "bitsandbytes::int8_linear_matmul"
    device: str = "cuda"
    largest_batch: int | None = None
    picks: bool = False
    format: ClassVar[type] = Int8Format
    dtypes: ClassVar[tuple[torch.dtype, ...]] = ()

    def refuses(self, format: Int8Format, rows: int, width: int) -> str:
        """See `kernels.Kernel`."""
        return missing() or ("bitsandbytes takes inputs in multiples of 4" if width % 4 else "")

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `IntMm.product`."""
        return torch.ops.bitsandbytes.int8_linear_matmul(x, weight)


def eager_product(x: Tensor, weight: Tensor) -> Tensor:
    """The same sums in fp64, which holds them exactly on every device: (B, N)."""
    return x.double() @ weight.double().t()


def multiply(x: Tensor, weight: Rows, activations: Any, kernel: IntMm | BitsAndBytesInt8 | None) -> Tensor:
    """x (B, K) times the transposed weights (N, K) in 8 bits: (B, N) in the dtype of x."""
    rows, columns = activations.split(x)
    sums = (kernel.product if kernel else eager_product)(rows.codes, weight.codes)
    y = (sums * (rows.absmax[:, None] * weight.absmax * (1 / TOP**2))).to(x.dtype)  # (B, N)
    if columns is None:
        return y
    own = Rows(weight.codes[:, columns], weight.absmax).dequantize().to(x.dtype)  # (N, outliers)
    return y.addmm(x[:, columns], own.t())

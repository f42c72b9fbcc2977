"""Products of 8-bit floats (e4m3: 4 exponent and 3 mantissa bits, largest value 448; arXiv 2209.05433).

A row of weights, or of x, is code * scale with scale = max|row| / 448. B rows of x, N outputs, K inputs.
"""

from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from models.errors import UserError, did_you_mean

FP8 = torch.float8_e4m3fn
TOP = torch.finfo(FP8).max
ACTIVATIONS = ("dynamic", "none")


class Rows(NamedTuple):
    """Rows of 8-bit floats: codes (n, K) e4m3, and a scale each, (n,) fp32."""

    codes: Tensor
    scales: Tensor

    def dequantize(self) -> Tensor:
        """The numbers (n, K) fp32 that the codes stand for."""
        return self.codes.float() * self.scales[:, None]


def quantize_rows(values: Tensor) -> Rows:
    """Round each row of (n, K) to 8-bit floats that use their whole range; NaN stays in the scale."""
    absmax = values.abs().amax(1).float() if values.shape[1] else values.new_zeros(len(values)).float()  # (n,)
    scales = absmax.clamp(min=torch.finfo(torch.float32).tiny) / TOP
    return Rows((values.float() / scales[:, None]).clamp_(-TOP, TOP).to(FP8), scales)


@dataclass(frozen=True)
class Fp8Format:
    """Weights in e4m3, one scale a row.

    Args:
        activations: `dynamic` rounds the rows of x to e4m3 as well, as the kernel needs; `none` leaves them.

    Raises:
        UserError: another word.
    """

    activations: str = "dynamic"

    def __post_init__(self) -> None:
        if self.activations not in ACTIVATIONS:
            hint = did_you_mean(str(self.activations), ACTIVATIONS)
            raise UserError(f"activations of fp8 are dynamic or none, got {self.activations!r}{hint}")

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class ScaledMm:
    """PyTorch's product of 8-bit floats with a scale a row on both sides."""

    name: str = "aten::_scaled_mm"
    device: str = "cuda"
    largest_batch: int | None = None
    picks: bool = False
    format: ClassVar[type] = Fp8Format
    dtypes: ClassVar[tuple[torch.dtype, ...]] = (torch.bfloat16,)

    def refuses(self, format: Fp8Format, rows: int, width: int) -> str:
        """See `kernels.Kernel`."""
        if format.activations == "none":
            return "the fp8 kernel needs 8-bit activations (activations: dynamic)"
        if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9):
            return "the fp8 kernel needs compute capability 8.9"
        return "the fp8 kernel takes inputs and outputs in multiples of 16" if rows % 16 or width % 16 else ""

    def multiply(self, x: Rows, weight: Rows, dtype: torch.dtype) -> Tensor:
        """Rows of x (B, K) times the transposed weights (N, K): (B, N) in `dtype`, summed in fp32."""
        scales = x.scales[:, None], weight.scales[None, :]  # (B, 1), (1, N)
        return torch._scaled_mm(x.codes, weight.codes.t(), scale_a=scales[0], scale_b=scales[1], out_dtype=dtype)

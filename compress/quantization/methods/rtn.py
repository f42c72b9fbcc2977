"""Round to nearest: every weight to the nearest point of its grid. Needs no data."""

import time
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from compress.calibration.records import LayerRecord
from compress.calibration.statistics import Statistic
from compress.quantization.affine import BITS, CLIPS, IntFormat, MseClip, Quantized, quantize
from compress.quantization.formats.linear import PackedInt, PackedIntEmbedding, PackedIntLinear
from compress.quantization.quantizer import GRID, METHODS, Quantizer, requested
from models.errors import UserError


class AffineQuantizer(Quantizer):
    """Base class of the methods that round to affine grids: `format` says which, `clip` how a range is fitted."""

    grid: ClassVar[tuple[str, ...]] = GRID
    bits: ClassVar[tuple[int, ...]] = BITS

    format: IntFormat
    clip: MseClip | None = None

    def stored_form(self, kind: type[nn.Module], shape: tuple[int, int]) -> PackedInt:
        with torch.device("meta"):
            return (PackedIntEmbedding if issubclass(kind, nn.Embedding) else PackedIntLinear)(*shape, self.format)

    def nearest(self, weight: Tensor) -> Tensor:
        return quantize(weight, self.format, self.clip).dequantize()


@METHODS.register("rtn")
@dataclass(frozen=True)
class Rtn(AffineQuantizer):
    """Round-to-nearest.

    Args:
        format: bits, groups, symmetry and scale dtype.
        clip: search for a smaller range with less squared error, or nothing for the full range.
    """

    embedding_bits: ClassVar[tuple[int, ...]] = BITS

    format: IntFormat = field(default_factory=IntFormat)
    clip: MseClip | None = field(default=None, metadata={"registry": CLIPS})

    def compress(self, name: str, module: nn.Module, statistic: Statistic | None) -> tuple[nn.Module, LayerRecord]:
        started = time.perf_counter()
        weight = checked_weight(name, module)
        quantized = quantize(weight, self.format, self.clip)
        new = packed(module, quantized)
        error = relative_error(weight, quantized.dequantize())
        achieved = {"bits": bits_per_weight(new), "error_of": "weights"}
        seconds = time.perf_counter() - started
        note = group_note(self.format, weight)
        return new, LayerRecord(name, tuple(weight.shape), requested(self), achieved, error, seconds, note)


def packed(module: nn.Module, quantized: Quantized) -> PackedInt:
    """The layer that takes the place of an `nn.Linear` or `nn.Embedding`, with these weights."""
    return (PackedIntEmbedding if isinstance(module, nn.Embedding) else PackedIntLinear).of(module, quantized)


def checked_weight(name: str, module: nn.Module) -> Tensor:
    """The weight (N, K) in fp32. Raises UserError, with the name, if it holds NaN or infinity."""
    weight = module.weight.detach().float()
    if not weight.isfinite().all():
        raise UserError(
            f"the weight of {name} holds NaN or infinity: the model is broken there, and cannot be quantized"
        )
    return weight


def bits_per_weight(module: PackedInt) -> float:
    """Stored bits a weight: codes, scales, zeros and padding."""
    return 8 * module.stored_bytes() / (module.shape[0] * module.shape[1])


def relative_error(weight: Tensor, quantized: Tensor) -> float:
    """|W - V|^2 / |W|^2, 0 for a weight of zeros."""
    return float((weight - quantized).square().sum() / weight.square().sum().clamp_min(1e-30))


def group_note(format: IntFormat, weight: Tensor) -> str:
    """Note on a group size that does not divide the width, or nothing."""
    width, size = weight.shape[1], format.group_size
    if isinstance(size, str) or width % size == 0:
        return ""
    if size > width:
        return f"a group of {size} is wider than the {width} inputs: one scale a row"
    return f"groups of {size} do not divide {width} inputs: the last group of a row has {width % size}"

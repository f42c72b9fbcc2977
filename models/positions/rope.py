"""Rotary positions (arXiv 2104.09864) and how they are stretched over longer contexts; angles in fp32."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import UserError, did_you_mean
from models.positions.protocol import Position, Positional
from models.registry import Registry
from models.specs import POSITIONS, PositionSpec

ROPE_SCALINGS = Registry("RoPE scaling", example="{kind: linear, factor: 2.0}")
LAYOUTS = ("half", "interleaved")


def _above_one(factor: float) -> None:
    if factor < 1:
        raise UserError(f"factor must be at least 1, got {factor}")


def _check_context(tokens: int) -> None:
    if tokens < 1:
        raise UserError(f"original_context must be at least 1, got {tokens}")


@ROPE_SCALINGS.register("linear")
@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (arXiv 2306.15595): all positions are divided by `factor`."""

    factor: float

    amplitude = 1.0

    def __post_init__(self) -> None:
        _above_one(self.factor)

    def apply(self, frequencies: Tensor, base: float) -> Tensor:  # (R,) -> (R,)
        return frequencies / self.factor


@ROPE_SCALINGS.register("ntk")
@dataclass(frozen=True)
class NtkScaling:
    """A larger base (NTK-aware scaling): the slowest rotation is slowed by `factor`, the fastest not at all."""

    factor: float
    amplitude = 1.0

    def __post_init__(self) -> None:
        _above_one(self.factor)

    def apply(self, frequencies: Tensor, base: float) -> Tensor:  # (R,) -> (R,)
        count = len(frequencies)
        exponents = torch.arange(count, device=frequencies.device) / max(1, count - 1)  # 0 to 1
        return frequencies / self.factor**exponents


@ROPE_SCALINGS.register("yarn")
@dataclass(frozen=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): fast rotations are kept, slow ones divided by `factor`, those between blended; and the
    tables grow by 0.1 ln(factor) + 1, so that the softmax stays as sharp over more tokens.

    Args:
        factor: how much longer the context becomes.
        original_context: context length of the pretraining.
        beta_fast, beta_slow: rotations over `original_context` above which a frequency is kept, below which divided.
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        _above_one(self.factor)
        _check_context(self.original_context)
        if not self.beta_fast > self.beta_slow > 0:
            raise UserError(f"beta_fast must be above beta_slow, got {self.beta_fast} and {self.beta_slow}")

    @property
    def amplitude(self) -> float:
        return 0.1 * math.log(self.factor) + 1.0

    def apply(self, frequencies: Tensor, base: float) -> Tensor:  # (R,) -> (R,)
        count = len(frequencies)
        low, high = (self._channel(turns, 2 * count, base) for turns in (self.beta_fast, self.beta_slow))
        low, high = max(math.floor(low), 0), min(math.ceil(high), 2 * count - 1)
        channels = torch.arange(count, device=frequencies.device, dtype=frequencies.dtype)
        divided = ((channels - low) / max(high - low, 0.001)).clamp(0, 1)  # (R,) 0 = kept, 1 = divided
        return frequencies * (1 - divided) + frequencies / self.factor * divided

    def _channel(self, turns: float, rotated: int, base: float) -> float:
        """The pair of channels that turns so often over the original context (paper, section 3.2)."""
        return rotated * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(base))


@ROPE_SCALINGS.register("llama3")
@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's scaling: long wavelengths are divided by `factor`, short ones kept, those between blended.

    Args:
        factor: how much longer the context becomes.
        low_frequency_factor, high_frequency_factor: bounds of the blend, in turns over `original_context`.
        original_context: context length of the pretraining.
    """

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_context: int

    amplitude = 1.0

    def __post_init__(self) -> None:
        _above_one(self.factor)
        _check_context(self.original_context)
        low, high = self.low_frequency_factor, self.high_frequency_factor
        if not high > low > 0:
            raise UserError(f"high_frequency_factor must be above low_frequency_factor, got {high} and {low}")

    def apply(self, frequencies: Tensor, base: float) -> Tensor:  # (R,) -> (R,)
        wavelength = 2 * math.pi / frequencies
        low, high = self.low_frequency_factor, self.high_frequency_factor
        blend = (self.original_context / wavelength - low) / (high - low)
        blended = (1 - blend) * frequencies / self.factor + blend * frequencies
        scaled = torch.where(wavelength > self.original_context / low, frequencies / self.factor, frequencies)
        between = (wavelength >= self.original_context / high) & (wavelength <= self.original_context / low)
        return torch.where(between, blended, scaled)


@POSITIONS.register("rope")
@dataclass(frozen=True)
class Rope(PositionSpec):
    """Rotary position embedding.

    Args:
        base: theta of the slowest rotation.
        fraction: share of the head's channels that is rotated (1.0 = all).
        scaling: how frequencies are changed for contexts beyond the trained one (`linear`, `ntk`, `yarn`, `llama3`), or
            nothing.
        layout: which channels of a head are a pair: `half` (c, c + R) as in Llama, or `interleaved` (2c, 2c + 1) as in
            RoFormer and GPT-J. The same up to an order of the channels.
    """

    acts = "rotation"

    base: float = 10000.0
    fraction: float = 1.0
    scaling: Any = field(default=None, metadata={"registry": ROPE_SCALINGS})
    layout: str = "half"

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise UserError(f"unknown layout {self.layout!r}{did_you_mean(self.layout, LAYOUTS)}")
        if not 0 < self.fraction <= 1:
            raise UserError(f"fraction must be above 0 and at most 1, got {self.fraction}")
        if not self.base > 1:
            raise UserError(f"base must be above 1, got {self.base}")

    def check(self, *, width: int, head_width: int, bidirectional: bool) -> None:
        """Raise UserError if heads of this width cannot be rotated."""
        rotated = int(head_width * self.fraction)
        if rotated < 2 or rotated % 2:
            raise UserError(f"rope rotates channels in pairs: {rotated} of {head_width} channels cannot be paired")

    def build(self, *, width: int, heads: int, head_width: int, context: int, bidirectional: bool = False) -> nn.Module:
        return RotaryPositions(self, int(head_width * self.fraction))


class RotaryPositions(Position):
    """Makes the rotation tables of one forward; owns no state, so there is nothing to save or to re-initialise."""

    def __init__(self, spec: Rope, rotated: int) -> None:
        super().__init__()
        self.spec, self.rotated = spec, rotated

    def forward(self, positions: Tensor) -> Positional:  # (B or 1, T)
        channels = torch.arange(0, self.rotated, 2, dtype=torch.int64, device=positions.device).float()  # (R,)
        frequencies = 1.0 / self.spec.base ** (channels / self.rotated)  # (R,)
        amplitude = 1.0
        if self.spec.scaling is not None:
            frequencies = self.spec.scaling.apply(frequencies, self.spec.base)
            amplitude = self.spec.scaling.amplitude
        angles = positions[:, None, :, None].float() * frequencies  # (B or 1, 1, T, R)
        cos, sin = amplitude * angles.cos(), amplitude * angles.sin()
        return Positional(cos=cos, sin=sin, interleaved=self.spec.layout == "interleaved")

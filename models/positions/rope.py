"""Rotary positions (arXiv 2104.09864), half-split pairs (c, c + R) as in Llama; angles in fp32."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.errors import UserError
from models.positions.protocol import POSITIONS, Positional
from models.registry import Registry

ROPE_SCALINGS = Registry("RoPE scaling")


@ROPE_SCALINGS.register("linear")
@dataclass(frozen=True)
class LinearScaling:
    """Position interpolation (arXiv 2306.15595): all positions are divided by `factor`."""

    factor: float

    def apply(self, frequencies: Tensor) -> Tensor:  # (R,) -> (R,)
        return frequencies / self.factor


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

    def apply(self, frequencies: Tensor) -> Tensor:  # (R,) -> (R,)
        wavelength = 2 * math.pi / frequencies
        low, high = self.low_frequency_factor, self.high_frequency_factor
        blend = (self.original_context / wavelength - low) / (high - low)
        blended = (1 - blend) * frequencies / self.factor + blend * frequencies
        scaled = torch.where(wavelength > self.original_context / low, frequencies / self.factor, frequencies)
        between = (wavelength >= self.original_context / high) & (wavelength <= self.original_context / low)
        return torch.where(between, blended, scaled)


@POSITIONS.register("rope")
@dataclass(frozen=True)
class Rope:
    """Rotary position embedding.

    Args:
        base: theta of the slowest rotation.
        fraction: share of the head's channels that is rotated (1.0 = all).
        scaling: how frequencies are changed for contexts beyond the trained one (`linear`, `llama3`), or nothing.
    """

    level = "attention"

    base: float = 10000.0
    fraction: float = 1.0
    scaling: LinearScaling | Llama3Scaling | None = field(default=None, metadata={"registry": ROPE_SCALINGS})

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise UserError(f"fraction must be above 0 and at most 1, got {self.fraction}")

    def check(self, head_width: int) -> None:
        """Raise UserError if heads of this width cannot be rotated."""
        rotated = int(head_width * self.fraction)
        if rotated < 2 or rotated % 2:
            raise UserError(f"rope rotates channels in pairs: {rotated} of {head_width} channels cannot be paired")

    def build(self, *, width: int, head_width: int, context: int) -> nn.Module:
        return RotaryPositions(self, int(head_width * self.fraction))


class RotaryPositions(nn.Module):
    """Makes the rotation tables of one forward; owns no state, so there is nothing to save or to re-initialise."""

    def __init__(self, spec: Rope, rotated: int) -> None:
        super().__init__()
        self.spec, self.rotated = spec, rotated

    def forward(self, positions: Tensor) -> Positional:  # (B or 1, T)
        channels = torch.arange(0, self.rotated, 2, dtype=torch.int64, device=positions.device).float()  # (R,)
        frequencies = 1.0 / self.spec.base ** (channels / self.rotated)  # (R,)
        if self.spec.scaling is not None:
            frequencies = self.spec.scaling.apply(frequencies)
        angles = positions[:, None, :, None].float() * frequencies  # (B or 1, 1, T, R)
        return Positional(cos=angles.cos(), sin=angles.sin())

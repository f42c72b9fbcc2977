"""Sinusoidal absolute positions, added to the token embeddings (arXiv 1706.03762, section 3.5)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.errors import UserError
from models.positions.protocol import Position, Positional
from models.specs import POSITIONS, PositionSpec


@POSITIONS.register("sinusoidal")
@dataclass(frozen=True)
class Sinusoidal(PositionSpec):
    """Sines and cosines of the position in geometrically growing wavelengths, for inputs of any length.

    Args:
        base: the longest wavelength is 2 pi times this.
    """

    acts = "input"

    base: float = 10000.0

    def __post_init__(self) -> None:
        if self.base <= 1:
            raise UserError(f"base must be above 1, got {self.base}")

    def check(self, *, width: int, head_width: int, bidirectional: bool) -> None:
        """Raise UserError for a model of odd width."""
        if width % 2:
            raise UserError(f"sinusoidal positions need an even width, got {width}")

    def build(self, *, width: int, heads: int, head_width: int, context: int, bidirectional: bool = False) -> nn.Module:
        return SinusoidalPositions(self.base, width)


class SinusoidalPositions(Position):
    """PE(p, 2c) = sin(p / base^(2c / D)), PE(p, 2c + 1) = cos of the same; computed in fp32, nothing to save."""

    def __init__(self, base: float, width: int) -> None:
        super().__init__()
        self.base, self.width = base, width

    def forward(self, positions: Tensor) -> Positional:  # (B or 1, T)
        channels = torch.arange(0, self.width, 2, device=positions.device).float()  # (D / 2,)
        angles = positions[..., None].float() / self.base ** (channels / self.width)  # (B or 1, T, D / 2)
        return Positional(added=torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2))  # (B or 1, T, D)

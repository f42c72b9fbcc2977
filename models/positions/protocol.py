"""What a position encoding offers to the Transformer.

A spec builds a module; once per forward the module turns the positions of the tokens into a `Positional`, which every
attention layer then applies. So tables are made once, not once per layer.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from models.registry import Registry

POSITIONS = Registry("position")


class Positional(NamedTuple):
    """One forward's positions, ready for use.

    Attributes:
        added: (B or 1, T, D), added to the token embeddings; None for encodings that act in the attention.
        cos, sin: (B or 1, 1, T, R) rotation tables in fp32 for the first 2R channels of a head; None: no rotation.
        interleaved: whether channels (2c, 2c + 1) are a pair, not (c, c + R).
        slopes: (H,) fp32 of each query head: its scores fall by so much for each token of distance.
        table: (H, N), added to the scores at the distances 0 to N - 1; larger distances take the last entry.
    """

    added: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    interleaved: bool = False
    slopes: Tensor | None = None
    table: Tensor | None = None

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate queries or keys x (B, H, T, head_width); the identity where the encoding does not rotate."""
        if self.cos is None:
            return x
        rotated = 2 * self.cos.shape[-1]
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)  # (B or 1, 1, T, R)
        if self.interleaved:
            first, second = x[..., :rotated:2], x[..., 1:rotated:2]  # (B, H, T, R) each
            pairs = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)  # (B, H, T, R, 2)
            parts = [pairs.flatten(-2)]
        else:
            first, second = x[..., :rotated].chunk(2, dim=-1)  # (B, H, T, R) each
            parts = [first * cos - second * sin, second * cos + first * sin]
        if rotated < x.shape[-1]:
            parts.append(x[..., rotated:])
        return torch.cat(parts, dim=-1)  # (B, H, T, head_width)

    @property
    def biases(self) -> bool:
        """Whether something is added to the scores."""
        return self.slopes is not None or self.table is not None

    def bias(self, distance: Tensor) -> Tensor:
        """What is added to the scores of queries that are `distance` (T, S) tokens behind their keys.

        Returns:
            (H, T, S), finite also for keys ahead (negative distance).
        """
        if self.slopes is not None:
            return -self.slopes[:, None, None] * distance.abs()
        return self.table[:, distance.clamp(0, self.table.shape[1] - 1)]


class Position(Protocol):
    """A built position encoding."""

    def __call__(self, positions: Tensor) -> Positional:
        """Turn positions (B or 1, T) int64 into this forward's tables."""

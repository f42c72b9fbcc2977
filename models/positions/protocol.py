"""Protocol of position encodings.

A spec builds a module; once per forward the module turns the positions of the tokens into a `Positional`, which every
attention layer then applies. So tables are made once, not once per layer.

B batch, T queries, S keys, H query heads, G key/value heads, d channels of a head, N rows of a table of distances.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn


class Relative(Protocol):
    """Relative position terms that depend on the query, the key or the value.

    Attributes:
        values: (N, d), added to the values by the row of their distance, or None.
    """

    values: Tensor | None

    def terms(self, q: Tensor, k: Tensor, distance: Tensor, scale: float, past: int, reach: int | None) -> Tensor:
        """Bias of the scores; the arguments are those of `Positional.terms`."""

    def rows(self, distance: Tensor) -> Tensor:
        """The row of `values` for each distance, in its shape."""


class Positional(NamedTuple):
    """One forward's positions, ready for use.

    Attributes:
        added: (B or 1, T, D), added to the token embeddings; None for encodings that act in the attention.
        cos, sin: (B or 1, 1, T, R) rotation tables in fp32 for the first 2R channels of a head; None: no rotation.
        interleaved: whether channels (2c, 2c + 1) are a pair, not (c, c + R).
        slopes: (H,) fp32 of each query head: its scores fall by so much for each token of distance.
        table: (H, N), added to the scores at the distances `first` to `first` + N - 1; others take the nearest entry.
        first: of the table: 0, or negative where it reaches keys ahead.
        relative: what is added to the scores depending on the query, and perhaps to the values.
    """

    added: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    interleaved: bool = False
    slopes: Tensor | None = None
    table: Tensor | None = None
    first: int = 0
    relative: Relative | None = None

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
        return self.slopes is not None or self.table is not None or self.relative is not None

    def bias(self, distance: Tensor) -> Tensor:
        """Position bias of the scores of queries that are `distance` (T, S) tokens behind their keys.

        Returns:
            (H, T, S), finite also for keys ahead (negative distance).
        """
        if self.slopes is not None:
            return -self.slopes[:, None, None] * distance.abs()
        return self.table[:, (distance - self.first).clamp(0, self.table.shape[1] - 1)]

    def terms(self, q: Tensor, k: Tensor, distance: Tensor, scale: float, past: int, reach: int | None) -> Tensor:
        """Position bias of the scores, also where it depends on the query and the key.

        Args:
            q: (B, H, T, d); any stretches of any sequences may be stacked in B.
            k: (B, G, S, d).
            distance: (T, S) tokens from each key to each query, negative for keys ahead.
            scale: of the scores, which what is read from the query has too.
            past: tokens before those that this was made for.
            reach: no pair that may be seen lies further apart; None: as far as the sequence goes.

        Returns:
            (H, T, S) or (B, H, T, S) in at least fp32; for pairs that may not be seen any finite number.
        """
        if self.relative is None:
            return self.bias(distance)
        return self.relative.terms(q, k, distance, scale, past, reach)


class Position(nn.Module):
    """A built position encoding."""

    def forward(self, positions: Tensor) -> Positional:
        """Turn positions (B or 1, T) int64 into this forward's tables."""
        raise NotImplementedError

"""The cache of a whole model: one layer cache per attention, and where each row of the batch stands."""

import torch
from torch import Tensor

from models.cache.protocol import LayerCache


class ModelCache:
    """State of one batch of generations.

    Attributes:
        layers: a layer cache per block; None for blocks without attention.
        length: tokens stored so far, padding included.
        capacity: tokens that fit.
        next_position: (B, 1) int64, position of the next token of each row in its document.
        documents: (B, length) document of every stored token, or None when no row is padded.
    """

    def __init__(self, layers: list[LayerCache | None], batch: int, capacity: int, device: torch.device) -> None:
        self.layers = layers
        self.capacity = capacity
        self.length = 0
        self.next_position = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.documents: Tensor | None = None

    def advance(self, positions: Tensor, documents: Tensor | None) -> None:
        """Record T new tokens at positions (B or 1, T); documents (B, T) or None."""
        self.length += positions.shape[1]
        self.next_position = positions[:, -1:] + 1  # (B or 1, 1)
        self.documents = documents

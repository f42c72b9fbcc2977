"""The cache of a whole model: one of every sub-layer that remembers, and where each row of the batch stands."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.cache.protocol import BlockCache, LayerCache


class ModelCache:
    """State of one batch of generations.

    Attributes:
        blocks: of every block, the caches of its sub-layers by their names.
        length: tokens stored so far, padding included.
        capacity: tokens that fit.
        next_position: (B, 1) int64, position of the next token of each row in its document.
        documents: (B, length) document of every stored token, or None when no row is padded.
    """

    def __init__(self, blocks: list[BlockCache], batch: int, capacity: int, device: torch.device) -> None:
        self.blocks = blocks
        self.capacity = capacity
        self.length = 0
        self.next_position = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.documents: Tensor | None = None

    def advance(self, positions: Tensor, documents: Tensor | None) -> None:
        """Record T new tokens at positions (B or 1, T); documents (B, T) or None."""
        self.length += positions.shape[1]
        self.next_position = positions[:, -1:] + 1  # (B or 1, 1)
        self.documents = documents

    @property
    def layers(self) -> list[LayerCache]:
        """The caches of all blocks, from the input to the output."""
        return [cache for block in self.blocks for cache in block.values()]

    @property
    def forks(self) -> bool:
        """Whether every layer can `fork`."""
        return all(layer.forks for layer in self.layers)

    def fork(self, parents: Sequence[int]) -> None:
        """Let row i of the batch go on from where row `parents[i]` is; of layers in pages, which are then shared."""
        for layer in self.layers:
            layer.fork(parents)
        if len(self.next_position) > 1:
            self.next_position = self.next_position[list(parents)]
        if self.documents is not None and len(self.documents) > 1:
            self.documents = self.documents[list(parents)]

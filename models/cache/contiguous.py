"""A cache that keeps every key and value of a layer in one buffer of fixed capacity."""

import torch
from torch import Tensor

from models.cache.protocol import Kept, KeyValueCache


class ContiguousCache(KeyValueCache):
    """Keys and values (B, G, capacity, head_width) of one layer, filled from the left."""

    def __init__(
        self, batch: int, kv_heads: int, capacity: int, head_width: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.keys = torch.empty(batch, kv_heads, capacity, head_width, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> Kept:
        """Store k, v (B, G, T, head_width) and return all that is stored."""
        end = self.length + k.shape[2]
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return Kept(self.keys[:, :, :end], self.values[:, :, :end], None)

    def bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

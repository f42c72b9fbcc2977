"""A cache that also keeps the buckets that each key was hashed to."""

import torch
from torch import Tensor

from models.cache.contiguous import ContiguousCache
from models.cache.protocol import Kept


class HashedCache(ContiguousCache):
    """Keys and values (B, H, capacity, head_width) and buckets (B, H, R, capacity) of R rounds of one layer."""

    def __init__(
        self, batch: int, heads: int, rounds: int, capacity: int, width: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(batch, heads, capacity, width, device, dtype)
        self.buckets = torch.empty(batch, heads, rounds, capacity, device=device, dtype=torch.int32)

    def append_hashed(self, k: Tensor, v: Tensor, buckets: Tensor) -> tuple[Kept, Tensor]:
        """Store k, v (B, H, T, head_width) and buckets (B, H, R, T) int64; return all that is stored."""
        start = self.length
        kept = self.append(k, v)
        self.buckets[..., start : self.length] = buckets
        return kept, self.buckets[..., : self.length].long()

    def bytes(self) -> int:
        return super().bytes() + self.buckets.nbytes

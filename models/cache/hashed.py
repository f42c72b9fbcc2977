"""A cache that also keeps the buckets that each key was hashed to."""

from collections.abc import Callable

import torch
from torch import Tensor

from models.cache.contiguous import ContiguousCache
from models.cache.protocol import Kept, ordered


class HashedCache(ContiguousCache):
    """Keys and values (B, H, capacity, head_width) and buckets (B, H, capacity, R) of R rounds of one layer."""

    def __init__(
        self, batch: int, heads: int, rounds: int, capacity: int, width: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(batch, heads, capacity, width, device, dtype)
        self.buckets = torch.zeros(batch, heads, capacity, rounds, device=device, dtype=torch.int32)

    def append_hashed(self, k: Tensor, v: Tensor, buckets: Tensor) -> tuple[Kept, Tensor]:
        """Store k, v (B, H, T, head_width) and buckets (B, H, R, T) int64; return all that is stored, in order."""
        begin, new = self.length, buckets.transpose(2, 3).int()  # (B, H, T, R)
        kept = self.append(k, v)
        if self.rows.even:
            self.buckets[:, :, begin : self.length] = new
        else:
            row, place, step = self.rows.slots(begin, k.shape[2], k.device)
            self.buckets[row, :, place] = new[row, :, step]
        stored = new if kept.key_positions is None and not self.rows.even else self.buckets[:, :, : self.length]
        stored = ordered(stored, kept.key_positions) if kept.by_row else stored
        return kept.in_order(), stored.transpose(2, 3).long()

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        super().each(change)
        self.buckets = change(self.buckets)

    def bytes(self) -> int:
        return super().bytes() + self.buckets.nbytes

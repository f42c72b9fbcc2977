"""A cache that keeps every key and value of a layer in one buffer of fixed capacity."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from models.cache.protocol import Kept, KeyValueCache


class ContiguousCache(KeyValueCache):
    """Keys and values (B, G, capacity, head_width) of one layer, each row filled from the left."""

    def __init__(
        self, batch: int, kv_heads: int, capacity: int, head_width: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.keys = torch.empty(batch, kv_heads, capacity, head_width, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.length = 0
        self._cleared = False  # whether places that no token was written to hold numbers

    def append(self, k: Tensor, v: Tensor) -> Kept:
        """Store k, v (B, G, T, head_width) and return all that is stored."""
        begin, end = self.length, self.length + k.shape[2]
        self.length = end
        if not self.rows.even:
            return self._append_rows(k, v, begin)
        self.keys[:, :, begin:end] = k
        self.values[:, :, begin:end] = v
        return Kept(self.keys[:, :, :end], self.values[:, :, :end], None)

    def _append_rows(self, k: Tensor, v: Tensor, begin: int) -> Kept:
        self._clear(begin)
        row, place, step = self.rows.slots(begin, k.shape[2], k.device)
        self.keys[row, :, place] = k[row, :, step].to(self.keys.dtype)
        self.values[row, :, place] = v[row, :, step].to(self.values.dtype)
        if begin == 0:
            return Kept(k, v, None)
        numbers = self.rows.numbers(self.length, k.device)  # (B, S)
        return Kept(self.keys[:, :, : self.length], self.values[:, :, : self.length], numbers)

    def _clear(self, begin: int) -> None:
        """Let rows that are shorter than the longest hold numbers up to its end, which nothing sees."""
        if not self._cleared:
            self.keys[:, :, begin:], self.values[:, :, begin:] = 0, 0
            self._cleared = True

    def shift(self, by: int) -> None:
        self._clear(self.length)
        self.length += by

    def put(self, row: int, other: Self, source: int) -> None:
        for cache in (self, other):
            cache._clear(cache.length)
        super().put(row, other, source)

    def check_shorten(self, counts: Sequence[int]) -> None:
        pass

    def shorten(self, by: Sequence[int], length: int) -> None:
        self.length = length

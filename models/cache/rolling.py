"""A cache that keeps the last tokens of a window and forgets the others."""

import torch
from torch import Tensor

from models.cache.protocol import Kept, KeyValueCache


class RollingCache(KeyValueCache):
    """Keys and values (B, G, window, head_width) of one layer; token number n lies in slot n % window."""

    def __init__(
        self, batch: int, kv_heads: int, window: int, head_width: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.keys = torch.empty(batch, kv_heads, window, head_width, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.numbers = torch.empty(window, dtype=torch.int64, device=device)  # of the token in each slot
        self.length = 0

    def append(self, k: Tensor, v: Tensor) -> Kept:
        """Store the last of k, v (B, G, T, head_width), and return what was there together with all of them, in order.

        For a single token what is stored is what it sees: nothing is copied, and the order is that of the slots.
        """
        new, window = k.shape[2], self.numbers.shape[0]
        filled = min(self.length, window)
        numbers = torch.arange(self.length, self.length + new, device=k.device)  # (T,)
        if filled == 0:
            seen = Kept(k, v, None)
        elif new > 1:
            earlier = torch.arange(self.length - filled, self.length, device=k.device)
            keys = torch.cat([self.keys[:, :, earlier % window], k], dim=2)  # (B, G, filled + T, head_width)
            values = torch.cat([self.values[:, :, earlier % window], v], dim=2)
            seen = Kept(keys, values, torch.cat([earlier, numbers]))
        slots = numbers[-window:] % window
        self.keys[:, :, slots] = k[:, :, -window:]
        self.values[:, :, slots] = v[:, :, -window:]
        self.numbers[slots] = numbers[-window:]
        self.length += new
        if new > 1 or filled == 0:
            return seen
        filled = min(self.length, window)
        return Kept(self.keys[:, :, :filled], self.values[:, :, :filled], self.numbers[:filled])

    def bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

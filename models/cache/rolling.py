"""A cache that keeps the last tokens of a window and forgets the others."""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.cache.protocol import Kept, KeyValueCache
from models.errors import UserError


class RollingCache(KeyValueCache):
    """Keys and values (B, G, window, head_width) of one layer; token number n lies in slot n % window."""

    def __init__(
        self, batch: int, kv_heads: int, window: int, head_width: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.keys = torch.zeros(batch, kv_heads, window, head_width, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
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

    def shift(self, by: int) -> None:
        self._move([by] * len(self.keys), self.length + by)

    def check_shorten(self, counts: Sequence[int]) -> None:
        window = self.numbers.shape[0]
        for count, start in zip(counts, self.rows.starts, strict=True):
            if count > 1 and self.length - start > window:
                raise UserError(
                    f"{count} tokens cannot be taken back: the cache of a window keeps {window} tokens, and those that "
                    "came before these are forgotten"
                )

    def shorten(self, by: Sequence[int], length: int) -> None:
        self._move(by, length)

    def _move(self, by: Sequence[int], length: int) -> None:
        """Add `by[i]` to the number of every token of row i."""
        window, device = self.numbers.shape[0], self.keys.device
        slots = torch.arange(window, device=device)
        from_ = (slots - torch.tensor(by, device=device)[:, None]) % window  # (B, window)
        index = from_[:, None, :, None].expand_as(self.keys)
        self.keys, self.values, self.length = self.keys.gather(2, index), self.values.gather(2, index), length
        self.numbers = length - 1 - (length - 1 - slots) % window

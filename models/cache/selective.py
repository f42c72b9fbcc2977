"""A cache that also keeps how far each token has been selected away, and may keep few of them.

B batch, G key/value heads, T new tokens, K tokens that are remembered, the new ones included.
"""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from models.cache.protocol import KeyValueCache

NOTHING = -1  # the column of an empty slot


class Remembered(NamedTuple):
    """Keys and values of a selective cache after the new tokens, in the order of the sequence.

    Attributes:
        keys, values: (B, G, K, head_width).
        columns: (B or 1, K) int64, which of the tokens so far these are, `NOTHING` for an empty slot; each row has its
            own tokens once some were dropped.
        selected: (B, K) in at least fp32, the sum of all earlier selections of each (F); 0 for the new ones.
        cache: that takes what becomes of them (`SelectiveCache.keep`); None: they are a whole sequence.
    """

    keys: Tensor
    values: Tensor
    columns: Tensor
    selected: Tensor
    cache: "SelectiveCache | None" = None


class SelectiveCache(KeyValueCache):
    """Keys, values and running sums F of one layer: of all tokens, or of `budget` of them in each row.

    With a budget, tokens that are not worth keeping leave their slot for good: memory stays that of `budget` tokens
    however long the sequence becomes, and that of the new tokens while they are computed.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_width: int,
        budget: int | None,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        slots = capacity if budget is None else min(budget, capacity)
        self.keys = torch.zeros(batch, kv_heads, slots, head_width, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.selected = torch.zeros(batch, slots, device=device, dtype=torch.promote_types(dtype, torch.float32))
        rows = 1 if budget is None else batch
        self.columns = torch.full((rows, slots), NOTHING, dtype=torch.int64, device=device)
        self.budget = budget
        self.length = 0  # tokens seen
        self.filled = 0  # slots in use, from the left

    def append(self, k: Tensor, v: Tensor) -> Remembered:
        """Append k, v (B, G, T, head_width) of the next T tokens to the keys and values that are kept."""
        new = k.shape[2]
        columns = torch.arange(self.length, self.length + new, device=k.device).expand(len(self.columns), -1)  # (., T)
        self.length += new
        if self.budget is None:
            begin, self.filled = self.filled, self.filled + new
            self.keys[:, :, begin : self.filled], self.values[:, :, begin : self.filled] = k, v
            self.columns[:, begin : self.filled] = columns
            seen = slice(self.filled)
            keys, values = self.keys[:, :, seen], self.values[:, :, seen]
            return Remembered(keys, values, self.columns[:, seen], self.selected[:, seen], self)
        kept = slice(self.filled)
        return Remembered(
            torch.cat([self.keys[:, :, kept], k], dim=2),
            torch.cat([self.values[:, :, kept], v], dim=2),
            torch.cat([self.columns[:, kept], columns], dim=1),
            F.pad(self.selected[:, kept], (0, new)),
            self,
        )

    def keep(self, memory: Remembered, selected: Tensor, worthy: Tensor | None) -> None:
        """Store what comes of the tokens that `append` returned.

        Args:
            memory: these.
            selected: (B, K) their sums F after the last query.
            worthy: (B, K) bool, which of them stay, at most `budget` in each row; None: all.
        """
        if worthy is None:
            self.selected[:, : self.filled] = selected
            return
        self.filled = min(self.budget, worthy.shape[1])
        order = (~worthy).byte().argsort(dim=1, stable=True)[:, : self.filled]  # (B, filled): those that stay, in order
        wide = order[:, None, :, None].expand(-1, self.keys.shape[1], -1, self.keys.shape[3])
        self.keys[:, :, : self.filled] = memory.keys.gather(2, wide)
        self.values[:, :, : self.filled] = memory.values.gather(2, wide)
        self.selected[:, : self.filled] = selected.gather(1, order)
        columns = memory.columns.gather(1, order)
        self.columns[:, : self.filled] = columns.where(worthy.gather(1, order), NOTHING)

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        super().each(change)
        self.selected = change(self.selected)
        if self.budget is not None:
            self.columns = change(self.columns)

    def shift(self, by: int) -> None:
        self.length += by
        if self.budget is not None:
            self.columns = torch.where(self.columns >= 0, self.columns + by, NOTHING)
            return
        self.keys, self.values, self.selected = (
            x.roll(by, dim) for x, dim in ((self.keys, 2), (self.values, 2), (self.selected, 1))
        )
        self.filled = self.length
        self.selected[:, self.filled :] = 0
        self.columns[:, : self.filled] = torch.arange(self.filled, device=self.columns.device)

    def put(self, row: int, other: Self, source: int) -> None:
        super().put(row, other, source)
        self.filled = max(self.filled, other.filled)

    def bytes(self) -> int:
        """Bytes of keys, values and running sums."""
        return self.keys.nbytes + self.values.nbytes + self.selected.nbytes

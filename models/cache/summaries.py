"""A cache of lists that grow at another pace in every row: the tokens of an open chunk, and summaries of earlier ones.

B batch, N entries that are kept, A entries that are added, m summaries of an entry, G key/value heads, d channels.
"""

from collections.abc import Callable
from typing import NamedTuple, Self

import torch
from torch import Tensor

from models.cache.protocol import LayerCache

ABSENT = -1  # where the document of an entry begins that is not there; padding begins below, and nothing else does


class Entries(NamedTuple):
    """Entries of a list: tokens, or nodes with their summaries.

    Attributes:
        inner: (B, N, E) what the layer makes later entries of.
        keys, values: (B, N, m * G * d).
        start: (B or 1, N) int64 where the entry's document begins, ABSENT where there is no entry.
        index: (B or 1, N) int64 number of the entry in its document.
    """

    inner: Tensor
    keys: Tensor
    values: Tensor
    start: Tensor
    index: Tensor

    def then(self, new: "Entries") -> "Entries":
        """These entries and the new ones behind them."""
        batch = len(self.keys)
        return Entries(
            *(torch.cat([a, b], 1) for a, b in zip(self[:3], new[:3], strict=True)),
            *(torch.cat([a.expand(batch, -1), b.expand(batch, -1)], 1) for a, b in zip(self[3:], new[3:], strict=True)),
        )


class Tail:
    """The last entries of one list. Those of every row end at the same place, and what is before its first is absent.

    Attributes:
        buffers: of `capacity` entries in each row, filled from the right.
        count: entries that the fullest row may have.
    """

    def __init__(
        self, batch: int, capacity: int, channels: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> None:
        inner, heads, second = (
            torch.zeros(batch, capacity, width, device=device, dtype=dtype) for width in (*channels, channels[1])
        )
        start = torch.full((batch, capacity), ABSENT, dtype=torch.int64, device=device)
        self.buffers = Entries(inner, heads, second, start, torch.zeros_like(start))
        self.capacity, self.count = capacity, 0

    def kept(self) -> Entries:
        """The entries that are stored."""
        return Entries(*(buffer[:, self.capacity - self.count :] for buffer in self.buffers))

    def keep(self, whole: Entries, added: Tensor, count: int) -> None:
        """Replace what is there by its continuation.

        Args:
            whole: what is there and A new entries behind it.
            added: (B or 1, 1) int64, how many of the A are entries of the row; they come first.
            count: how many of the last entries to keep, at most `capacity`.
        """
        batch, end = len(whole.keys), self.count + added  # (B or 1, 1)
        places = (end - count + torch.arange(count, device=added.device)).expand(batch, -1)  # (B, count)
        there, places = places >= 0, places.clamp(min=0)
        for buffer, part in zip(self.buffers, whole, strict=True):
            index = places if part.ndim == 2 else places[..., None].expand(-1, -1, part.shape[2])
            buffer[:, self.capacity - count :] = part.gather(1, index)
        self.buffers.start[:, self.capacity - count :].masked_fill_(~there, ABSENT)
        self.count = count

    def shift(self, by: int) -> None:
        start = self.buffers.start
        self.buffers = self.buffers._replace(start=torch.where(start < 0, start, start + by))

    def bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers[:3])


class SummaryCache(LayerCache):
    """The lists of one layer, its tokens first. Beside the bytes that it counts, two integers tell an entry's place."""

    def __init__(self, lists: list[Tail]) -> None:
        self.lists = lists

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        for tail in self.lists:
            tail.buffers = Entries(*map(change, tail.buffers))

    def shift(self, by: int) -> None:
        for tail in self.lists:
            tail.shift(by)

    def put(self, row: int, other: Self, source: int) -> None:
        for mine, theirs in zip(self.lists, other.lists, strict=True):
            for tail in (mine, theirs):  # what was there before the entries that it keeps now
                tail.buffers.start[:, : tail.capacity - tail.count] = ABSENT
            mine.count = max(mine.count, theirs.count)
        super().put(row, other, source)

    def bytes(self) -> int:
        return sum(tail.bytes() for tail in self.lists)

"""A cache in pages: room is taken as rows grow, and rows that began alike share it (arXiv 2309.06180, section 4).

B rows, G key/value heads, T new tokens, P pages of the pool, n pages of a row, d channels of a head.
"""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from models.cache.contiguous import ContiguousCache
from models.cache.protocol import Kept, KeyValueCache
from models.errors import UserError


class PagedCache(KeyValueCache):
    """Keys and values of one layer in a pool of pages, each of them of `page` tokens and read by any number of rows.

    What a query sees is copied out of the pages in every step; a kernel that reads the table would save that.

    Attributes:
        keys, values: (P, G, page, d), the pool; it grows when it is full.
        tables: of every row, the numbers of its pages in the order of its tokens.
        readers: how many rows read each page of the pool.
        free: pages that no row reads.
    """

    forks = True

    def __init__(
        self, batch: int, kv_heads: int, page: int, head_width: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        if page < 1:
            raise UserError(f"a page holds at least 1 token, got {page}")
        self.page = page
        self.keys = torch.empty(0, kv_heads, page, head_width, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.tables: list[list[int]] = [[] for _ in range(batch)]
        self.readers: list[int] = []
        self.free: list[int] = []
        self.length = 0
        self._table = self._as_tensor()

    @classmethod
    def like(cls, cache: ContiguousCache, page: int, device: torch.device) -> Self:
        """An empty cache in place of a contiguous one, which may be on the meta device."""
        batch, kv_heads, _, head_width = cache.keys.shape
        return cls(batch, kv_heads, page, head_width, device, cache.keys.dtype)

    def append(self, k: Tensor, v: Tensor) -> Kept:
        """Store k, v (B, G, T, d) and return all that is stored, in the order of the tokens."""
        new = k.shape[2]
        self._make_room(new)
        numbers = torch.arange(self.length, self.length + new, device=k.device)
        pages, places = self._table[:, numbers // self.page], numbers % self.page  # (B, T), (T,)
        self.keys[pages, :, places] = k.transpose(1, 2)  # (B, T, G, d)
        self.values[pages, :, places] = v.transpose(1, 2)
        self.length += new
        return Kept(self._gather(self.keys), self._gather(self.values), None)

    def fork(self, parents: Sequence[int]) -> None:
        """Let row i go on from where row `parents[i]` is; their pages are shared until one of them writes.

        Any number of rows may go on from the same one. A row that none goes on from gives back its pages.
        """
        before, self.tables = self.tables, [list(self.tables[parent]) for parent in parents]
        for number in (number for table in self.tables for number in table):
            self.readers[number] += 1
        for number in (number for table in before for number in table):
            self._leave(number)
        self._table = self._as_tensor()

    def bytes(self) -> int:
        """Bytes of the pages that are read by some row."""
        return (len(self.readers) - len(self.free)) * (self.keys[:1].nbytes + self.values[:1].nbytes)

    def _make_room(self, new: int) -> None:
        """Give every row pages for `new` tokens that it may write to."""
        count = -(-(self.length + new) // self.page)
        missing = count - -(-self.length // self.page)
        partial = self.length // self.page if self.length % self.page else None
        shared = []
        if partial is not None:
            readers = list(self.readers)
            for table in self.tables:
                if readers[table[partial]] > 1:  # the last reader of a page keeps it
                    readers[table[partial]] -= 1
                    shared.append(table)
        if not missing and not shared:
            return
        self._grow(missing * len(self.tables) + len(shared))
        copies = [(table[partial], self._take()) for table in shared]
        for table, (source, target) in zip(shared, copies, strict=True):
            table[partial] = target
            self._leave(source)
        if copies:
            sources, targets = (list(numbers) for numbers in zip(*copies, strict=True))
            self.keys[targets], self.values[targets] = self.keys[sources], self.values[sources]
        for table in self.tables:
            table += [self._take() for _ in range(missing)]
        self._table = self._as_tensor()

    def _grow(self, wanted: int) -> None:
        """Have at least so many free pages; the pool is at least doubled, so that a token costs O(1) copies."""
        if wanted <= len(self.free):
            return
        more = max(wanted - len(self.free), len(self.readers))
        with torch.inference_mode(False):  # the pool may be written outside the mode in which it has grown
            self.keys, self.values = (
                torch.cat([pool, pool.new_empty(more, *pool.shape[1:])]) for pool in (self.keys, self.values)
            )
        self.free += range(len(self.readers), len(self.readers) + more)
        self.readers += [0] * more

    def _take(self) -> int:
        number = self.free.pop()
        self.readers[number] = 1
        return number

    def _leave(self, number: int) -> None:
        self.readers[number] -= 1
        if not self.readers[number]:
            self.free.append(number)

    def _as_tensor(self) -> Tensor:
        """The tables as (B, n) int64."""
        return torch.tensor(self.tables, dtype=torch.int64, device=self.keys.device)

    def _gather(self, pool: Tensor) -> Tensor:
        """Stored keys or values of the rows from a pool (P, G, page, d), as (B, G, tokens, d)."""
        return pool[self._table].transpose(1, 2).flatten(2, 3)[:, :, : self.length]

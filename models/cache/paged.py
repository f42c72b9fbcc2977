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
        begin, new = self.length, k.shape[2]
        self._make_room(new)
        self.length += new
        if self.rows.even:
            place = torch.arange(begin, self.length, device=k.device)  # (T,)
            pages, k_new, v_new = self._table[:, place // self.page], k.transpose(1, 2), v.transpose(1, 2)
        else:
            row, place, step = self.rows.slots(begin, new, k.device)
            pages, k_new, v_new = self._table[row, place // self.page], k[row, :, step], v[row, :, step]
        self.keys[pages, :, place % self.page] = k_new  # (B, T, G, d)
        self.values[pages, :, place % self.page] = v_new
        if begin == 0 and not self.rows.even:
            return Kept(k, v, None)
        numbers = None if self.rows.even else self.rows.numbers(self.length, k.device)
        return Kept(self._gather(self.keys), self._gather(self.values), numbers)

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

    def shift(self, by: int) -> None:
        self.length += by

    def put(self, row: int, other: Self, source: int) -> None:
        """Copy what a row of another cache has stored to pages of this one."""
        place = torch.arange(other._lengths(other.length)[source], device=self.keys.device)  # (n,)
        for number in self.tables[row]:
            self._leave(number)
        count = -(-len(place) // self.page)
        self._grow(count)
        self.tables[row] = [self._take() for _ in range(count)]
        self._table = self._as_tensor()
        theirs, mine = other._table[source, place // other.page], self._table[row, place // self.page]
        self.keys[mine, :, place % self.page] = other.keys[theirs, :, place % other.page]
        self.values[mine, :, place % self.page] = other.values[theirs, :, place % other.page]

    def check_shorten(self, counts: Sequence[int]) -> None:
        pass

    def shorten(self, by: Sequence[int], length: int) -> None:
        for table, more, stored in zip(self.tables, by, self._lengths(self.length), strict=True):
            left = stored - (self.length + more - length)
            while len(table) > -(-left // self.page):
                self._leave(table.pop())
        self._table, self.length = self._as_tensor(), length

    def bytes(self) -> int:
        """Bytes of the pages that are read by some row."""
        return (len(self.readers) - len(self.free)) * (self.keys[:1].nbytes + self.values[:1].nbytes)

    def _lengths(self, length: int) -> list[int]:
        """Tokens of each row where the longest has `length`."""
        starts = [0] * len(self.tables) if self.rows.even else self.rows.starts
        return [max(0, length - start) for start in starts]

    def _make_room(self, new: int) -> None:
        """Give every row pages for `new` tokens that it may write to."""
        before, after = self._lengths(self.length), self._lengths(self.length + new)
        missing = [-(-length // self.page) - len(table) for table, length in zip(self.tables, after, strict=True)]
        readers, shared = list(self.readers), []
        for table, length in zip(self.tables, before, strict=True):
            if length % self.page and readers[table[-1]] > 1:  # the last reader of a page keeps it
                readers[table[-1]] -= 1
                shared.append(table)
        if not any(missing) and not shared:
            return
        self._grow(sum(missing) + len(shared))
        copies = [(table[-1], self._take()) for table in shared]
        for table, (source, target) in zip(shared, copies, strict=True):
            table[-1] = target
            self._leave(source)
        if copies:
            sources, targets = (list(numbers) for numbers in zip(*copies, strict=True))
            self.keys[targets], self.values[targets] = self.keys[sources], self.values[sources]
        for table, count in zip(self.tables, missing, strict=True):
            table += [self._take() for _ in range(count)]
        self._table = self._as_tensor()

    def _grow(self, wanted: int) -> None:
        """Have at least so many free pages; the pool is at least doubled, so that a token costs O(1) copies."""
        if wanted <= len(self.free):
            return
        more = max(wanted - len(self.free), len(self.readers))
        with torch.inference_mode(False):  # the pool may be written outside the mode in which it has grown
            self.keys, self.values = (
                torch.cat([pool, pool.new_zeros(more, *pool.shape[1:])]) for pool in (self.keys, self.values)
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
        """The tables as (B, n) int64, those of shorter rows filled up with a page that they do not read."""
        most = max(map(len, self.tables), default=0)
        tables = [table + [0] * (most - len(table)) for table in self.tables]
        return torch.tensor(tables, dtype=torch.int64, device=self.keys.device)

    def _gather(self, pool: Tensor) -> Tensor:
        """Stored keys or values of the rows from a pool (P, G, page, d), as (B, G, tokens, d)."""
        return pool[self._table].transpose(1, 2).flatten(2, 3)[:, :, : self.length]

"""The cache of a whole model: one of every sub-layer that remembers, and where each row of the batch stands."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from models.cache.protocol import BlockCache, LayerCache
from models.cache.rows import Rows
from models.errors import UserError


class ModelCache:
    """State of one batch of generations, whose rows may be of other lengths (models/cache/rows.py).

    Attributes:
        blocks: of every block, the caches of its sub-layers by their names.
        rows: where each row begins.
        length: tokens of the longest row so far.
        capacity: tokens that fit into a row.
        next_position: (B or 1, 1) int64, position of the next token of each row in its document.
        given: (B, length) documents of all tokens, where the forwards were given them.
    """

    def __init__(self, blocks: list[BlockCache], rows: Rows, capacity: int, device: torch.device) -> None:
        self.blocks, self.rows, self.capacity, self.device = blocks, rows, capacity, device
        self.length = 0
        self.next_position = torch.zeros(len(rows.starts), 1, dtype=torch.int64, device=device)
        self.given: Tensor | None = None

    @property
    def layers(self) -> list[LayerCache]:
        """The caches of all blocks, from the input to the output."""
        return [cache for block in self.blocks for cache in block.values()]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return [max(0, self.length - start) for start in self.rows.starts]

    def begin(self, lengths: Sequence[int]) -> None:
        """Say before the first tokens how many each row has of them: those of the shorter ones end with the others'."""
        if self.length:
            raise UserError(f"rows begin before their first token, and these have {self.length}")
        self.rows.begin_at([max(lengths) - length for length in lengths])

    def documents(self, count: int = 0, new: Tensor | None = None) -> Tensor | None:
        """Documents (B, S) of all tokens and `count` more, whose own are `new` (B, count) if they are given.

        None: all rows are as long, and of one document each.
        """
        if new is None and self.given is None:
            return None if self.rows.even else self.rows.documents(self.length + count, self.device)
        if self.length == 0:
            return new if self.rows.even else new.minimum(self.rows.documents(count, self.device))
        if self.given is None:
            raise UserError(
                f"documents are given behind {self.length} cached tokens without any: give them from the first token on"
            )
        new = self.given[:, -1:].expand(-1, count) if new is None else new  # (B, count)
        return torch.cat([self.given, new], dim=1)

    def advance(self, positions: Tensor, documents: Tensor | None) -> None:
        """Record T new tokens at positions (B or 1, T); documents (B, S) of all tokens so far, if they are given."""
        self.length += positions.shape[1]
        self.next_position = positions[:, -1:] + 1  # (B or 1, 1)
        self.given = documents

    def fork(self, parents: Sequence[int]) -> None:
        """Let row i of the batch go on from where row `parents[i]` is; layers in pages share those."""
        for layer in self.layers:
            layer.fork(parents)
        if len(self.next_position) > 1:
            self.next_position = self.next_position[list(parents)]
        if self.given is not None and len(self.given) > 1:
            self.given = self.given[list(parents)]
        self.rows.begin_at([self.rows.starts[parent] for parent in parents])
        self._begin_with_the_longest()

    def shorten(self, counts: Sequence[int]) -> None:
        """Take back the last `counts[i]` tokens of row i.

        Raises:
            UserError: more tokens than there are, or a layer that cannot (it has forgotten what came before, or keeps
                sums); then nothing has changed.
        """
        self._check_rows("shortened")
        before = self.lengths
        for row, (length, count) in enumerate(zip(before, counts, strict=True)):
            if not 0 <= count <= length:
                raise UserError(f"row {row} has {length} tokens, of which {count} cannot be taken back")
        if any(counts):
            for layer in self.layers:
                layer.check_shorten(counts)
        after = [length - count for length, count in zip(before, counts, strict=True)]
        starts = [max(after) - length for length in after]
        by = [new - old for new, old in zip(starts, self.rows.starts, strict=True)]
        for layer in self.layers:
            layer.shorten(by, max(after))
        self.length = max(after)
        self.rows.begin_at(starts)
        self.next_position = self.next_position - torch.tensor(counts, device=self.device)[:, None]

    def put(self, row: int, other: Self, source: int = 0) -> None:
        """Replace a row by row `source` of another cache of the same model and capacity.

        Raises:
            UserError: documents were given, capacities differ, or tokens pass by a layer; then nothing has changed.
        """
        for cache in (self, other):
            cache._check_rows("replaced")
        if other.capacity != self.capacity:
            raise UserError(f"a row of a cache for {self.capacity} tokens cannot be of one for {other.capacity}")
        if list(map(type, other.layers)) != list(map(type, self.layers)):
            raise UserError("a row cannot be replaced by one of a cache of other kinds; give both the same pages")
        by = other.length - self.length
        (self if by > 0 else other).shift(abs(by))
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.put(row, theirs, source)
        starts = self.rows.starts
        self.rows.begin_at([*starts[:row], other.rows.starts[source], *starts[row + 1 :]])
        self.next_position = self.next_position.repeat(len(starts) // len(self.next_position), 1)
        self.next_position[row] = other.next_position[source if len(other.next_position) > 1 else 0]
        for cache in (self, other):
            cache._begin_with_the_longest()

    def shift(self, by: int) -> None:
        """Add `by` to the number of every token."""
        if by:
            for layer in self.layers:
                if layer.rows is self.rows:
                    layer.shift(by)
            self.length += by
            self.rows.begin_at([start + by for start in self.rows.starts])

    def _begin_with_the_longest(self) -> None:
        """Let the longest row begin with number 0."""
        self.shift(-min(self.rows.starts, default=0))

    def _check_rows(self, changed: str) -> None:
        if self.given is not None:
            raise UserError(f"rows cannot be {changed} where documents were given with their tokens")
        if any(layer.rows is not self.rows for layer in self.layers):
            raise UserError(
                f"rows cannot be {changed} where tokens pass by a layer (depth): its cache does not know which it holds"
            )

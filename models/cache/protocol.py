"""Protocol of layer caches, whichever tokens they keep."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from models.cache.rows import Rows
from models.errors import UserError

EVEN = Rows(0)  # of a cache whose rows are all as long


class Kept(NamedTuple):
    """Keys and values in a cache after the new tokens.

    Attributes:
        keys, values: (B, G, K, head_width).
        key_positions: which of the S tokens so far these are: (K,) int64 in any order; or (B, K), each row's own from
            its first token on, in order, S and more where it has no more; None: all of them, in order.
    """

    keys: Tensor
    values: Tensor
    key_positions: Tensor | None

    @property
    def by_row(self) -> bool:
        """Whether each row holds tokens of its own numbers."""
        return self.key_positions is not None and self.key_positions.ndim == 2

    def in_order(self) -> Self:
        """The same, so that all rows end at the same place; what is before the first token of a row is anything."""
        if not self.by_row:
            return self
        return Kept(*(ordered(x, self.key_positions) for x in (self.keys, self.values)), None)


def ordered(x: Tensor, key_positions: Tensor) -> Tensor:
    """Rows x (B, G, S, d) of the numbers (B, S) that `Kept.key_positions` says, moved behind each other's end."""
    index = (torch.arange(x.shape[2], device=x.device) - key_positions[:, :1]).clamp(min=0)  # (B, S)
    return x.gather(2, index[:, None, :, None].expand_as(x))


class LayerCache:
    """State of one layer over the tokens so far. Only the layer's own sub-layer knows more about it than this.

    Attributes:
        rows: how long each row is, shared by the caches of a model; `EVEN` where places are not counted by them.
    """

    rows: Rows = EVEN

    def bytes(self) -> int:
        """Bytes that the cache occupies."""
        raise NotImplementedError

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put `change` of it in the place of every tensor (B, ...) that has an entry for each row."""
        raise NotImplementedError

    def fork(self, parents: Sequence[int]) -> None:
        """Let row i go on from where row `parents[i]` is."""
        with torch.inference_mode(False):  # it may be written outside the mode
            self.each(lambda x: x[list(parents)])

    def shift(self, by: int) -> None:
        """Add `by` to the number of every token; no row has a token of a number below 0 then."""
        raise NotImplementedError

    def put(self, row: int, other: Self, source: int) -> None:
        """Replace a row by row `source` of another cache of the same layer, whose rows end at the same number."""
        theirs: list[Tensor] = []
        other.each(lambda x: theirs.append(x) or x)
        found = iter(theirs)

        def replace(mine: Tensor) -> Tensor:
            mine[row] = next(found)[source]
            return mine

        self.each(replace)

    def check_shorten(self, counts: Sequence[int]) -> None:
        """Raise UserError where the last `counts[i]` tokens of row i cannot be taken back."""
        raise UserError(
            f"rows cannot be shortened: a {type(self).__name__} keeps what tokens have become together, and none "
            "can be taken out of it"
        )

    def shorten(self, by: Sequence[int], length: int) -> None:
        """Add `by[i]` to the number of every token of row i, and forget those from number `length` on."""
        raise NotImplementedError


BlockCache = dict[str, LayerCache]  # of each sub-layer that remembers something, by its name; of `depth` too


class KeyValueCache(LayerCache):
    """Keys and values of one layer.

    Attributes:
        keys, values: (B, ...).
        length: tokens of the longest row so far.
    """

    keys: Tensor
    values: Tensor
    length: int

    def append(self, k: Tensor, v: Tensor) -> Kept:
        """Add k, v (B, G, T, head_width) of the next T tokens, and return what their queries can see."""
        raise NotImplementedError

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.keys, self.values = change(self.keys), change(self.values)

    def bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

"""Protocol of layer caches, whichever tokens they keep."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Kept(NamedTuple):
    """Keys and values in a cache after the new tokens.

    Attributes:
        keys, values: (B, G, K, head_width).
        key_positions: (K,) int64, which of the S tokens so far these are, in any order; None: all of them, in order.
    """

    keys: Tensor
    values: Tensor
    key_positions: Tensor | None


class LayerCache:
    """State of one layer over the tokens so far. Only the layer's own attention knows more about it than this.

    Attributes:
        forks: whether rows can go on from other rows (`fork`).
    """

    forks = False

    def bytes(self) -> int:
        """Bytes that the cache occupies."""
        raise NotImplementedError

    def fork(self, parents: Sequence[int]) -> None:
        """Let row i go on from where row `parents[i]` is."""
        raise NotImplementedError


BlockCache = dict[str, LayerCache]  # of each sub-layer that remembers something, by its name; of `depth` too


class KeyValueCache(LayerCache):
    """Keys and values of one layer."""

    def append(self, k: Tensor, v: Tensor) -> Kept:
        """Add k, v (B, G, T, head_width) of the next T tokens, and return what their queries can see."""
        raise NotImplementedError

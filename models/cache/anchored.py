"""A cache that keeps a rolling window and the first tokens of the current document of each row.

B batch, G key/value heads, T new tokens, X anchors, d channels of a head.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from models.cache.protocol import Kept, LayerCache
from models.cache.rolling import RollingCache


class Anchored(NamedTuple):
    """The first tokens of a document.

    Attributes:
        keys, values, own_keys, own_values: (B, G, X, d): what ordinary queries see of them, and what they see of
            each other; zeros where a token has not come yet.
        starts: (B or 1,) int64, number of the first of them.
    """

    keys: Tensor
    values: Tensor
    own_keys: Tensor
    own_values: Tensor
    starts: Tensor


class AnchoredCache(LayerCache):
    """Keys and values of one layer: the last `window` tokens, and two of each for `anchors` first ones."""

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        window: int,
        anchors: int,
        head_width: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.recent = RollingCache(batch, kv_heads, window, head_width, device, dtype)
        self.anchors = torch.zeros(4, batch, kv_heads, anchors, head_width, device=device, dtype=dtype)
        self.starts = torch.zeros(1, dtype=torch.int64, device=device)

    def anchored(self) -> Anchored:
        """The anchors as they are before the next tokens."""
        return Anchored(*self.anchors, self.starts)

    def append(self, k: Tensor, v: Tensor, own_k: Tensor, own_v: Tensor, starts: Tensor) -> Kept:
        """Store the next T tokens.

        Args:
            k, v: (B, G, T, d).
            own_k, own_v: (B, G, M, d) of the first M of them, among which are all anchors.
            starts: (B or 1, T) int64, number of the first token of each token's document.

        Returns:
            What the window keeps together with the new tokens.
        """
        past, count = self.recent.length, self.anchors.shape[3]
        if own_k.shape[2]:
            self.starts = starts[:, -1]
            places = self.starts[:, None] + torch.arange(count, device=k.device) - past  # (B or 1, X)
            new = ((places >= 0) & (places < k.shape[2]))[:, None, :, None]
            index = places.clamp(0, own_k.shape[2] - 1)[:, None, :, None].expand(*k.shape[:2], -1, k.shape[3])
            found = torch.stack([x.gather(2, index) for x in (k, v, own_k, own_v)])  # (4, B, G, X, d)
            self.anchors = torch.where(new, found.to(self.anchors.dtype), self.anchors)
        return self.recent.append(k, v)

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.recent.each(change)
        self.starts = change(self.starts.expand(self.anchors.shape[1]).clone())
        self.anchors = change(self.anchors.transpose(0, 1)).transpose(0, 1)

    def shift(self, by: int) -> None:
        self.recent.shift(by)
        self.starts = self.starts + by

    def bytes(self) -> int:
        return self.recent.bytes() + self.anchors.nbytes

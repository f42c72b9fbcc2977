"""A cache that keeps a rolling window, a summary of every complete block, and the inputs of the open one.

B batch, G key/value heads, T new tokens, N summaries, C of them new, d channels of a head, D model width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from models.cache.protocol import Kept, LayerCache
from models.cache.rolling import RollingCache


class TransientCache(LayerCache):
    """Of one layer: the last `window` keys and values, those of the summaries, and the last `block` - 1 inputs.

    The inputs, and not their running sum, since they are exact in every dtype.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        window: int,
        sizes: tuple[int, int],
        widths: tuple[int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Sizes: tokens of a block, tokens of a whole sequence. Widths: of a head, of the model."""
        (block, capacity), (head_width, width) = sizes, widths
        self.recent = RollingCache(batch, kv_heads, window, head_width, device, dtype)
        self.summaries = torch.zeros(2, batch, kv_heads, capacity // block, head_width, device=device, dtype=dtype)
        self.inputs = torch.zeros(batch, min(block - 1, capacity), width, device=device, dtype=dtype)

    def append(self, k: Tensor, v: Tensor) -> Kept:
        """Store k, v (B, G, T, d) of the next T tokens; see `RollingCache.append`."""
        return self.recent.append(k, v)

    def extend(self, x: Tensor) -> Tensor:
        """Store the inputs x (B, T, D), and return the last ones before them together with them."""
        inputs = torch.cat([self.inputs, x.to(self.inputs.dtype)], dim=1)  # (B, block - 1 + T, D)
        self.inputs = inputs[:, x.shape[1] :].clone()
        return inputs

    def summarise(self, k: Tensor, v: Tensor, done: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Store new summaries and return the first N of all.

        Args:
            k, v: (B, G, C, d), in each row those that it does not have last.
            done: (B or 1, 1) int64, how many each row has already.
            count: N.

        Returns:
            Their keys and values (B, G, N, d) each.
        """
        if k.shape[2]:
            numbers = torch.arange(count, device=k.device)
            index = (numbers - done).clamp(0, k.shape[2] - 1)[:, None, :, None].expand(*k.shape[:2], -1, k.shape[3])
            found = torch.stack([k.gather(2, index), v.gather(2, index)])  # (2, B, G, N, d)
            old = (numbers < done)[:, None, :, None]
            self.summaries[..., :count, :] = torch.where(old, self.summaries[..., :count, :], found)
        k, v = self.summaries[..., :count, :]
        return k, v

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.recent.each(change)
        self.summaries = change(self.summaries.transpose(0, 1)).transpose(0, 1)
        self.inputs = change(self.inputs)

    def shift(self, by: int) -> None:
        self.recent.shift(by)

    def bytes(self) -> int:
        return self.recent.bytes() + self.summaries.nbytes + self.inputs.nbytes

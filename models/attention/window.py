"""Sliding-window attention: query i sees the keys i - window < j <= i (Mistral, arXiv 2310.06825, section 2).

B batch, H query heads, G key/value heads, T tokens, w window, d channels of a head.

No T x T matrix is made: time and memory are O(T w) (models/attention/blocks.py).
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from models.attention.blocks import Band, attend_band
from models.attention.full import Full, FullAttention, token_distance
from models.attention.protocol import ATTENTIONS, Context, Place
from models.attention.standard import Visible, attend
from models.cache import Kept, KeyValueCache, RollingCache
from models.errors import UserError


@ATTENTIONS.register("window")
@dataclass(frozen=True, kw_only=True)
class Window(Full):
    """Causal attention over the last tokens; all other options are those of `full`.

    Args:
        window: tokens that a query sees, itself included.
    """

    sees_all = False
    directions = ("causal",)
    directions_because = "its window lies behind the token"

    window: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise UserError(f"window must be at least 1 token, got {self.window}")

    def build(self, place: Place) -> nn.Module:
        return WindowAttention(self, place)

    def flops_per_token(self, width: int, length: int) -> int:
        return super().flops_per_token(width, min(length, self.window))

    def cache_elements(self, tokens: int) -> int:
        return super().cache_elements(min(tokens, self.window))


class WindowAttention(FullAttention):
    """The module of `Window`."""

    def __init__(self, spec: Window, place: Place) -> None:
        super().__init__(spec, place)
        self.window = spec.window
        self.band = Band(before=spec.window - 1, after=0)

    def mix(self, q: Tensor, kept: Kept, context: Context) -> Tensor:
        if kept.columns is None and q.shape[2] > self.window:
            documents = None if context.documents is None else (context.documents, context.documents)
            scoring = partial(self.scoring, context=context)
            return attend_band(q, kept.keys, kept.values, self.band, scoring, documents, dropout=self.drop())
        return self._at_once(q, kept, context)

    def _at_once(self, q: Tensor, kept: Kept, context: Context) -> Tensor:
        """All queries over all keys that are kept: for few tokens, and behind a cache."""
        distance = token_distance(q, kept, context)  # (T, K)
        mask = self.band.holds(distance)[None, None]  # (1, 1, T, K)
        if context.documents is not None:
            columns = context.past + torch.arange(q.shape[2], device=q.device)
            own = context.documents[:, columns]  # (B, T)
            theirs = context.documents if kept.columns is None else context.documents[:, kept.columns]  # (B, K)
            mask = mask & (own[:, :, None] == theirs[:, None, :])[:, None]
        scoring = self.scoring(q, kept.keys, distance, context)
        return attend(q, kept.keys, kept.values, Visible(mask, causal=False), scoring, self.drop())

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> KeyValueCache:
        kept = min(self.window, capacity)
        return RollingCache(batch, self.kv_heads, kept, self.head_width, device, dtype)

"""Sliding windows, plain and dilated (Mistral, arXiv 2310.06825, section 2; Longformer, 2004.05150, section 3.1).

B batch, H query heads, G key/value heads, T tokens, K keys that are kept, w window, D dilation, d channels of a head.

    decoder   i - w D < j <= i       w keys, and with D above 1 every D-th token: (i - j) mod D = 0
    encoder   |i - j| <= w D / 2     w + 1 keys, w even (Longformer's and ModernBERT's convention), likewise

No T x T matrix is made: time and memory are O(T w), also with a dilation (models/attention/kernels/banded.py).
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.full import Full, FullAttention, token_distance
from models.attention.kernels.banded import Band, attend_band
from models.attention.kernels.flex import attend_flex
from models.attention.kernels.sdpa import AttentionMask, attend
from models.attention.protocol import ForwardInputs
from models.cache import Kept, KeyValueCache, RollingCache
from models.errors import UserError
from models.specs import ATTENTIONS, LayerContext


@ATTENTIONS.register("window")
@dataclass(frozen=True, kw_only=True)
class Window(Full):
    """Attention over the tokens near by; all other options are those of `full`.

    Args:
        window: in a decoder, tokens that a query sees, itself included; in an encoder, tokens around it that it sees
            besides itself, half of them on each side.
        dilation: distance between the tokens that it sees.
    """

    needs_mask = False
    position_types = ("rotation", "scores", "queries")

    window: int
    dilation: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("window", "dilation"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1 token, got {getattr(self, name)}")

    def build(self, place: LayerContext) -> nn.Module:
        return WindowAttention(self, place)

    def flops_per_token(self, width: int, length: int) -> int:
        return super().flops_per_token(width, min(length, self.window))

    def cache_elements(self, tokens: int) -> int:
        return super().cache_elements(min(tokens, self.span()))

    def extras(self) -> list[str]:
        return super().extras() + ["dilation"] * (self.dilation > 1)

    def span(self) -> int:
        """Tokens from the first to the last that a query of a decoder sees."""
        return (self.window - 1) * self.dilation + 1

    def check(self, direction: str) -> None:
        """Raise UserError for an odd window in an encoder."""
        if direction == "bidirectional" and self.window % 2:
            raise UserError(f"window must be even in an encoder, half of it on each side of a token, got {self.window}")

    def band(self, bidirectional: bool) -> Band:
        """The keys that a query sees."""
        if not bidirectional:
            return Band(before=self.window - 1, after=0, dilation=self.dilation)
        return Band(before=self.window // 2, after=self.window // 2, dilation=self.dilation)


class WindowAttention(FullAttention):
    """The module of `Window`."""

    def __init__(self, spec: Window, place: LayerContext) -> None:
        super().__init__(spec, place)
        self.window, self.span, self.band = spec.window, spec.span(), spec.band(place.bidirectional)
        self.reach = self.band.before * self.band.dilation

    def flex_bands(self) -> tuple[Band | None, ...]:
        return (self.band,) if self.kernel == "flex" else ()

    def mix(self, q: Tensor, kept: Kept, inputs: ForwardInputs) -> Tensor:
        if self.kernel == "flex" and (mask := inputs.block_masks.get(self.band)) is not None:
            return attend_flex(q, kept.keys, kept.values, mask, self.scale)
        if q.shape[2] <= self.window:
            return self._at_once(q, kept, inputs)
        keys = kept.keys.shape[2]
        early = keys - q.shape[2]  # tokens that are kept from before the new ones, which now ask nothing
        documents = None if inputs.documents is None else (inputs.documents[:, -keys:],) * 2  # (B or 1, K)
        q = F.pad(q, (0, 0, early, 0))  # (B, H, K, d)
        scoring = partial(self.scoring, inputs=inputs)
        y = attend_band(q, kept.keys, kept.values, self.band, scoring, documents, dropout=self.drop())
        return y[:, :, early:]

    def _at_once(self, q: Tensor, kept: Kept, inputs: ForwardInputs) -> Tensor:
        """All queries over all keys that are kept: for few tokens, and for the next one behind a cache."""
        distance = token_distance(q, kept, inputs)  # (T, K)
        scoring = self.scoring(q, kept.keys, distance, inputs)
        visible = AttentionMask(self._mask(distance, kept, inputs), causal=False)
        return attend(q, kept.keys, kept.values, visible, scoring, self.drop())

    def _mask(self, distance: Tensor, kept: Kept, inputs: ForwardInputs) -> Tensor | None:
        """Mask of the kept keys, `distance` (T, K) tokens before the new queries: (B or 1, 1, T, K)."""
        new, keys = distance.shape
        if new == 1 and keys <= self.window and self.band.dilation == 1 and inputs.documents is None:
            return None  # a cache keeps nothing that the next token does not see
        mask = self.band.holds(distance)[None, None]  # (1, 1, T, K)
        if inputs.documents is None:
            return mask
        own = inputs.documents[:, inputs.past :]  # (B or 1, T)
        theirs = (
            inputs.documents if kept.key_positions is None else inputs.documents[:, kept.key_positions]
        )  # (B or 1, K)
        return mask & (own[:, :, None] == theirs[:, None, :])[:, None]

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> KeyValueCache:
        kept = min(self.span, capacity)
        return RollingCache(batch, self.kv_heads, kept, self.head_width, device, dtype)

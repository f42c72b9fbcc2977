"""Sliding-window attention: query i sees the keys i - window < j <= i (Mistral, arXiv 2310.06825, section 2).

B batch, H query heads, G key/value heads, T tokens, w window, d channels of a head, N blocks of w tokens.

No T x T matrix is made: the sequence is cut into blocks of w tokens, and the queries of a block see their own block
and the one before it, so time and memory are O(T w). Each of the N blocks is an entry in the batch of a full attention.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.full import Full, FullAttention, token_distance
from models.attention.protocol import ATTENTIONS, Context
from models.attention.standard import Visible, attend
from models.cache import Kept, LayerCache, RollingCache
from models.errors import UserError

OUTSIDE = -2  # the document of what lies before the first token


@ATTENTIONS.register("window")
@dataclass(frozen=True, kw_only=True)
class Window(Full):
    """Causal attention over the last tokens; all other options are those of `full`.

    Args:
        window: tokens that a query sees, itself included.
    """

    sees_all = False

    window: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window < 1:
            raise UserError(f"window must be at least 1 token, got {self.window}")

    def build(self, width: int, branches: int, positional: int) -> nn.Module:
        return WindowAttention(self, width, branches, positional)

    def flops_per_token(self, width: int, length: int) -> int:
        return super().flops_per_token(width, min(length, self.window))

    def cache_elements(self, tokens: int) -> int:
        return super().cache_elements(min(tokens, self.window))


class WindowAttention(FullAttention):
    """The module of `Window`."""

    def __init__(self, spec: Window, width: int, branches: int, positional: int) -> None:
        super().__init__(spec, width, branches, positional)
        self.window = spec.window

    def mix(self, q: Tensor, kept: Kept, context: Context) -> Tensor:
        if kept.columns is None and q.shape[2] > self.window:
            return self._in_blocks(q, kept.keys, kept.values, context)
        return self._at_once(q, kept, context)

    def _at_once(self, q: Tensor, kept: Kept, context: Context) -> Tensor:
        """All queries over all keys that are kept: for few tokens, and behind a cache."""
        distance = token_distance(q, kept, context)  # (T, K)
        mask = ((distance >= 0) & (distance < self.window))[None, None]  # (1, 1, T, K)
        if context.documents is not None:
            columns = context.past + torch.arange(q.shape[2], device=q.device)
            own = context.documents[:, columns]  # (B, T)
            theirs = context.documents if kept.columns is None else context.documents[:, kept.columns]  # (B, K)
            mask = mask & (own[:, :, None] == theirs[:, None, :])[:, None]
        scoring = self.scoring(q, context, distance)
        return attend(q, kept.keys, kept.values, Visible(mask, causal=False), scoring, self.drop())

    def _in_blocks(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        batch, _, tokens, _ = q.shape
        window = self.window
        blocks = -(-tokens // window)
        rest = blocks * window - tokens
        steps = torch.arange(window, device=q.device)
        distance = steps[:, None] - torch.arange(-window, window, device=q.device)  # (w, 2w)
        mask = ((distance >= 0) & (distance < window)).expand(blocks, -1, -1)  # (N, w, 2w)
        inside = torch.arange(blocks, device=q.device)[:, None] * window + torch.arange(
            -window, window, device=q.device
        )
        mask = (mask & (inside >= 0)[:, None])[None]  # (1, N, w, 2w)
        if context.documents is not None:
            padded = F.pad(context.documents, (0, rest), value=OUTSIDE)  # (B or 1, N * w)
            own = padded.unflatten(1, (blocks, window))  # (B or 1, N, w)
            theirs = _with_previous(own, OUTSIDE)  # (B or 1, N, 2w)
            mask = mask & (own[..., :, None] == theirs[..., None, :])
        mask = mask.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]  # (B * N, 1, w, 2w)
        q, k, v = (F.pad(x, (0, 0, 0, rest)).unflatten(2, (blocks, window)) for x in (q, k, v))  # (B, H or G, N, w, d)
        k, v = (_with_previous(x.movedim(2, 1), 0, dim=3).flatten(0, 1) for x in (k, v))  # (B * N, G, 2w, d)
        q = q.movedim(2, 1).flatten(0, 1)  # (B * N, H, w, d)
        y = attend(q, k, v, Visible(mask, causal=False), self.scoring(q, context, distance), self.drop())
        y = y.unflatten(0, (batch, blocks)).movedim(1, 2).flatten(2, 3)  # (B, H, N * w, d)
        return y[:, :, :tokens]

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> LayerCache:
        kept = min(self.window, capacity)
        return RollingCache(batch, self.kv_heads, kept, self.head_width, device, dtype)


def _with_previous(x: Tensor, before: float, dim: int = 2) -> Tensor:
    """Blocks x (B, N, ...) each behind the one before it, joined along `dim`; `before` stands before the first."""
    first = torch.full_like(x[:, :1], before)
    return torch.cat([torch.cat([first, x[:, :-1]], dim=1), x], dim=dim)

"""Longformer: a window and global tokens with projections of their own (arXiv 2004.05150, sections 3.1 and 3.2).

B batch, H query heads, G key/value heads, T tokens, D model width, d channels of a head, w window, g global tokens of a
document, M tokens at the beginning that may be global.

The first g tokens of each document are global. Every other token has one softmax over its window and the global tokens
before it, each key once, with the ordinary q, k and v. A global token sees its whole document (in a decoder: all before
it) with q, k and v of its own. Time and memory are O(T (w + g)), also where documents are packed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.full import Full, FullAttention
from models.attention.kernels.banded import Anchors, Band, Extra, attend_band
from models.attention.kernels.sdpa import AttentionMask, ScoreMod, attend
from models.attention.protocol import ForwardInputs
from models.attention.segments import document_starts
from models.attention.window import Window
from models.cache import Anchored, AnchoredCache, Kept
from models.errors import UserError
from models.linear import Linear
from models.positions import Positional
from models.specs import ATTENTIONS, LayerContext


@ATTENTIONS.register("longformer")
@dataclass(frozen=True, kw_only=True)
class Longformer(Window):
    """A sliding window and global tokens; all other options are those of `window`.

    In an encoder the global tokens also map all others; `flops_per_token` counts what a decoder computes.

    Args:
        globals: tokens at the beginning of each document that all others see, and that in an encoder see all others.
    """

    heads_prunable = False
    heads_because = "its global tokens have maps of their own for each of them"

    globals: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.globals < 1:
            raise UserError(f"globals must be at least 1 token, got {self.globals}; without any it is a window")

    def build(self, place: LayerContext) -> nn.Module:
        return LongformerAttention(self, place)

    def flops_per_token(self, width: int, length: int) -> int:
        ordinary = Full.flops_per_token(self, width, min(length, self.window + self.globals))
        rows = min(length, self.globals)
        own = rows * self.head_width * (2 * width * (self.heads + 2 * self.kv_heads) + 4 * self.heads * rows)
        return ordinary + own // length

    def cache_elements(self, tokens: int) -> int:
        return super().cache_elements(tokens) + 2 * Full.cache_elements(self, min(tokens, self.globals))


class CopiedLinear(Linear):
    """A map that starts as a copy of another one."""

    def __init__(self, original: Linear) -> None:
        self._original = (original,)  # in a tuple, so that it is no part of this one
        super().__init__(original.in_features, original.out_features, bias=original.bias is not None, std=original.std)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for mine, theirs in zip(self.parameters(), self._original[0].parameters(), strict=True):
            mine.copy_(theirs)


class LongformerAttention(FullAttention):
    """The module of `Longformer`."""

    def __init__(self, spec: Longformer, place: LayerContext) -> None:
        super().__init__(spec, place)
        self.window, self.span, self.globals = spec.window, spec.span(), spec.globals
        self.band = spec.band(place.bidirectional)
        self.q_global, self.k_global, self.v_global = (CopiedLinear(x) for x in (self.q, self.k, self.v))

    def forward(self, x: Tensor, inputs: ForwardInputs, cache: AnchoredCache | None = None) -> Tensor:
        batch, new, _ = x.shape
        past, packed, positional = inputs.past, inputs.documents is not None, inputs.positional[self.positional]
        starts = document_starts(inputs.documents, past + new, x.device)[:, past:]  # (B or 1, T)
        rows = new if packed else min(max(self.globals - past, 0), new)  # M
        seen = new if self.bidirectional else rows
        q, k, v = self._heads((self.q, self.k, self.v), x, new, new, positional)  # (B, ., T, d)
        own = self._heads((self.q_global, self.k_global, self.v_global), x, rows, seen, positional)  # (B, ., M or T, d)
        earlier = None if cache is None or past == 0 else cache.anchored()
        kept = Kept(k, v, None) if cache is None else cache.append(k, v, *own[1:], starts)
        if earlier is None and new > self.window:
            y = self._in_band(q, k, v, starts, inputs)  # (B, H, T, d)
        else:
            y = self._at_once(q, kept, earlier, starts, inputs)
        if rows:
            places = past + torch.arange(rows, device=x.device) - starts[:, :rows]  # (B or 1, M)
            of_globals = self._global_rows(*own, earlier, starts, inputs)  # (B, H, M, d)
            first = torch.where((places < self.globals)[:, None, :, None], of_globals, y[:, :, :rows])
            y = torch.cat([first, y[:, :, rows:]], dim=2)
        return self.o(y.transpose(1, 2).reshape(batch, new, self.heads * self.head_width))  # (B, T, D)

    def _heads(
        self, maps: tuple[nn.Module, nn.Module, nn.Module], x: Tensor, rows: int, seen: int, positional: Positional
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries of the first `rows` tokens, keys and values of the first `seen`: (B, ., rows or seen, d)."""
        lengths = (rows, seen, seen)
        q, k, v = (
            map_(x[:, :length]).unflatten(2, (-1, self.head_width)).transpose(1, 2)
            for map_, length in zip(maps, lengths, strict=True)
        )
        if self.normalises:
            q, k = self.q_norm(q), self.k_norm(k)
        return beginning(positional, rows).rotate(q), beginning(positional, seen).rotate(k), v

    def _in_band(self, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, inputs: ForwardInputs) -> Tensor:
        """All ordinary rows of a whole sequence: (B, H, T, d)."""
        positional, scoring = inputs.positional[self.positional], partial(self.scoring, inputs=inputs)
        bias = positional.bias if positional.biases else None
        if inputs.documents is not None:
            anchors, documents = Anchors(starts, self.globals, bias), (inputs.documents, inputs.documents)
            return attend_band(q, k, v, self.band, scoring, documents, None, self.drop(), anchors)
        count = min(self.globals, q.shape[2])
        rows = torch.arange(q.shape[2], device=q.device)
        distance = rows[:, None] - rows[:count]  # (T, g)
        visible = (distance >= 0) & ~self.band.holds(distance)
        extra = Extra(k[:, :, :count], v[:, :, :count], visible[None], None if bias is None else bias(distance))
        return attend_band(q, k, v, self.band, scoring, None, extra, self.drop())

    def _at_once(
        self, q: Tensor, kept: Kept, earlier: Anchored | None, starts: Tensor, inputs: ForwardInputs
    ) -> Tensor:
        """The ordinary rows of few tokens, or of those behind a cache: (B, H, T, d)."""
        keys, end = kept.keys.shape[2], inputs.past + q.shape[2]
        whole = q.shape[2] == 1 and keys <= self.window and self.band.dilation == 1 and inputs.documents is None
        columns = torch.arange(keys, device=q.device) if kept.key_positions is None else kept.key_positions  # (K,)
        distance = torch.arange(inputs.past, end, device=q.device)[:, None] - columns  # (T, K)
        place = columns - starts[..., None]  # (B or 1, T, K), in the document of the query
        seen = self.band.holds(distance) | ((place >= 0) & (place < self.globals) & (distance >= 0))
        if inputs.documents is not None:
            own, theirs = inputs.documents[:, inputs.past :], inputs.documents[:, columns]
            seen = seen & (own[..., None] == theirs[:, None])
        if earlier is None:
            return self._masked(q, kept.keys, kept.values, columns[None], seen, inputs)
        if whole:  # only anchors that the window does not hold: then the next token sees all there is
            outside = min(self.globals, end - keys)
            earlier = Anchored(*(x[:, :, :outside] for x in earlier[:4]), earlier.starts)
        k, v = torch.cat([earlier.keys, kept.keys], dim=2), torch.cat([earlier.values, kept.values], dim=2)
        numbers, seen = _behind(earlier, columns, seen, end - keys, starts)
        return self._masked(q, k, v, numbers, None if whole else seen, inputs)

    def _global_rows(
        self, q: Tensor, k: Tensor, v: Tensor, earlier: Anchored | None, starts: Tensor, inputs: ForwardInputs
    ) -> Tensor:
        """The rows of the first M tokens as if they were global, of their own q (B, H, M, d), k, v: (B, H, M, d)."""
        rows = torch.arange(inputs.past, inputs.past + q.shape[2], device=q.device)
        scoring = partial(self.scoring, inputs=inputs)
        if earlier is not None:
            starts = starts[:, : len(rows)]
            seen = (rows >= starts[..., None]) & (rows <= rows[:, None])  # (B or 1, M, M)
            behind = _behind(earlier, rows, seen, inputs.past, starts)
            k, v = torch.cat([earlier.own_keys, k], dim=2), torch.cat([earlier.own_values, v], dim=2)
            return self._masked(q, k, v, *behind, inputs)
        if inputs.documents is None:
            distance = rows[:, None] - torch.arange(k.shape[2], device=q.device)  # (M, M or T)
            return attend(q, k, v, AttentionMask(None, not self.bidirectional), scoring(q, k, distance), self.drop())
        if self.bidirectional:
            return attend_documents(q, k, v, starts, self.globals, scoring, self.drop())
        documents = (inputs.documents, inputs.documents)
        return attend_band(q, k, v, Band(self.globals - 1, 0), scoring, documents, dropout=self.drop())

    def _masked(
        self, q: Tensor, k: Tensor, v: Tensor, numbers: Tensor, seen: Tensor | None, inputs: ForwardInputs
    ) -> Tensor:
        """Attention of the first tokens over keys numbered (B or 1, S), where `seen` (B or 1, T, S); None: over all."""
        rows = inputs.past + torch.arange(q.shape[2], device=q.device)
        distance = rows[:, None] - numbers[:, None]  # (B or 1, T, S)
        scoring = self.scoring(q, k, distance.flatten(0, 1), inputs)
        if scoring.position is not None:
            position = scoring.position.unflatten(1, distance.shape[:2]).movedim(0, 1)  # (B or 1, H, T, S)
            scoring = replace(scoring, position=position)
        mask = None if seen is None else seen[:, None]  # (B or 1, 1, T, S)
        return attend(q, k, v, AttentionMask(mask, causal=False), scoring, self.drop())

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> AnchoredCache:
        sizes = min(self.span, capacity), min(self.globals, capacity)
        return AnchoredCache(batch, self.kv_heads, *sizes, self.head_width, device, dtype)


def beginning(positional: Positional, tokens: int) -> Positional:
    """The rotation of the first tokens."""
    if positional.cos is None:
        return positional
    return positional._replace(cos=positional.cos[:, :, :tokens], sin=positional.sin[:, :, :tokens])


def _behind(earlier: Anchored, columns: Tensor, seen: Tensor, oldest: int, starts: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers (B or 1, X + K) of the cached anchors and, behind them, of other keys, and which of them are seen.

    Args:
        earlier: the anchors.
        columns: (K,) numbers of the other keys.
        seen: (B or 1, T, K), which of those each query sees.
        oldest: only anchors before this number are seen, the others being among the other keys.
        starts: (B or 1, T) first token of each query's document.
    """
    numbers = earlier.starts[:, None] + torch.arange(earlier.keys.shape[2], device=columns.device)  # (B or 1, X)
    visible = (starts == earlier.starts[:, None])[..., None] & (numbers < oldest)[:, None]  # (B or 1, T, X)
    rows = max(len(visible), len(seen))
    seen = torch.cat([visible.expand(rows, -1, -1), seen.expand(rows, -1, -1)], dim=-1)
    return torch.cat([numbers, columns.expand(len(numbers), -1)], dim=1), seen


def attend_documents(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    count: int,
    scoring: Callable[[Tensor, Tensor, Tensor], ScoreMod],
    dropout: float = 0.0,
) -> Tensor:
    """Attention of the first tokens of each document over their whole document, in O(T count) for any documents.

    A token is seen by `count` queries, however many documents there are; so for each of them in turn there is one score
    for each token, and the softmax is taken over the tokens of a document.

    Args:
        q: (B, H, T, d), of which those of the first `count` tokens of each document are read.
        k, v: (B, G, T, d).
        starts: (B or 1, T) number of the first token of each token's document.
        count: queries of a document.
        scoring: of q, k and the distances (B or 1, T) from each token to its query: what becomes of the scores.
        dropout: of the probabilities.

    Returns:
        (B, H, T, d), zeros in all other rows.
    """
    batch, heads, tokens, width = q.shape
    exact = torch.promote_types(q.dtype, torch.float32)
    k, v = (x.repeat_interleave(heads // x.shape[1], 1).to(exact) for x in (k, v))  # (B, H, T, d)
    first = starts[:, None].expand(batch, heads, -1)  # (B, H, T)
    y = torch.zeros_like(q, dtype=exact)
    for place in range(count):
        row = (starts + place).clamp(max=tokens - 1)  # (B or 1, T), the query of each token
        exists = (starts + place < tokens) & (starts.gather(1, row) == starts)
        index = row[:, None, :, None].expand(batch, heads, -1, width)  # (B, H, T, d)
        found = scoring(q, k, row - torch.arange(tokens, device=q.device))
        scale = width**-0.5 if found.scale is None else found.scale
        scores = (q.gather(2, index).to(exact) * k).sum(-1) * scale  # (B, H, T)
        if found.softcap is not None:
            scores = found.softcap * torch.tanh(scores / found.softcap)
        if found.position is not None:
            scores = scores + found.position.movedim(1, 0)
        p = _softmax_by(first, scores, None if found.sink is None else found.sink.to(exact)[:, None])  # (B, H, T)
        p = torch.where(exists[:, None], F.dropout(p, dropout), 0.0)
        y = y.scatter_add(2, index, p[..., None] * v)
    return y.to(q.dtype)


def _softmax_by(group: Tensor, scores: Tensor, sink: Tensor | None) -> Tensor:
    """Softmax of scores (B, H, T) over those of the same group (B, H, T), and over one more logit (H, 1) or none."""
    lowest = torch.full_like(scores, -math.inf)
    top = lowest.scatter_reduce(2, group, scores.detach(), "amax")
    if sink is not None:
        top = top.maximum(sink.detach())
    e = torch.exp(scores - top.gather(2, group))
    total = torch.zeros_like(scores).scatter_add(2, group, e)
    if sink is not None:
        total = total + torch.exp(sink - top)
    return e / total.gather(2, group)

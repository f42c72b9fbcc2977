"""A layer whose tokens attend to those near by and to summaries of the others (models/attention/multilevel.py).

B batch, T new tokens, S tokens so far, N entries of a level, X of them new, m summaries of a node, D width, H query
heads, G key/value heads, d channels of a head.

Summaries are made of the layer's input. Their keys and values come from the layer's own maps, as if each were a token
at the place of its node's last one: that is where its key is rotated to.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from models.attention.full import Full, FullAttention
from models.attention.gather import take
from models.attention.multilevel import (
    Level,
    Listed,
    Nodes,
    Tokens,
    Tree,
    attend_tree,
    children,
    join_heads,
    new_nodes,
    place_tokens,
)
from models.attention.pooling import POOLINGS, Mean
from models.attention.protocol import ForwardInputs
from models.cache import Entries, SummaryCache, Tail
from models.errors import UserError
from models.positions import Positional
from models.specs import LayerContext


@dataclass(frozen=True, kw_only=True)
class Summarising(Full):
    """Base spec of attention over summaries; all other options are those of `full`.

    Args:
        pooling: what makes summaries: `mean`, `query` (any number of them), `han`.
        input_width: D, of which the cache keeps so many channels for every token of the open chunk. Nothing: the
            model's width, and no other fits.
    """

    needs_mask = False

    pooling: Any = field(default_factory=Mean, metadata={"registry": POOLINGS})
    input_width: int | None = None

    @property
    def tree(self) -> Tree:
        """The tree of summaries: tokens of a node, and the levels above."""
        raise NotImplementedError

    def resolve(self, width: int, layer: int = 0) -> Self:
        if self.input_width not in (None, width):
            raise UserError(f"input_width must be the model's width of {width}, got {self.input_width}")
        return replace(super().resolve(width, layer), input_width=width)

    def inner_channels(self, level: Level) -> int:
        """Numbers that an entry of a level keeps beside its keys and values."""
        return self.input_width * level.summaries if level.fanout is not None else 0

    def relating_flops(self, nodes: int) -> int:
        """Forward FLOPs of what summaries of so many nodes undergo before the key and value maps."""
        return 0

    def flops_per_token(self, width: int, length: int) -> int:
        """Forward FLOPs of one token that sees `length` tokens, with its share in the making of their summaries."""
        tree, nodes = self.tree, self.tree.nodes(length)
        maps = 4 * width * self.kv_heads * self.head_width * tree.summaries
        made = nodes * (maps + self.pooling.flops(width, tree.chunk)) + self.relating_flops(nodes)
        return super().flops_per_token(width, tree.visible(length)) + made // length

    def cache_elements(self, tokens: int) -> int:
        """Numbers that the cache holds for a sequence of so many tokens."""
        keys_and_values = 2 * self.kv_heads * self.head_width
        return sum(
            level.capacity(tokens) * (self.inner_channels(level) + level.summaries * keys_and_values)
            for level in self.tree.levels(tokens)
        )


class SummaryAttention(FullAttention):
    """The module of a `Summarising`."""

    def __init__(self, spec: Summarising, place: LayerContext) -> None:
        super().__init__(spec, place)
        self.tree, self.inner_channels = spec.tree, spec.inner_channels
        self.pooling = spec.pooling.build(place.width)

    def forward(self, x: Tensor, inputs: ForwardInputs, cache: SummaryCache | None = None) -> Tensor:
        batch, new, _ = x.shape
        positional = inputs.positional[self.positional]
        q = self.q(x).view(batch, new, self.heads, self.head_width).transpose(1, 2)  # (B, H, T, d)
        q = positional.rotate(self.q_norm(q) if self.normalises else q)
        tokens = place_tokens(inputs, inputs.past + new, not self.bidirectional, x.device).last(new)
        lists = self.lists(x, tokens, positional, cache)
        y = attend_tree(q, tokens, lists, partial(self.scoring, distance=None, inputs=inputs), self.drop())
        return self.o(y.transpose(1, 2).reshape(batch, new, self.heads * self.head_width))  # (B, T, D)

    def lists(self, x: Tensor, tokens: Tokens, positional: Positional, cache: SummaryCache | None) -> list[Listed]:
        """Keys and values of the tokens x (B, T, D), of those kept before them, and of the summaries by level."""
        found: list[Listed] = []
        seen = tokens.past + x.shape[1]
        for number, level in enumerate(self.tree.levels(seen)):
            tail = None if cache is None else cache.lists[number]
            nodes = new_nodes(tokens, level, cached=cache is not None)
            if nodes.last.shape[1]:
                vectors = x[:, :, None] if number == 0 else self._pool(nodes, found[-1], tokens.aligned)
                entries, before = self._entries(vectors, number, level, nodes, tail, positional), nodes.before
                if tail is not None:
                    entries, before = tail.kept().then(entries), before + tail.count
                    tail.keep(entries, nodes.count, level.capacity(seen))
            elif tail is not None and tail.count:
                entries, before = tail.kept(), nodes.before + tail.count
            else:
                break
            found.append(Listed(level, entries, before))
        return found

    def _pool(self, nodes: Nodes, below: Listed, aligned: bool) -> Tensor:
        """The summaries (B, X, m, D) of new nodes, each of its entries in the level below."""
        vectors, mine = children(nodes, below, aligned)  # (B, X, K, m * D), (B or 1, X, K)
        summaries = below.level.summaries
        vectors = vectors.unflatten(3, (summaries, -1)).flatten(2, 3)  # (B, X, K * m, D)
        return self.pooling(vectors, mine.repeat_interleave(summaries, -1))

    def _entries(
        self, vectors: Tensor, number: int, level: Level, nodes: Nodes, tail: Tail | None, positional: Positional
    ) -> Entries:
        """The new entries of level `number`: tokens, or nodes whose summaries are vectors (B, X, m, D)."""
        if number == 0:
            inner = vectors[:, :, 0]  # (B, T, D)
        else:
            positional = _at(positional, nodes.last, level.summaries)
            kept = None if tail is None else tail.kept()
            inner, vectors = self.relate(vectors, number, level, nodes, positional, kept)
        k, v = self.keys_and_values(vectors, positional)
        return Entries(inner, k, v, nodes.start, nodes.index)

    def relate(
        self, vectors: Tensor, number: int, level: Level, nodes: Nodes, positional: Positional, kept: Entries | None
    ) -> tuple[Tensor, Tensor]:
        """Transform of the new summaries before queries see them.

        Args:
            vectors: (B, X, m, D) summaries of the new nodes.
            number: of the level, from 1.
            level: what it is.
            nodes: where the nodes stand.
            positional: the encoding at these places.
            kept: the entries before them, in a cache.

        Returns:
            (B, X, E) what the entries keep for the making of later ones, and (B, X, m, D) what keys and values are of.
        """
        inner = vectors.flatten(2)  # (B, X, m * D)
        return inner if level.fanout is not None else inner[..., :0], vectors

    def keys_and_values(self, vectors: Tensor, positional: Positional) -> tuple[Tensor, Tensor]:
        """Keys and values (B, X, m * G * d) each, of summaries or tokens (B, X, m, D)."""
        batch, entries, summaries, _ = vectors.shape
        flat = vectors.flatten(1, 2)  # (B, X * m, D)
        k = self.k(flat).view(batch, -1, self.kv_heads, self.head_width).transpose(1, 2)  # (B, G, X * m, d)
        k = positional.rotate(self.k_norm(k) if self.normalises else k)
        return join_heads(k, summaries), self.v(flat).view(batch, entries, -1)

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> SummaryCache:
        tails = []
        for level in self.tree.levels(capacity):
            channels = (self.inner_channels(level), level.summaries * self.kv_heads * self.head_width)
            tails.append(Tail(batch, level.capacity(capacity), channels, device, dtype))
        return SummaryCache(tails)


def _at(positional: Positional, last: Tensor, summaries: int) -> Positional:
    """The rotation at the places `last` (B or 1, X) of the new tokens, for each of m summaries."""
    if positional.cos is None:
        return positional
    cos, sin = (
        take(table[:, 0], last).repeat_interleave(summaries, 1)[:, None] for table in (positional.cos, positional.sin)
    )  # (B or 1, 1, X * m, R)
    return positional._replace(cos=cos, sin=sin)

"""Attention over the tokens near by and over summaries of the others, level by level, in one softmax.

B batch, T new tokens, S tokens so far, N entries of a list, X of them new, m summaries of a node, D width, H query
heads, G key/value heads, d channels of a head, W tokens of a node, C tokens of a block.

Tokens are the leaves of a tree that begins anew with every document: `fanout` entries of one level make a node of the
next. Levels are lists of entries, in the order of the sequence. A query sees, of every level, the entries that have its
own parent; so every token is seen once, coarser the farther away:

    decoder   tokens of its chunk up to itself; nodes before its own, all of which are complete
    encoder   all tokens of its chunk; all nodes but its own

Nodes of the last level, if there is one, see each other wherever they are. Rows of a batch may have their documents at
different places, hence different entries; all shapes follow from B, T and S alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention.gather import take
from models.attention.kernels.sdpa import AttentionMask, ScoreMod, attend, reference_attention
from models.attention.protocol import ForwardInputs
from models.attention.segments import document_ends, document_starts
from models.cache.summaries import ABSENT, Entries

SMALLEST, LARGEST = 64, 256  # tokens of a block where chunks begin anywhere


class Level(NamedTuple):
    """Level of the tree of summaries.

    Attributes:
        width: W.
        fanout: entries of one parent; None: the last level.
        summaries: m.
    """

    width: int
    fanout: int | None
    summaries: int

    def capacity(self, tokens: int) -> int:
        """Entries that the next token after so many may need: of the open parent, or all of the last level."""
        complete = tokens // self.width
        return complete if self.fanout is None else min(complete, self.fanout - 1)


@dataclass(frozen=True)
class Tree:
    """The levels.

    Args:
        chunk: tokens of a node of level 1.
        summaries: m.
        depth: levels above the tokens; None: as many as a sequence fills.
    """

    chunk: int
    summaries: int
    depth: int | None = None

    def levels(self, tokens: int) -> list[Level]:
        """The levels of which so many tokens fill a node, the tokens themselves first."""
        found, width, fanout = [Level(1, self.chunk, 1)], self.chunk, self.chunk // self.summaries
        while width <= tokens and len(found) - 1 != self.depth:
            last = len(found) == self.depth
            found.append(Level(width, None if last else fanout, self.summaries))
            width *= fanout
        return found

    def visible(self, tokens: int) -> int:
        """Keys of the last of so many tokens of one document, where its chunk is full."""
        above = self.levels(tokens - 1)[1:]
        return min(tokens, self.chunk) + sum(level.summaries * level.capacity(tokens - 1) for level in above)

    def nodes(self, tokens: int) -> int:
        """Nodes that so many tokens make for those behind them, in all levels."""
        return sum((tokens - 1) // level.width for level in self.levels(tokens - 1)[1:])


class Tokens(NamedTuple):
    """Positions of the new tokens in the tree.

    Attributes:
        start: (B or 1, T) where the document of each begins; below ABSENT for padding.
        index: (B or 1, T) number of the token in its document.
        length: (B or 1, T) tokens of its document; None in a decoder.
        past: S - T.
        single: whether every row is one document.
    """

    start: Tensor
    index: Tensor
    length: Tensor | None
    past: int
    single: bool

    @property
    def causal(self) -> bool:
        return self.length is None

    @property
    def aligned(self) -> bool:
        """Whether the first new token is the first of every row's only document."""
        return self.single and not self.past

    def last(self, count: int) -> "Tokens":
        """The last of these tokens."""
        first = self.start.shape[1] - count
        length = None if self.length is None else self.length[:, first:]
        return self._replace(start=self.start[:, first:], index=self.index[:, first:], length=length)


def place_tokens(inputs: ForwardInputs, tokens: int, causal: bool, device: torch.device) -> Tokens:
    """Positions of all tokens so far in the tree."""
    documents = inputs.documents
    start = document_starts(documents, tokens, device)  # (B or 1, S)
    index = torch.arange(tokens, device=device) - start
    length = None if causal else document_ends(documents, tokens, device) - start
    if documents is not None:
        start = torch.where(documents < 0, ABSENT - 1 - start, start)
    return Tokens(start, index, length, inputs.past, documents is None)


class Listed(NamedTuple):
    """A level as the new tokens find it.

    Attributes:
        level: which it is.
        entries: what there is.
        before: (B or 1, T) how many of them end before each new token.
    """

    level: Level
    entries: Entries
    before: Tensor


class Nodes(NamedTuple):
    """The new nodes of a level, X at most.

    Attributes:
        last: (B or 1, X) which of the new tokens ends the node.
        start, index: (B or 1, X), as in `Entries`.
        count: (B or 1, 1) how many there are; they come first.
        before: (B or 1, T) how many new ones end before each new token.
    """

    last: Tensor
    start: Tensor
    index: Tensor
    count: Tensor
    before: Tensor


def new_nodes(tokens: Tokens, level: Level, cached: bool) -> Nodes:
    """The nodes of a level that the new tokens end; of level 0 they are the tokens themselves, padding too."""
    if level.width == 1:
        columns = torch.arange(tokens.start.shape[1], device=tokens.start.device)[None]  # (1, T)
        return Nodes(columns, tokens.start, tokens.index, columns[:, -1:] + 1, columns)
    real = tokens.start >= 0
    ends = real & ((tokens.index + 1) % level.width == 0)  # (B or 1, T)
    if not tokens.causal:  # also the rest of a document; a document of one node needs none
        ends = (ends | (real & (tokens.index + 1 == tokens.length))) & (tokens.length > level.width)
    slots = _slots(tokens, level.width, cached)
    order = ends.cumsum(1)  # (B or 1, T)
    slot = torch.where(ends, order - 1, slots).clamp(max=slots)  # what is not wanted goes behind the last
    columns = torch.arange(ends.shape[1], device=ends.device).expand_as(slot)
    last = slot.new_zeros(len(slot), slots + 1).scatter(1, slot, columns)[:, :slots]  # (B or 1, X)
    count = order[:, -1:].clamp(max=slots)  # (B or 1, 1)
    there = torch.arange(slots, device=ends.device) < count
    start = torch.where(there, tokens.start.gather(1, last), ABSENT)
    return Nodes(last, start, tokens.index.gather(1, last) // level.width, count, order - ends.long())


def _slots(tokens: Tokens, width: int, cached: bool) -> int:
    """X: no row can end more nodes of W tokens than that."""
    new, past = tokens.start.shape[1], tokens.past
    if not tokens.causal:  # a document of more than W tokens ends a node every W tokens, and one with its last
        return (-(-new // width) if tokens.aligned else 2 * new // width) if new > width else 0
    if not cached:
        return (new - 1) // width  # one that the last token ends is seen by none
    if tokens.single:
        return (past + new) // width - past // width
    return (new + min(past, width - 1)) // width


def children(nodes: Nodes, below: Listed, aligned: bool) -> tuple[Tensor, Tensor]:
    """Entries that the new nodes summarise.

    Returns:
        (B, X, K, E) of the K = fanout last entries below each node, and (B or 1, X, K) whether they are its children.
    """
    fanout, entries = below.level.fanout, below.entries
    if aligned:
        count, missing = entries.start.shape[1], nodes.last.shape[1] * fanout - entries.start.shape[1]
        mine = torch.arange(count + missing, device=nodes.last.device) < count
        inner = F.pad(entries.inner, (0, 0, 0, missing)).unflatten(1, (-1, fanout))  # (B, X, K, E)
        return inner, mine.view(1, -1, fanout)
    steps = torch.arange(1 - fanout, 1, device=nodes.last.device)  # (K,)
    places = take(below.before, nodes.last)[..., None] + steps  # (B or 1, X, K)
    inside, places = places >= 0, places.clamp(min=0)
    mine = inside & (take(entries.start, places) == nodes.start[..., None])
    mine = mine & (take(entries.index, places) // fanout == nodes.index[..., None])
    return take(entries.inner, places), mine


def sees(level: Level, own: Tokens, start: Tensor, index: Tensor) -> Tensor:
    """Whether the queries (B or 1, N, C) see entries (B or 1, N or 1, K): (B or 1, N, C, K)."""
    theirs, mine = index[:, :, None], own.index[..., None] // level.width
    seen = own.start[..., None] == start[:, :, None]
    if level.fanout is not None:
        seen = seen & (mine // level.fanout == theirs // level.fanout)
    if level.width > 1:
        return seen & (theirs < mine if own.causal else theirs != mine)
    return seen & (theirs <= mine) if own.causal else seen


def attend_tree(
    q: Tensor,
    tokens: Tokens,
    lists: Sequence[Listed],
    scoring: Callable[[Tensor, Tensor], ScoreMod],
    dropout: float = 0.0,
) -> Tensor:
    """Attention of the new tokens over what they see of every level: time and memory O(T chunk log T).

    The queries are cut into blocks of C, and every block gets of each level the stretch that its queries see.

    Args:
        q: (B, H, T, d).
        tokens: where they stand.
        lists: the levels, tokens first.
        scoring: of queries (., H, C, d) and keys (., G, K, d): what becomes of the scores.
        dropout: of the probabilities.

    Returns:
        (B, H, T, d).
    """
    batch, _, new, width = q.shape
    chunk = lists[0].level.fanout
    block = min(chunk if tokens.aligned else min(max(chunk, SMALLEST), LARGEST), new)
    blocks = -(-new // block)
    columns = torch.arange(blocks * block, device=q.device).clamp(max=new - 1)  # the last query fills the last block up
    own = tokens._replace(
        start=tokens.start[:, columns].unflatten(1, (blocks, block)),
        index=tokens.index[:, columns].unflatten(1, (blocks, block)),
    )  # (B or 1, N, C) each
    keys, values, masks = [], [], []
    for level, entries, before in lists:
        places = _stretch(level, before[:, columns[::block]], entries.start.shape[1], block, tokens)  # (B or 1, N, K)
        inside = (places >= 0) & (places < entries.start.shape[1])
        places = places.clamp(0, entries.start.shape[1] - 1)
        mask = inside[:, :, None] & sees(level, own, take(entries.start, places), take(entries.index, places))
        masks.append(mask.repeat_interleave(level.summaries, -1).expand(batch, -1, -1, -1).flatten(0, 1))
        for found, rows in ((keys, entries.keys), (values, entries.values)):
            if tokens.aligned and level.width == 1:  # each block its own tokens, and no place is looked up
                rows = F.pad(rows, (0, 0, 0, blocks * block - new)).unflatten(1, (blocks, block))
            else:
                rows = take(rows, places).expand(-1, blocks, -1, -1)
            found.append(split_heads(rows.flatten(0, 1), level.summaries, width))  # (B * N, G, K * m, d)
    q = q if blocks * block == new else q[:, :, columns]
    q = q.unflatten(2, (blocks, block)).movedim(2, 1).flatten(0, 1)  # (B * N, H, C, d)
    k, v, mask = torch.cat(keys, 2), torch.cat(values, 2), torch.cat(masks, -1)[:, None]
    y = attend(q, k, v, AttentionMask(mask, causal=False), scoring(q, k), dropout)
    return y.unflatten(0, (batch, blocks)).movedim(1, 2).flatten(2, 3)[:, :, :new]


def _stretch(level: Level, before: Tensor, count: int, block: int, tokens: Tokens) -> Tensor:
    """Indices of the `count` entries of a level that the C queries of each block can see: (B or 1, N or 1, K).

    Args:
        level: which it is.
        before: (B or 1, N) entries that end before each block's first query.
        count: entries.
        block: C.
        tokens: where the queries stand.
    """
    reach = (level.fanout or count) - 1
    if level.width == 1:
        steps = (0, block) if tokens.aligned else (-reach, block if tokens.causal else block + reach)
    else:
        passed = 0 if tokens.aligned else _most_nodes(block - 1, level.width, tokens)
        steps = (-reach, passed if tokens.causal else passed + 1 + reach)
    if level.fanout is None or steps[1] - steps[0] >= count:
        return torch.arange(count, device=before.device)[None, None]
    return before[..., None] + torch.arange(*steps, device=before.device)


def _most_nodes(tokens: int, width: int, found: Tokens) -> int:
    """Nodes of W tokens that so many tokens in a row end at most; in an encoder the rest of a document is one, too."""
    most = -(-tokens // width)
    return most if found.causal else 2 * most


def reference_tree(
    q: Tensor,
    tokens: Tokens,
    lists: Sequence[Listed],
    scoring: Callable[[Tensor, Tensor], ScoreMod],
    dropout: float = 0.0,
) -> Tensor:
    """The same as `attend_tree`, written down plainly: every query is compared with every entry."""
    own = tokens._replace(start=tokens.start[:, None], index=tokens.index[:, None])  # (B or 1, 1, T)
    masks = [
        sees(level, own, entries.start[:, None], entries.index[:, None])
        .repeat_interleave(level.summaries, -1)
        .expand(len(q), -1, -1, -1)
        for level, entries, _ in lists
    ]  # (B, 1, T, N * m) each
    k, v = (
        torch.cat([split_heads(getattr(entries, name), level.summaries, q.shape[-1]) for level, entries, _ in lists], 2)
        for name in ("keys", "values")
    )
    return reference_attention(q, k, v, AttentionMask(torch.cat(masks, -1), causal=False), scoring(q, k), dropout)


def split_heads(rows: Tensor, summaries: int, width: int) -> Tensor:
    """Keys or values (B, N, m * G * d) as (B, G, N * m, d)."""
    return rows.unflatten(2, (summaries, -1, width)).flatten(1, 2).transpose(1, 2)


def join_heads(heads: Tensor, summaries: int) -> Tensor:
    """Keys or values (B, G, N * m, d) as (B, N, m * G * d)."""
    return heads.transpose(1, 2).unflatten(1, (-1, summaries)).flatten(2)

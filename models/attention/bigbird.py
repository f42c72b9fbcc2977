"""Blocks of global, neighbouring and random tokens: BigBird's internal construction (arXiv 2007.14062, section 2).

B batch, B' of the documents' table (B or 1), H query heads, G key/value heads, T new tokens, S tokens so far, d
channels of a head, b block, r random blocks, N tiles of c <= b queries, O owners, F blocks far away of an owner, K keys
of a tile.

Documents are cut into blocks of b tokens. A query of block i sees the blocks i - 1, i, i + 1, the first, the last, and
r random ones among the others; the first and the last block see the whole document. A decoder has the lower triangle of
this: the blocks 0, i - 1 and r random ones before that, and of block i the tokens up to itself. All heads share it.

The queries are cut into tiles, each of which gathers the keys that any of its queries may see: a window around it,
which holds all neighbours, and the far blocks. In a packed row a tile may straddle two blocks of one document, so it
has two lists of far blocks. Those of the document of its first token suffice: any other begins inside the tile, so that
its queries there are of block 0. No T x T matrix is made: time and memory are O(T b (5 + r)).
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.full import Full, FullAttention, token_distance
from models.attention.gather import take, tokens_at
from models.attention.kernels.sdpa import AttentionMask, ScoreMod, attend, logits
from models.attention.protocol import ForwardInputs, document_mask
from models.attention.segments import document_ends, document_starts
from models.cache import Kept
from models.errors import UserError
from models.specs import ATTENTIONS, LayerContext

SMALL = 3  # blocks of a document, up to which every one sees every other


@ATTENTIONS.register("bigbird")
@dataclass(frozen=True, kw_only=True)
class BigBird(Full):
    """Attention over global, neighbouring and random blocks; all other options are those of `full`.

    Args:
        block: b, tokens of a block.
        random: r, random blocks that a block sees, where so many are left.
        seed: of their choice, which depends on nothing else than the place of the block in its document and, in an
            encoder, on the number of blocks there.
    """

    needs_mask = False

    block: int = 64
    random: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("block", 1), ("random", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, got {getattr(self, name)}")

    def build(self, place: LayerContext) -> nn.Module:
        return BigBirdAttention(self, place)

    def flops_per_token(self, width: int, length: int) -> int:
        """Forward FLOPs of one token (as for `full`, what a decoder's triangle leaves out is not subtracted)."""
        return super().flops_per_token(width, min(length, (5 + self.random) * self.block))


class BlockNumbers(NamedTuple):
    """Block number and place of tokens in their documents, all int64 of one shape.

    Attributes:
        start: first token of the document, by its number in the row; it stands for the document.
        number: of the block in the document.
        count: blocks of the document; what a decoder does not know and does not read.
    """

    start: Tensor
    number: Tensor
    count: Tensor

    def at(self, columns: Tensor) -> "BlockNumbers":
        """Block numbers of the tokens `columns` (B' or 1, ...), of tables (B', S)."""
        return BlockNumbers(*(take(table, columns) for table in self))


class BigBirdAttention(FullAttention):
    """The module of `BigBird`."""

    def __init__(self, spec: BigBird, place: LayerContext) -> None:
        super().__init__(spec, place)
        self.block, self.random, self.seed = spec.block, spec.random, spec.seed

    def mix(self, q: Tensor, kept: Kept, inputs: ForwardInputs) -> Tensor:
        kept = kept.in_order()
        if kept.keys.shape[2] <= SMALL * self.block:
            return self._at_once(q, kept, inputs)
        blocks = self._blocks(inputs, kept)
        y = self._tiles(q, kept, inputs, blocks)  # (B, H, T, d)
        return self._with_global_rows(y, q, kept, inputs, blocks) if self.bidirectional else y

    def _at_once(self, q: Tensor, kept: Kept, inputs: ForwardInputs) -> Tensor:
        """So few tokens that every block sees every other."""
        distance, mask = token_distance(q, kept, inputs), None
        if inputs.documents is not None:
            mask = document_mask(inputs.documents[:, inputs.past :], inputs.documents, not self.bidirectional)
        elif not self.bidirectional:
            mask = (distance >= 0)[None, None]  # (1, 1, T, S)
        scoring = self.scoring(q, kept.keys, distance, inputs)
        return attend(q, kept.keys, kept.values, AttentionMask(mask, causal=False), scoring, self.drop())

    def _blocks(self, inputs: ForwardInputs, kept: Kept) -> BlockNumbers:
        """The block of every token, (B', S) each."""
        seen, device = kept.keys.shape[2], kept.keys.device
        start, end = (find(inputs.documents, seen, device) for find in (document_starts, document_ends))
        return BlockNumbers(
            start, (torch.arange(seen, device=device) - start) // self.block, -((start - end) // self.block)
        )

    def far_blocks(self, number: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """The blocks that a block sees beside its neighbours, and which of these entries count.

        Args:
            number: (...), of the block.
            count: (...), blocks of its document.

        Returns:
            (..., F) numbers, and (..., F) bool.
        """
        chosen, valid = random_blocks(number, count, self.random, self.seed, self.bidirectional)
        far, apart = [torch.zeros_like(number)], [number > 1]
        if self.bidirectional:
            far.append(count - 1)
            apart.append(count - 1 - number > 1)
        return torch.cat([torch.stack(far, -1), chosen], -1), torch.cat([torch.stack(apart, -1), valid], -1)

    def _tiles(self, q: Tensor, kept: Kept, inputs: ForwardInputs, blocks: BlockNumbers) -> Tensor:
        """Every query over its neighbours and its far blocks: (B, H, T, d)."""
        batch, _, new, _ = q.shape
        past, seen = inputs.past, kept.keys.shape[2]
        size = min(self.block, new)
        tiles = -(-new // size)
        steps = torch.arange(size, device=q.device)
        firsts = past + size * torch.arange(tiles, device=q.device)  # (N,)
        own = (firsts[:, None] + steps).clamp(max=seen - 1)[None]  # (1, N, c), queries beyond the end are the last one
        aligned = inputs.documents is None and past % self.block == 0
        owners = 1 if aligned or size == 1 else 2  # blocks of one document in a tile
        near, may_near = self._near(firsts, own, size, aligned, blocks)  # (1, N, K'), (B', N, c, K')
        far, may_far = self._far(firsts, own, owners, blocks)  # (B', N, K"), (B', N, c, K")
        columns = torch.cat([near.expand(far.shape[0], -1, -1), far], dim=-1)  # (B', N, K)
        mask = torch.cat([may_near, may_far], dim=-1)  # (B', N, c, K)
        q = F.pad(q, (0, 0, 0, tiles * size - new)).unflatten(2, (tiles, size)).movedim(2, 1).flatten(0, 1)
        k, v = (tokens_at(x, columns).movedim(2, 1).flatten(0, 1) for x in (kept.keys, kept.values))  # (B * N, G, K, d)
        scoring = self._scoring(q, k, own[..., :, None] - columns[..., None, :], inputs)
        mask = mask.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]  # (B * N, 1, c, K)
        y = attend(q, k, v, AttentionMask(mask, causal=False), scoring, self.drop())  # (B * N, H, c, d)
        return y.unflatten(0, (batch, tiles)).movedim(1, 2).flatten(2, 3)[:, :, :new]

    def _near(
        self, firsts: Tensor, own: Tensor, size: int, aligned: bool, blocks: BlockNumbers
    ) -> tuple[Tensor, Tensor]:
        """The columns of the window around each tile, and which queries see them for being in a neighbouring block."""
        reach = self.block if aligned else 2 * self.block - 1
        after = size + (reach if self.bidirectional else 0)
        columns = firsts[:, None] + torch.arange(-reach, after, device=firsts.device)  # (N, K')
        seen = blocks.start.shape[1]
        inside, columns = ((columns >= 0) & (columns < seen))[None], columns.clamp(0, seen - 1)[None]
        query, key = blocks.at(own), blocks.at(columns)  # (B', N, c), (B', N, K')
        mask = (query.start[..., None] == key.start[..., None, :]) & inside[..., None, :]
        mask = mask & ((query.number[..., None] - key.number[..., None, :]).abs() <= 1)
        if not self.bidirectional:
            mask = mask & (columns[..., None, :] <= own[..., None])
        return columns, mask

    def _far(self, firsts: Tensor, own: Tensor, owners: int, blocks: BlockNumbers) -> tuple[Tensor, Tensor]:
        """The columns of the far blocks of the tile's first block and of the next, and which queries see them."""
        first = blocks.at(firsts[None])  # (B', N)
        number = first.number[..., None] + torch.arange(owners, device=firsts.device)  # (B', N, O)
        far, valid = self.far_blocks(number, first.count[..., None].expand_as(number))  # (B', N, O, F)
        within = torch.arange(self.block, device=firsts.device)
        columns = first.start[..., None, None, None] + far[..., None] * self.block + within  # (B', N, O, F, b)
        seen = blocks.start.shape[1]
        inside, columns = (columns >= 0) & (columns < seen), columns.clamp(0, seen - 1)
        same = take(blocks.start, columns) == first.start[..., None, None, None]
        usable = (valid[..., None] & inside & same).flatten(3)  # (B', N, O, F * b)
        query = blocks.at(own)  # (B', N, c)
        owned = (query.number[..., None] == number[..., None, :]) & (query.start == first.start[..., None])[..., None]
        mask = owned[..., None] & usable[..., None, :, :]  # (B', N, c, O, F * b)
        return columns.flatten(2), mask.flatten(3)

    def _with_global_rows(
        self, y: Tensor, q: Tensor, kept: Kept, inputs: ForwardInputs, blocks: BlockNumbers
    ) -> Tensor:
        """y (B, H, T, d) with the first and the last block of each document replaced: they see all of it.

        Each tile of keys meets the global queries of its documents; their sums over the tiles are put together.
        """
        tokens = q.shape[2]
        firsts = torch.arange(0, tokens, self.block, device=q.device)  # (N,)
        columns = (firsts[:, None] + torch.arange(self.block, device=q.device))[None]  # (1, N, b)
        rows, counted = self._global_rows(firsts, 1 if inputs.documents is None else 2, blocks)  # (B', N, R) both
        inside, columns = columns < tokens, columns.clamp(max=tokens - 1)
        same = take(blocks.start, rows)[..., None] == take(blocks.start, columns)[..., None, :]
        mask = counted[..., None] & inside[..., None, :] & same  # (B', N, R, b)
        asking = tokens_at(q, rows).movedim(2, 1).flatten(0, 1)  # (B * N, H, R, d)
        k, v = (tokens_at(x, columns).movedim(2, 1).flatten(0, 1) for x in (kept.keys, kept.values))  # (B * N, G, b, d)
        scoring = self._scoring(asking, k, rows[..., None] - columns[..., None, :], inputs)
        mask = mask.expand(q.shape[0], -1, -1, -1).flatten(0, 1)[:, None]  # (B * N, 1, R, b)
        scores = logits(asking, k, scoring).masked_fill(~mask, -math.inf)  # (B * N, H, R, b)
        found = self._put_together(scores, v, rows, scoring, tokens)  # (B, H, T, d)
        everything = ((blocks.number == 0) | (blocks.number == blocks.count - 1)) & (blocks.count >= SMALL)  # (B', T)
        return torch.where(everything[:, None, :, None], found.to(y.dtype), y)

    def _global_rows(self, firsts: Tensor, owners: int, blocks: BlockNumbers) -> tuple[Tensor, Tensor]:
        """The queries that see everything, of the documents in each tile, (B', N, R), and which of the entries count.

        Only documents of three blocks and more need this (in smaller ones all blocks are neighbours), and of those at
        most two have tokens in one tile: that of its first token and that of its last.
        """
        tokens = blocks.start.shape[1]
        ends = [firsts, (firsts + self.block - 1).clamp(max=tokens - 1)][:owners]
        owner = blocks.at(torch.stack(ends, dim=-1)[None])  # (B', N, O)
        counted = owner.count >= SMALL
        counted[..., 1:] &= owner.start[..., 1:] != owner.start[..., :1]
        begins = torch.stack([owner.start, owner.start + (owner.count - 1) * self.block], dim=-1)  # (B', N, O, 2)
        rows = begins[..., None] + torch.arange(self.block, device=firsts.device)  # (B', N, O, 2, b)
        inside, rows = rows < tokens, rows.clamp(max=tokens - 1)
        counted = counted[..., None, None] & inside & (take(blocks.start, rows) == owner.start[..., None, None])
        return rows.flatten(2), counted.flatten(2)

    def _put_together(self, scores: Tensor, v: Tensor, rows: Tensor, scoring: ScoreMod, tokens: int) -> Tensor:
        """Softmax of scores (B * N, H, R, b) of the queries `rows` (B', N, R) over all tiles, times v: (B, H, T, d)."""
        heads, tiles = scores.shape[1], rows.shape[1]
        batch = scores.shape[0] // tiles
        where = rows.expand(batch, -1, -1).flatten(1)[:, None].expand(-1, heads, -1)  # (B, H, N * R)

        def by_row(x: Tensor) -> Tensor:  # (B * N, H, R, ...) -> (B, H, N * R, ...)
            return x.unflatten(0, (batch, tiles)).movedim(1, 2).flatten(2, 3)

        top = scores.new_full((batch, heads, tokens), -math.inf)
        top = top.scatter_reduce(2, where, by_row(scores.detach().amax(-1)), "amax")  # (B, H, T)
        sink = None if scoring.sink is None else scoring.sink.to(scores.dtype)[:, None]  # (H, 1)
        if sink is not None:
            top = torch.maximum(top, sink.detach())
        top = top.masked_fill(top == -math.inf, 0.0)
        per_tile = top.gather(2, where).unflatten(2, (tiles, -1)).movedim(2, 1).flatten(0, 1)  # (B * N, H, R)
        p = torch.exp(scores - per_tile[..., None])  # (B * N, H, R, b)
        total = torch.zeros_like(top).scatter_add(2, where, by_row(p.sum(-1)))  # (B, H, T)
        p = F.dropout(p.to(v.dtype), self.drop()).unflatten(1, (v.shape[1], -1))
        part = by_row((p @ v[:, :, None]).flatten(1, 2)).to(top.dtype)  # (B, H, N * R, d)
        y = top.new_zeros(*top.shape, v.shape[-1]).scatter_add(2, where[..., None].expand_as(part), part)
        if sink is not None:
            total = total + torch.exp(sink - top)
        return y / total.masked_fill(total == 0, 1.0)[..., None]

    def _scoring(self, q: Tensor, k: Tensor, distance: Tensor, inputs: ForwardInputs) -> ScoreMod:
        """`scoring` of tiles (B * N, ...) whose distances (B', N, rows, keys) are not all the same."""
        rows, keys = distance.shape[2:]
        found = self.scoring(q, k, distance.reshape(-1, keys), inputs)
        if found.position is None:
            return found
        position = found.position.unflatten(1, (-1, rows)).movedim(1, 0)  # (B' * N, H, rows, keys)
        return replace(found, position=position.repeat(q.shape[0] // position.shape[0], 1, 1, 1))


def random_blocks(number: Tensor, count: Tensor, chosen: int, seed: int, bidirectional: bool) -> tuple[Tensor, Tensor]:
    """Random blocks of each block, none twice, none the first or last of the document, none a neighbour or itself.

    Args:
        number: (...) int64, of the block.
        count: (...), blocks of its document.
        chosen: how many.
        seed: of the choice.
        bidirectional: whether blocks behind come into question; where not, `count` is not read.

    Returns:
        (..., chosen) numbers, and (..., chosen) bool: which of them there are, for there may not be so many.
    """
    before = (number - 2).clamp(min=0)  # of the blocks 1 to number - 2
    behind = (count - 3 - number).clamp(min=0) if bidirectional else torch.zeros_like(number)
    available, picked = before + behind, number.new_empty(*number.shape, 0)
    for turn in range(chosen):
        pick = _hashed(number, turn, seed) % (available - turn).clamp(min=1)
        for earlier in picked.sort(-1).values.unbind(-1):  # the pick-th of those that are left
            pick = pick + (pick >= earlier)
        picked = torch.cat([picked, pick[..., None]], dim=-1)
    far = torch.where(picked < before[..., None], picked + 1, picked - before[..., None] + number[..., None] + 2)
    return far, torch.arange(chosen, device=number.device) < available[..., None]


def _hashed(number: Tensor, turn: int, seed: int) -> Tensor:
    """A number below 2^31 that looks random: two rounds of multiplication and shift, within 63 bits."""
    x = number + ((turn * 0x9E3779B1 + seed * 0x85EBCA77) & 0xFFFFFFFF)
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return (x ^ (x >> 16)) & 0x7FFFFFFF

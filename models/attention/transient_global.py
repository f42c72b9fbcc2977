"""A window and summaries of everything else, made anew in every layer (LongT5, arXiv 2112.07916, section 3.1.2).

B batch, H query heads, G key/value heads, T new tokens, S tokens so far, D model width, d channels of a head, w window,
N summaries (S / block), C of them new.

A document is cut into blocks from its first token on. The sum of a block's inputs is normalised and goes through the
key and value maps of the tokens; one softmax is over the window and the summaries. To the scores of a summary a learned
number is added, by head and by how many blocks lie between. In an encoder a token sees all summaries of its document,
and the tokens behind the last complete block count to that one. In a decoder it sees those of the blocks that are
complete, its own included where it ends one: an open block would tell of later tokens.

Time and memory are O(T (w + T / block)).
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.full import Full, token_distance
from models.attention.kernels.banded import Extra, attend_band
from models.attention.kernels.sdpa import AttentionMask, attend
from models.attention.protocol import ForwardInputs
from models.attention.segments import document_ends, document_starts
from models.attention.window import Window, WindowAttention
from models.cache import Kept, TransientCache
from models.errors import UserError
from models.linear import Embedding
from models.positions import Positional
from models.positions.t5 import bucket
from models.specs import ATTENTIONS, LayerContext


@ATTENTIONS.register("transient")
@dataclass(frozen=True, kw_only=True)
class Transient(Window):
    """A sliding window and a summary of every block; all other options are those of `window`.

    The model's position encoding is for the tokens. Where it rotates them, a summary stands at its block's last token.

    Args:
        block: tokens of a block.
        buckets: of the numbers of blocks between a query and a summary, as of a `t5` position.
        max_distance: from so many blocks on all are in the last bucket.
        input_width: D, of which a cache keeps so many channels for each token of the open block. Nothing: the model's
            width, and no other fits.
    """

    heads_prunable = False
    heads_because = "the biases of its summaries belong to each of them"

    block: int
    buckets: int = 32
    max_distance: int = 128
    input_width: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dilation != 1:
            raise UserError(f"a window beside summaries has no gaps: dilation must be 1, got {self.dilation}")
        if self.block < 1:
            raise UserError(f"block must be at least 1 token, got {self.block}")
        if self.buckets < 4 or self.buckets % 2:
            raise UserError(f"buckets must be even and at least 4, got {self.buckets}")
        if self.max_distance <= self.buckets // 2:
            raise UserError(
                f"max_distance must be above {self.buckets // 2}, half the buckets, got {self.max_distance}"
            )

    def resolve(self, width: int, layer: int = 0) -> Self:
        if self.input_width not in (None, width):
            raise UserError(f"input_width must be the model's width of {width}, got {self.input_width}")
        return replace(super().resolve(width, layer), input_width=width)

    def build(self, place: LayerContext) -> nn.Module:
        return TransientAttention(self, place)

    def flops_per_token(self, width: int, length: int) -> int:
        """Forward FLOPs of one token that sees `length` tokens, with its share in the making of the summaries."""
        summaries = length // self.block
        made = summaries * 4 * width * self.kv_heads * self.head_width
        return Full.flops_per_token(self, width, min(length, self.window) + summaries) + made // length

    def cache_elements(self, tokens: int) -> int:
        summaries = Full.cache_elements(self, tokens // self.block)
        return super().cache_elements(tokens) + summaries + min(tokens, self.block - 1) * self.input_width


class CompleteBlocks(NamedTuple):
    """The complete blocks of all tokens so far; S is the end of those that a row does not have.

    Attributes:
        starts: (B or 1, S) number of the first token of each token's document.
        ends: (B or 1, N) number of the last token of each block, rising.
        first: (B or 1, N) number of the first token of its document.
        done: (B or 1, 1) how many are before the new tokens.
        new: (B or 1, C) which may end among them.
    """

    starts: Tensor
    ends: Tensor
    first: Tensor
    done: Tensor
    new: Tensor


def complete_blocks(
    documents: Tensor | None, past: int, tokens: int, block: int, device: torch.device
) -> CompleteBlocks:
    """The blocks of `tokens` tokens, `past` of them from before; documents (B or 1, S) or None for a single one."""
    starts = document_starts(documents, tokens, device)
    count = tokens // block  # N: documents that begin inside a block have fewer, none has more
    complete = (torch.arange(tokens, device=device) - starts) % block == block - 1
    if documents is not None:  # padding has none, so that the numbers of the others do not hang on it
        complete = complete & (documents >= 0)
    numbers = torch.arange(1, count + 1, device=device).expand(len(starts), -1)
    ends = torch.searchsorted(complete.cumsum(1), numbers.contiguous())  # (B or 1, N)
    first = starts.gather(1, ends.clamp(max=tokens - 1))
    done = (ends < past).sum(1, keepdim=True)
    arriving = count - past // block if documents is None else min((tokens - past) // block + 1, count)
    new = (done + torch.arange(arriving, device=device)).clamp(max=max(count - 1, 0))
    return CompleteBlocks(starts, ends, first, done, new)


class TransientAttention(WindowAttention):
    """The module of `Transient`."""

    def __init__(self, spec: Transient, place: LayerContext) -> None:
        super().__init__(spec, place)
        self.block, self.buckets, self.max_distance = spec.block, spec.buckets, spec.max_distance
        self.width = place.width
        self.summary_norm = nn.RMSNorm(place.width, eps=1e-6)
        self.summary_bias = Embedding(spec.buckets, self.heads, std=0.02)

    def forward(self, x: Tensor, forward_inputs: ForwardInputs, cache: TransientCache | None = None) -> Tensor:
        batch, new, _ = x.shape
        end, positional = forward_inputs.past + new, forward_inputs.positional[self.positional]
        blocks = complete_blocks(forward_inputs.documents, forward_inputs.past, end, self.block, x.device)
        q = self.q(x).view(batch, new, self.heads, self.head_width).transpose(1, 2)  # (B, H, T, d)
        q = positional.rotate(self.q_norm(q) if self.normalises else q)
        k, v = self._keys_and_values(x, positional)  # (B, G, T, d)
        inputs = x if cache is None else cache.extend(x)
        ends = blocks.ends.gather(1, blocks.new).clamp(forward_inputs.past, end - 1)  # (B or 1, C)
        sums = self._sums(inputs, ends, end, forward_inputs.documents)  # (B, C, D)
        summaries = self._keys_and_values(self.summary_norm(sums), at(positional, ends - forward_inputs.past))
        if cache is not None:
            summaries = cache.summarise(*summaries, blocks.done, blocks.ends.shape[1])
        extra = Extra(*summaries, *self._seen(blocks, forward_inputs))
        kept = Kept(k, v, None) if cache is None else cache.append(k, v)
        y = self._over(q, kept, extra, forward_inputs)  # (B, H, T, d)
        return self.o(y.transpose(1, 2).reshape(batch, new, self.heads * self.head_width))  # (B, T, D)

    def _keys_and_values(self, x: Tensor, positional: Positional) -> tuple[Tensor, Tensor]:
        """Of tokens or summaries x (B, T, D), at these positions: (B, G, T, d) each."""
        k, v = (y.unflatten(2, (-1, self.head_width)).transpose(1, 2) for y in (self.k(x), self.v(x)))
        return positional.rotate(self.k_norm(k) if self.normalises else k), v

    def _sums(self, inputs: Tensor, ends: Tensor, tokens: int, documents: Tensor | None) -> Tensor:
        """The sums (B, C, D) of the blocks that end at `ends` (B or 1, C), of the last inputs (B, ., D) of all."""
        batch, held, width = inputs.shape
        exact = torch.promote_types(inputs.dtype, torch.float32)
        behind = self.block if self.bidirectional else 1  # fewer tokens than a block count to the one before them
        offsets = torch.arange(1 - self.block, behind, device=inputs.device)  # (L,)
        numbers = ends[..., None] + offsets  # (B or 1, C, L)
        index = (numbers - (tokens - held)).clamp(0, held - 1).flatten(1)[..., None].expand(batch, -1, width)
        found = inputs.gather(1, index).unflatten(1, numbers.shape[1:]).to(exact)  # (B, C, L, D)
        if not self.bidirectional:
            return found.sum(2).to(inputs.dtype)
        stop = document_ends(documents, tokens, inputs.device).gather(1, ends)[..., None]  # (B or 1, C, 1)
        mine = (offsets <= 0) | ((numbers < stop) & (stop - ends[..., None] <= self.block))  # (B or 1, C, L)
        return torch.where(mine[..., None], found, 0.0).sum(2).to(inputs.dtype)

    def _seen(self, blocks: CompleteBlocks, inputs: ForwardInputs) -> tuple[Tensor, Tensor]:
        """Mask of the summaries for the new tokens, (B or 1, T, N), and the bias of their scores, (B or 1, H, T, N)."""
        tokens, device = blocks.starts.shape[1], blocks.starts.device
        rows, starts = torch.arange(inputs.past, tokens, device=device), blocks.starts[:, inputs.past :]
        visible = (blocks.first[:, None] == starts[..., None]) & (blocks.ends < tokens)[:, None]  # (B or 1, T, N)
        own = (rows - starts) // self.block  # (B or 1, T), the query's block in its document
        if self.bidirectional:
            own = own.minimum((document_ends(inputs.documents, tokens, device) - starts) // self.block - 1)
        else:
            visible = visible & (blocks.ends[:, None] <= rows[:, None])
        distance = own[..., None] - ((blocks.ends - blocks.first) // self.block)[:, None]  # (B or 1, T, N)
        distance = distance if self.bidirectional else distance.clamp(min=0)
        bias = self.summary_bias(bucket(distance, self.buckets, self.max_distance, self.bidirectional))
        return visible, bias.movedim(-1, 1).to(torch.promote_types(bias.dtype, torch.float32))

    def _over(self, q: Tensor, kept: Kept, extra: Extra, inputs: ForwardInputs) -> Tensor:
        """Attention of the new queries (B, H, T, d) over the window and the summaries: (B, H, T, d)."""
        new, keys = q.shape[2], kept.keys.shape[2]
        if new <= self.window:
            return self._joined(q, kept, extra, inputs)
        early = keys - new  # tokens that are kept from before the new ones, which now ask nothing
        documents = None if inputs.documents is None else (inputs.documents[:, -keys:],) * 2  # (B or 1, K)
        q, seen, bias = (F.pad(x, (0, 0, early, 0)) for x in (q, extra.visible, extra.position))
        extra = Extra(extra.keys, extra.values, seen, bias) if extra.keys.shape[2] else None
        scoring = partial(self.scoring, inputs=inputs)
        return attend_band(q, kept.keys, kept.values, self.band, scoring, documents, extra, self.drop())[:, :, early:]

    def _joined(self, q: Tensor, kept: Kept, extra: Extra, inputs: ForwardInputs) -> Tensor:
        """The same for few tokens: all queries over all that is kept and all summaries."""
        distance = token_distance(q, kept, inputs)  # (T, K)
        scoring, near = self.scoring(q, kept.keys, distance, inputs), self._mask(distance, kept, inputs)
        near = distance.new_ones(1, 1, *distance.shape, dtype=torch.bool) if near is None else near  # (., 1, T, K)
        far = extra.visible[:, None]  # (B or 1, 1, T, N)
        rows = max(len(near), len(far))
        mask = torch.cat([x.expand(rows, -1, -1, -1) for x in (near, far)], dim=-1)  # (., 1, T, K + N)
        bias = distance.new_zeros(1, dtype=extra.position.dtype) if scoring.position is None else scoring.position
        bias = bias.expand(len(extra.position), self.heads, *distance.shape)  # (B or 1, H, T, K)
        scoring = replace(scoring, position=torch.cat([bias, extra.position], dim=-1))
        k, v = torch.cat([kept.keys, extra.keys], dim=2), torch.cat([kept.values, extra.values], dim=2)
        return attend(q, k, v, AttentionMask(mask, causal=False), scoring, self.drop())

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> TransientCache:
        sizes, widths = (self.block, capacity), (self.head_width, self.width)
        return TransientCache(batch, self.kv_heads, min(self.window, capacity), sizes, widths, device, dtype)


def at(positional: Positional, index: Tensor) -> Positional:
    """The rotation of the new tokens with these indices (B or 1, C)."""
    if positional.cos is None:
        return positional
    rows = max(len(index), len(positional.cos))

    def chosen(table: Tensor) -> Tensor:  # (B or 1, 1, T, R) -> (B or 1, 1, C, R)
        table = table[:, 0].expand(rows, -1, -1)
        return table.gather(1, index[..., None].expand(rows, -1, table.shape[2]))[:, None]

    return positional._replace(cos=chosen(positional.cos), sin=chosen(positional.sin))

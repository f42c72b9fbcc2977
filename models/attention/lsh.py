"""Attention among tokens that fall into the same bucket (Reformer, arXiv 2001.04451, section 2).

Queries and keys are one map, k = q / |q|. In each of R rounds a token is hashed to argmax([xR; -xR]) for a random
rotation R; tokens are sorted by bucket, and a query attends to near ones in that order. It attends to itself only where
there is nothing else. A key that several rounds bring counts once, and the rounds are weighted by their partition
functions, so that the output is one softmax over all keys that any round brings.

What near is:

- In an encoder it is the paper's: the sorted tokens are cut into chunks of m, and a query sees its own chunk and the
  one before. Each document is cut from its own beginning, so that packed documents stay what they are alone.
- In a decoder that would leak: a later token that falls into an earlier bucket moves the borders of all chunks behind
  it, and with them the set of keys that earlier queries see. Here a query sees the last m tokens of its bucket before
  it instead. These are settled when it is read, whatever follows, and a cache that keeps the buckets gives the same.

The number of buckets is a number of the model, not of the sequence as in the paper (2 T / m), since a prompt must not
be hashed anew when it grows.

B batch, H heads, R rounds, T tokens, S visible tokens, d channels of a head, b buckets, m chunk, P places in sorted
order.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.gather import of_heads
from models.attention.kernels.bucketed import SELF, Layout, Weighing, bucketed_attention
from models.attention.options import check_dropout, head_width_of
from models.attention.protocol import NOTHING, Attention, ForwardInputs, Mixed
from models.cache.hashed import HashedCache
from models.errors import UserError
from models.fp32 import without_autocast
from models.linear import Linear, residual_std
from models.specs import ATTENTIONS, POSITIONS, AttentionSpec, LayerContext


@ATTENTIONS.register("lsh")
@dataclass(frozen=True)
class Lsh(AttentionSpec):
    """Locality-sensitive hashing attention with shared queries and keys.

    Args:
        heads: heads, each with a hash of its own.
        buckets: of each round, an even number; the paper takes 2 * context / chunk.
        chunk: m. A decoder's query sees so many earlier tokens of its bucket, an encoder's its chunk and the one
            before.
        rounds: of hashing.
        head_width: channels of a head. Nothing: model width / heads.
        bias: whether the maps qk and v have a bias.
        out_bias: whether the output map has one.
        dropout: of the attention probabilities, in training.
        position: this layer's own position encoding. Nothing: the model's. Tokens are hashed without it.
        scale: of the scores. Nothing: 1 / sqrt(head_width). `transformers` has 1.
        across_buckets: whether an encoder's query sees tokens of all buckets in its chunks, as in `transformers`.
        duplicates: whether a key counts as often as rounds bring it, as in `transformers`; of two rounds or more.
        seed: of the rotations, which are never trained.
        layer_seed: the layer's own seed. Nothing: it follows from `seed` and the number of the layer.
    """

    position_types = ("rotation",)
    heads_because = "each of them has a hash of its own"

    heads: int
    buckets: int
    chunk: int = 64
    rounds: int = 2
    head_width: int | None = None
    bias: bool = False
    out_bias: bool = False
    dropout: float = 0.0
    position: Any = field(default=None, metadata={"registry": POSITIONS})
    scale: float | None = None
    across_buckets: bool = False
    duplicates: bool = False
    seed: int = 0
    layer_seed: int | None = None

    def __post_init__(self) -> None:
        for name in ("heads", "chunk", "rounds"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.buckets < 2 or self.buckets % 2:
            raise UserError(f"buckets must be even and at least 2, got {self.buckets}")
        check_dropout(self.dropout)
        if self.scale is not None and self.scale <= 0:
            raise UserError(f"scale must be positive, got {self.scale}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be at least 0 and below 2^32, got {self.seed}")
        if self.duplicates and self.rounds == 1:
            raise UserError("duplicates counts a key once for each round that brings it: give rounds 2 or more")
        if self.across_buckets:
            object.__setattr__(self, "directions", ("bidirectional",))
            because = "which tokens of other buckets lie near (across_buckets) depends on later ones"
            object.__setattr__(self, "directions_because", because)

    def resolve(self, width: int, layer: int = 0) -> Self:
        """The same with its head width spelled out for a model of this width."""
        layer_seed = self.seed * 65537 + layer if self.layer_seed is None else self.layer_seed
        return replace(self, head_width=head_width_of(self.head_width, self.heads, width), layer_seed=layer_seed)

    def build(self, place: LayerContext) -> nn.Module:
        return LshAttention(self, place)

    def flops_per_token(self, width: int, length: int) -> int:
        """Forward FLOPs of one token in a whole sequence of `length`, empty places of a decoder's blocks included."""
        projections = 2 * width * self.head_width * 3 * self.heads
        hashing = self.heads * self.head_width * self.rounds * self.buckets
        block = block_of(self.chunk)
        places = block * blocks_of(length, self.buckets, block)
        keys = before_of(self.chunk) + block
        computed = self.rounds * self.heads * (places + before_of(self.chunk)) - before_of(self.chunk)
        scores = 4 * self.head_width * computed * keys // length
        return projections + hashing + scores

    def cache_elements(self, tokens: int) -> int:
        """Numbers that the cache holds for a sequence of so many tokens: keys and values."""
        return 2 * self.heads * self.head_width * tokens

    def cache_singles(self, tokens: int) -> int:
        """Numbers of four bytes beside them: the buckets."""
        return self.heads * self.rounds * tokens


class LshAttention(Attention):
    """The module of `Lsh`."""

    def __init__(self, spec: Lsh, place: LayerContext) -> None:
        super().__init__()
        self.spec, self.place = spec, place
        inner = spec.heads * spec.head_width
        self.qk = Linear(place.width, inner, bias=spec.bias, std=0.02)
        self.v = Linear(place.width, inner, bias=spec.bias, std=0.02)
        self.o = Linear(inner, place.width, bias=spec.out_bias, std=residual_std(0.02, place.branches))
        shape = spec.heads, spec.head_width, spec.rounds * spec.buckets // 2
        self.register_buffer("rotations", torch.empty(shape))  # (H, d, R * b / 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the rotations of the layer's own seed, without touching any other random numbers."""
        if self.rotations.is_meta:
            return
        generator = torch.Generator().manual_seed(self.spec.layer_seed)
        drawn = torch.randn(self.rotations.shape, generator=generator, device="cpu")
        self.rotations.copy_(drawn)

    def forward(self, x: Tensor, inputs: ForwardInputs, cache: HashedCache | None = None) -> Tensor | Mixed:
        batch, new, _ = x.shape
        spec, positional = self.spec, inputs.positional[self.place.positional]
        q = self.qk(x).view(batch, new, spec.heads, spec.head_width).transpose(1, 2)  # (B, H, T, d)
        v = self.v(x).view(batch, new, spec.heads, spec.head_width).transpose(1, 2)  # (B, H, T, d)
        key = self.place.layer, "buckets"  # near ties: those of the forward where the backward computes it again
        buckets = inputs.state[key].long() if key in inputs.state else self._buckets(q)  # (B, H, R, T)
        state = {key: buckets.int()} if inputs.recomputed else NOTHING
        q, k = positional.rotate(q), positional.rotate(unit(q))  # (B, H, T, d)
        if cache is not None:
            kept, buckets = cache.append_hashed(k, v, buckets)  # (B, H, S, d), (B, H, R, S)
            k, v = kept.keys.to(q.dtype), kept.values.to(q.dtype)
        y = self._mix(q, k, v, buckets, inputs.documents)  # (B, H, T, d)
        y = self.o(y.transpose(1, 2).reshape(batch, new, spec.heads * spec.head_width))  # (B, T, D)
        return Mixed(y, NOTHING, state) if state else y

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, buckets: Tensor, documents: Tensor | None) -> Tensor:
        spec, seen, new = self.spec, k.shape[2], q.shape[2]
        drop = spec.dropout if self.training else 0.0
        scoring = Weighing(spec.head_width**-0.5 if spec.scale is None else spec.scale, spec.duplicates, drop)
        if self.place.bidirectional:
            chunk = min(spec.chunk, seen)
            return bucketed_attention(q, k, v, chunks(buckets, documents, chunk, spec.across_buckets), scoring)
        if seen > new == 1:
            return attend_last(q, k, v, group_of(buckets, documents), spec.chunk, scoring)
        if seen > new and new <= spec.chunk:  # a few new tokens behind a cache: not worth sorting all
            return reference(q, k, v, last_of_bucket(buckets, documents, spec.chunk, new), scoring)
        q = torch.cat([k[:, :, : seen - new], q], dim=2)  # (B, H, S, d); what the first ones see is not used
        layout = windows(buckets, documents, spec.chunk, spec.buckets)
        return bucketed_attention(q, k, v, layout, scoring)[:, :, seen - new :]

    def _buckets(self, q: Tensor) -> Tensor:
        """The buckets (B, H, R, T) of q (B, H, T, d)."""
        exact = torch.promote_types(q.dtype, torch.float32)
        with without_autocast(q.device):  # rounded to half, near ties fall into other buckets
            rotated = q.detach().to(exact) @ self.rotations.to(exact)  # (B, H, T, R * b / 2)
        rotated = rotated.unflatten(-1, (self.spec.rounds, -1))
        return torch.cat([rotated, -rotated], dim=-1).argmax(-1).transpose(2, 3)  # (B, H, R, T)

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> HashedCache:
        spec = self.spec
        return HashedCache(batch, spec.heads, spec.rounds, capacity, spec.head_width, device, dtype)


def unit(q: Tensor) -> Tensor:
    """q (..., d) at length 1."""
    return F.normalize(q, dim=-1)


def block_of(chunk: int) -> int:
    """Places c of a decoder's block: a bucket leaves up to c - 1 of them empty, but a block of c computes c + m keys.

    A multiple of 8, as is the number of keys: products of other shapes take other routes in the last block of a batch,
    and the order of a sum would depend on how many blocks come later.
    """
    return max(8, chunk // 4 // 8 * 8)


def before_of(chunk: int) -> int:
    """Places before a block in which all that its first token sees must lie, in whole blocks."""
    return -(-chunk // block_of(chunk)) * block_of(chunk)


def blocks_of(tokens: int, buckets: int, block: int) -> int:
    """Blocks that tokens in so many buckets can fill at most, when each bucket begins a block."""
    return (tokens + min(tokens, buckets) * (block - 1)) // block


def windows(buckets: Tensor, documents: Tensor | None, chunk: int, count: int) -> Layout:
    """A decoder's layout of buckets (B, H, R, T) below `count`: a token sees `chunk` earlier ones of its bucket.

    Every bucket begins a block, so that what a token reads lies at the same places of its block whatever comes later:
    sums over it are the same to the bit. Documents are runs of tokens, so the last of a bucket are the last of its own.
    """
    tokens, block = buckets.shape[-1], block_of(chunk)
    places = block * blocks_of(tokens, count, block)
    sizes = torch.zeros(*buckets.shape[:-1], count, dtype=torch.int64, device=buckets.device)  # (B, H, R, b)
    sizes = sizes.scatter_add(-1, buckets, torch.ones_like(buckets))
    order, steps = _sorted(buckets)  # (B, H, R, T)
    theirs = buckets.gather(-1, order)
    padded = -(-sizes // block) * block
    shift = (padded.cumsum(-1) - padded) - (sizes.cumsum(-1) - sizes)  # (B, H, R, b) by the empty places before it
    at = torch.full((*buckets.shape[:-1], places), tokens, dtype=torch.int64, device=buckets.device)
    at = at.scatter(-1, steps + shift.gather(-1, theirs), order)
    numbers = _unsorted(steps + chunk * _changes(group_of(buckets, documents).gather(-1, order)), order)
    return Layout(at, numbers, chunk, block, before_of(chunk), 0)


def chunks(buckets: Tensor, documents: Tensor | None, chunk: int, across: bool) -> Layout:
    """An encoder's layout of buckets (B, H, R, T): a token sees its chunk of the sorted order and the one before."""
    tokens = buckets.shape[-1]
    own = torch.zeros_like(buckets) if documents is None else documents[:, None, None].expand_as(buckets)
    order, steps = _sorted(buckets)
    if documents is not None:
        order = order.gather(-1, own.gather(-1, order).argsort(dim=-1, stable=True))  # by document, bucket, position
    mine = own.gather(-1, order)  # (B, H, R, T)
    begins = F.pad(mine[..., 1:] != mine[..., :-1], (1, 0), value=True)
    start = torch.where(begins, steps, 0).cummax(dim=-1).values  # of each token's document
    chunk_number = ((steps - start) % chunk == 0).cumsum(-1) - 1
    group = mine if across else group_of(buckets, documents).gather(-1, order)
    numbers = _unsorted(chunk_number + 2 * _changes(group), order)
    at = F.pad(order, (0, -tokens % chunk), value=tokens)
    aligned = documents is None  # else a block holds parts of two chunks
    before, after = (chunk, 0) if aligned else (2 * chunk, chunk)
    return Layout(at, numbers, 1, chunk, before, after)


def _sorted(buckets: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens by bucket and position, and the numbers of these places: (B, H, R, T) each."""
    steps = torch.arange(buckets.shape[-1], device=buckets.device).expand_as(buckets)
    return buckets.argsort(dim=-1, stable=True), steps


def _unsorted(x: Tensor, order: Tensor) -> Tensor:
    """Numbers x (B, H, R, T) of sorted tokens in the order of the tokens, int32."""
    return torch.zeros_like(x, dtype=torch.int32).scatter(-1, order, x.int())


def _changes(x: Tensor) -> Tensor:
    """Number of changes in x (..., T) up to each place."""
    return F.pad(x[..., 1:] != x[..., :-1], (1, 0)).cumsum(-1)


def group_of(buckets: Tensor, documents: Tensor | None) -> Tensor:
    """Numbers (B, H, R, T) that agree where bucket and document do."""
    if documents is None:
        return buckets
    return (documents.long()[:, None, None] + 1) * (2**31) + buckets  # padding, document -1, among itself


def attend_last(q: Tensor, k: Tensor, v: Tensor, group: Tensor, chunk: int, scoring: Weighing) -> Tensor:
    """As `reference` for the last token alone, q (B, H, 1, d): of k, v (B, H, S, d) it reads what the rounds bring it.

    It sees the last `chunk` earlier tokens of its group, of (B, H, R, S), in each round.
    """
    exact, seen = torch.promote_types(q.dtype, torch.float32), k.shape[2]
    steps = torch.arange(seen, device=q.device, dtype=torch.int32)
    members = torch.where(group == group[..., -1:], steps, -1)  # (B, H, R, S)
    found = members.topk(min(chunk + 1, seen), dim=-1, sorted=False).values  # (B, H, R, chunk + 1), -1: none
    found = found.flatten(2)  # (B, H, R * (chunk + 1))
    index = found.clamp(min=0).long()
    scores = (q @ of_heads(k, index).transpose(-1, -2))[:, :, 0].to(exact) * scoring.scale  # (B, H, R * (chunk + 1))
    scores = scores.masked_fill(found == seen - 1, SELF)
    if not scoring.duplicates:
        times = torch.zeros(*k.shape[:3], device=q.device, dtype=exact)  # (B, H, S) in how many rounds
        scores = scores - times.scatter_add(-1, index, (found >= 0).to(exact)).gather(-1, index).log()
    p = scores.masked_fill(found < 0, -math.inf).softmax(-1).to(v.dtype)
    return F.dropout(p, scoring.dropout)[:, :, None] @ of_heads(v, index)


def last_of_bucket(buckets: Tensor, documents: Tensor | None, chunk: int, new: int) -> Tensor:
    """Causal mask of the `new` last of S tokens in each round: of buckets (B, H, R, S), (B, H, R, T, S) bool."""
    group, seen = group_of(buckets, documents), buckets.shape[-1]
    earlier = torch.ones(new, seen, dtype=torch.bool, device=buckets.device).tril(seen - new)  # (T, S)
    same = (group[..., -new:, None] == group[..., None, :]) & earlier
    behind = same.flip(-1).cumsum(-1).flip(-1) - 1  # members of the group after each key, up to the query
    return same & (behind <= chunk)


def reference(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scoring: Weighing) -> Tensor:
    """The same as `bucketed_attention`, written down plainly: seen (B, H, R, T, S) says which keys each round brings.

    Takes queries (B, H, T, d), the last T of S tokens, and keys and values (B, H, S, d); gives (B, H, T, d).
    """
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(-1, -2)).to(exact) * scoring.scale  # (B, H, T, S)
    itself = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(k.shape[2] - q.shape[2])
    itself = itself & itself.new_ones(itself.shape).tril(k.shape[2] - q.shape[2])  # (T, S)
    times = seen.sum(2)  # (B, H, T, S) in how many rounds
    scores = scores.masked_fill(itself, SELF)
    if scoring.duplicates:
        scores = scores + times.clamp(min=1).to(exact).log()
    p = scores.masked_fill(times == 0, -math.inf).softmax(-1).to(v.dtype)
    return F.dropout(p, scoring.dropout) @ v

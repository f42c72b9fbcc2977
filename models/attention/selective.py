"""Selective attention: a token may mark earlier ones as no longer needed (arXiv 2410.02703).

    S = ReLU(scores of head 0), 0 for the token itself and for the first of its document
    F_i = sum of S_q over the queries q < i of the document
    all heads: softmax(scores - F)

So attention is only ever taken away, by one existing head, and there are no new parameters. With a `budget`, the token
with the largest F is forgotten whenever more than that are kept (context pruning, section 4).

B batch, H query heads, G key/value heads, T new tokens, S tokens so far, K of them that are remembered, d channels.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.full import Full, FullAttention
from models.attention.gather import take
from models.attention.kernels.sdpa import AttentionMask, ScoreMod, attend
from models.attention.protocol import NOTHING, ForwardInputs, Mixed
from models.cache import Kept, Remembered, SelectiveCache
from models.cpu.bias_attention import attend_causal
from models.cpu.dispatch import trains_bias
from models.errors import UserError
from models.fp32 import without_autocast
from models.specs import ATTENTIONS, LayerContext

NOTE = "selection"  # under which a layer leaves its F for the layers above
RUN = 64  # queries


@ATTENTIONS.register("selective")
@dataclass(frozen=True, kw_only=True)
class Selective(Full):
    """Causal attention whose head 0 masks, for all heads and all later tokens, what is no longer needed.

    All other options are those of `full`; scores are what the softmax would see, position biases included.

    Args:
        budget: tokens of a document that are remembered from one token to the next, at least 2. Beyond that, the token
            with the largest F goes (the oldest of equals), but never the first of the document nor the newest. The same
            tokens go when a whole sequence is computed at once. Nothing: all are kept.
        memory_loss: weight of the training loss on the tokens that cannot be forgotten (section 5): the mean over the
            layers of max_i M_i / n, where M_i = sum of 1 - min(F_ik, 1) over the k <= i, and n counts tokens.
        carry: lambda, where F of the nearest layer below that has a `carry` is added with this weight: F + lambda
            F_below. An extension without published results; what the layer below has dropped adds nothing.
    """

    needs_mask = False
    directions = ("causal",)
    directions_because = "a token is masked by those behind it"
    position_types = Full.position_types
    heads_prunable = False
    heads_because = "head 0 selects for all of them"

    budget: int | None = None
    memory_loss: float = 0.0
    carry: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and self.budget < 2:
            raise UserError(f"budget must be at least 2, the first token and the newest, got {self.budget}")
        for name in ("memory_loss", "carry"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} must be at least 0, got {getattr(self, name)}")

    @property
    def carries(self) -> bool:
        """Whether the layer leaves its F for those above."""
        return self.carry > 0

    def build(self, place: LayerContext) -> nn.Module:
        return SelectiveAttention(self, place)

    def flops_per_token(self, width: int, length: int) -> int:
        """As `Full`, with the scores of head 0 twice; under a budget, of a token that is decoded."""
        seen = length if self.budget is None else min(length, self.budget + 1)
        return super().flops_per_token(width, seen) + 2 * self.head_width * seen

    def cache_elements(self, tokens: int) -> int:
        return super().cache_elements(self.kept(tokens))

    def cache_singles(self, tokens: int) -> int:
        """Numbers that the cache holds in fp32 whatever the dtype: F of each token."""
        return self.kept(tokens)

    def kept(self, tokens: int) -> int:
        """Number of tokens that the cache holds of so many."""
        return tokens if self.budget is None else min(tokens, self.budget)


class Selection(NamedTuple):
    """Accumulated mask of each token for each query, and the tokens that it sees (arXiv 2410.02703, eq. 2).

    Attributes:
        masked: (B, T, K) F, with what the layer below adds.
        seen: (B or 1, T, K) bool.
        after: (B, K) the layer's own F after the last query.
        worthy: (B, K) bool, what the next token may see; None without a budget.
    """

    masked: Tensor
    seen: Tensor
    after: Tensor
    worthy: Tensor | None


class SelectiveAttention(FullAttention):
    """The module of `Selective`."""

    def __init__(self, spec: Selective, place: LayerContext) -> None:
        super().__init__(spec, place)
        self.budget, self.carry, self.memory_loss = spec.budget, spec.carry, spec.memory_loss
        self.layer, self.layers = place.layer, place.layers

    def mix(self, q: Tensor, kept: Kept | Remembered, inputs: ForwardInputs) -> Mixed:
        memory = kept if isinstance(kept, Remembered) else self._whole(kept)
        scoring = self._scoring_of(q, memory, inputs)
        chosen = self.select(q, memory, scoring, inputs)
        if memory.cache is not None:
            memory.cache.keep(memory, chosen.after, chosen.worthy)
        losses, state = NOTHING, self._left(chosen, memory.columns, inputs) if self.carry else NOTHING
        if self.training and self.memory_loss:
            losses = {"memory": self.memory_loss / self.layers * held(chosen, inputs.documents)}
        position = -chosen.masked[:, None]  # (B, 1, T, K)
        scoring = replace(scoring, position=position if scoring.position is None else scoring.position + position)
        k, v, seen, dropout = memory.keys, memory.values, chosen.seen[:, None], self.drop()
        if scoring.additive and trains_bias(q, scoring.position) and not dropout:
            y = attend_causal(q, k, v, scoring.position, seen, scoring.scale)
        else:
            y = attend(q, k, v, AttentionMask(seen, causal=False), scoring, dropout)
        return Mixed(y, losses, state)

    @staticmethod
    def _whole(kept: Kept) -> Remembered:
        """A sequence that nothing came before."""
        batch, _, tokens, _ = kept.keys.shape
        wide = torch.promote_types(kept.keys.dtype, torch.float32)
        columns = torch.arange(tokens, device=kept.keys.device)[None]  # (1, T)
        return Remembered(kept.keys, kept.values, columns, kept.keys.new_zeros(batch, tokens, dtype=wide))

    def _scoring_of(self, q: Tensor, memory: Remembered, inputs: ForwardInputs) -> ScoreMod:
        """Score modification before selection: row by row where the rows remember other tokens."""
        rows = inputs.past + torch.arange(q.shape[2], device=q.device)
        distance = rows[:, None] - memory.columns[:, None]  # (B or 1, T, K)
        if len(distance) == 1 or not inputs.positional[self.positional].biases:
            return self.scoring(q, memory.keys, distance[0], inputs)
        each = [self.scoring(q[i : i + 1], memory.keys[i : i + 1], distance[i], inputs) for i in range(len(q))]
        position = torch.stack([one.position.view(one.position.shape[-3:]) for one in each])  # (B, H, T, K)
        values = each[0].values
        if values is not None:
            values = replace(values, index=torch.stack([one.values.index for one in each])[:, None])  # (B, 1, T, K)
        return replace(each[0], position=position, values=values)

    def select(self, q: Tensor, memory: Remembered, scoring: ScoreMod, inputs: ForwardInputs) -> Selection:
        """F for the queries q (B, H, T, d) over what is remembered, and what is dropped meanwhile."""
        columns, documents = memory.columns, inputs.documents
        rows = inputs.past + torch.arange(q.shape[2], device=q.device)  # (T,)
        seen = (columns[:, None] <= rows[:, None]) & (columns[:, None] >= 0)  # (B or 1, T, K)
        first = columns == 0  # (B or 1, K)
        if documents is not None:
            theirs, before = of_columns(documents, columns), of_columns(documents, columns - 1)  # (B or 1, K)
            seen = seen & (documents[:, rows, None] == theirs[:, None])
            first = first | (theirs != before)
        free = seen & ~first[:, None] & (columns[:, None] < rows[:, None])  # what a query may mask, or drop
        picks = head_scores(q[:, 0], memory.keys[:, 0], scoring).relu()  # (B, T, K)
        picks = picks.masked_fill(~(free if documents is None else free & (documents[:, rows, None] >= 0)), 0.0)
        masked = running_sum(torch.cat([memory.selected[:, None], picks[:, :-1]], dim=1))  # (B, T, K)
        after = masked[:, -1] + picks[:, -1]
        if self.carry and (below := self._below(inputs)) is not None:
            masked = masked + self.carry * at_columns(below, columns)
        if self.budget is None:
            return Selection(masked, seen, after.detach(), None)
        deserves = (masked + picks).detach().masked_fill(~free, -math.inf)  # (B, T, K) to be dropped after a query
        over = (seen.sum(2) > self.budget).expand(len(deserves), -1)  # (B, T)
        last = last_queries(deserves, over)  # (B, K)
        steps = torch.arange(q.shape[2], device=q.device)
        seen = seen & (steps[:, None] <= last[:, None])  # (B, T, K)
        return Selection(masked, seen, after.detach(), seen[:, -1] & (last == q.shape[2]))

    def _left(self, chosen: Selection, columns: Tensor, inputs: ForwardInputs) -> dict[tuple[int, str], Tensor]:
        """F (B, T, S) of all tokens for the layers above, 0 for those that a query does not see."""
        masked = chosen.masked.masked_fill(~chosen.seen, 0.0)
        if self.budget is not None:
            spread = masked.new_zeros(*masked.shape[:2], 1 + inputs.past + masked.shape[1])  # the first: empty slots
            index = (columns + 1)[:, None].expand_as(masked)
            masked = spread.scatter(2, index, masked)[..., 1:]
        return {(self.layer, NOTE): masked}

    def _below(self, inputs: ForwardInputs) -> Tensor | None:
        """F (B, T, S) of the nearest layer below that left it, None in the lowest."""
        layers = [layer for layer in range(self.layer) if (layer, NOTE) in inputs.state]
        return inputs.state[layers[-1], NOTE] if layers else None

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> SelectiveCache:
        return SelectiveCache(batch, self.kv_heads, capacity, self.head_width, self.budget, device, dtype)


def head_scores(q: Tensor, k: Tensor, scoring: ScoreMod) -> Tensor:
    """Scores (B, T, K) of head 0, in at least fp32, of its queries (B, T, d) and keys (B, K, d)."""
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = (q @ k.transpose(1, 2)).to(exact) * (q.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale)
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    return scores if scoring.position is None else scores + scoring.position[..., 0, :, :]


def running_sum(x: Tensor) -> Tensor:
    """Sums of x (B, T, K), in at least fp32, over the queries up to each.

    On CPU a cumsum down the columns is slow, and the sums within short runs of queries are a small product. What is
    not finite also spoils the queries before it in its run there, as 0 times it is no number.
    """
    if x.device.type != "cpu" or x.shape[1] <= RUN:
        return x.cumsum(1)
    runs = F.pad(x, (0, 0, 0, -x.shape[1] % RUN)).unflatten(1, (-1, RUN))  # (B, N, RUN, K)
    with without_autocast(x.device):
        within = runs.new_ones(RUN, RUN).tril() @ runs
    before = F.pad(within[:, :-1, -1].cumsum(1), (0, 0, 1, 0))  # (B, N, K)
    return (within + before[:, :, None]).flatten(1, 2)[:, : x.shape[1]]


def of_columns(documents: Tensor, columns: Tensor) -> Tensor:
    """Documents (B or 1, K) of the tokens `columns` (B or 1, K) among all (B or 1, S); -2 before the first of them."""
    return take(documents, columns.clamp(min=0)).where(columns >= 0, -2)


def at_columns(values: Tensor, columns: Tensor) -> Tensor:
    """Of values (B, T, S) those of the tokens `columns` (B or 1, K): (B, T, K)."""
    index = columns.clamp(min=0)[:, None].expand(len(values), values.shape[1], -1)
    return values.gather(2, index)


@torch.library.custom_op("espalier::last_queries", mutates_args=())
def last_queries(deserves: Tensor, over: Tensor) -> Tensor:
    """After which query each token is dropped, one at a time: the one that deserves it most, of equals the first.

    One step reads one row of B x K numbers, so all of them cost about as much as a softmax of the same size.

    Args:
        deserves: (B, T, K), -inf where a token may not go.
        over: (B, T) bool, whether one must go after this query; then there is one that may.

    Returns:
        (B, K) int64: number of the last query that sees the token, T where it stays.
    """
    steps = deserves.shape[1]
    gone = torch.zeros_like(deserves[:, 0])  # (B, K), inf for what has been dropped
    last = torch.full_like(gone, steps, dtype=torch.int64)
    numbers = torch.arange(steps, device=over.device).where(over, steps)  # (B, T)
    marks = torch.zeros_like(deserves[:, :, 0]).masked_fill(over, math.inf)  # (B, T)
    for step in over.any(0).nonzero().flatten().tolist():
        one = (deserves[:, step] - gone).argmax(1, keepdim=True)  # (B, 1)
        gone.scatter_reduce_(1, one, marks[:, step : step + 1], "amax")
        last.scatter_reduce_(1, one, numbers[:, step : step + 1], "amin")
    return last


@last_queries.register_fake
def _(deserves: Tensor, over: Tensor) -> Tensor:
    return torch.empty_like(deserves[:, 0], dtype=torch.int64)


def held(chosen: Selection, documents: Tensor | None) -> Tensor:
    """Tokens that a document cannot do without at its worst moment, per token, over all documents but padding.

    Args:
        chosen: of whole sequences, T = K.
        documents: (B or 1, T), or None when each row is one document.
    """
    needed = (1.0 - chosen.masked.clamp(max=1.0)).masked_fill(~chosen.seen, 0.0).sum(2)  # (B, T)
    if documents is None:
        return needed.amax(1).mean() / needed.shape[1]
    real = (documents >= 0).expand_as(needed)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True).expand_as(needed)
    number = begins.cumsum(1) - 1  # (B, T)
    worst = needed.new_zeros(needed.shape).scatter_reduce(1, number, needed.masked_fill(~real, 0.0), "amax")
    return worst.sum() / real.sum().clamp(min=1)

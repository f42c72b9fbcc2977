"""Mixture-of-depths: some tokens take part in a layer, the others pass it by (arXiv 2404.02258).

    r = w . x                                               one number per token, in at least fp32
    y = x + sigmoid(r) (block(x) - x)   where r > b         the block sees only such tokens
    y = x                               elsewhere

The paper takes the k tokens of a sequence with the largest r. That looks ahead, as a token is in or out by what comes
behind it, so sampling needs a second predictor that stands in for the choice (section 3.5, "Sampling"). Here the
threshold b is a number of the layer: after every batch of training it moves towards the r that the wanted share of its
tokens exceeded. So a token's choice depends on itself and its past alone, in training as in decoding, and one rule
serves both; the share is met on average, not in each sequence. The router learns through the factor sigmoid(r).

B batch, T new tokens, C places of the shortened rows, S tokens so far, D model width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.protocol import ForwardInputs, Mixed, document_mask
from models.cache import PAD, BlockCache, LayerCache
from models.cpu.short_attention import training_bias
from models.errors import UserError
from models.fp32 import ExactBuffers, exact, without_autocast
from models.specs import DEPTHS, DepthSpec, LayerContext

DEPTH = "depth"  # the name of its state in the cache of a block
EXACT = ("threshold", "target")  # buffers of a layer that stay in at least fp32

ROUND = 16  # tokens to a multiple of which rows are shortened, at least

Run = Callable[[Tensor, ForwardInputs, BlockCache | None], Mixed]  # the layer on x (B, C, D)


@DEPTHS.register("mixture_of_depths")
@dataclass(frozen=True)
class MixtureOfDepths(DepthSpec):
    """Tokens above a learned threshold take part in the layer.

    Args:
        capacity: share of the tokens that take part, on average.
        rate: how far the threshold moves with a batch of training, as a fraction of the way to the batch's quantile.
    """

    data_dependent = True  # how long the shortened rows are is known only at run time

    capacity: float = 0.5
    rate: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < self.capacity < 1:
            raise UserError(
                f"capacity must be above 0 and below 1 (without a depth all take part), got {self.capacity}"
            )
        if not 0 < self.rate <= 1:
            raise UserError(f"rate must be above 0 and at most 1, got {self.rate}")

    def check(self, layer: Any, position: Any) -> None:
        """Raise UserError where a layer cannot run on a part of the tokens; `position` is that of its attention.

        The shortened rows keep each token's own position, but not the number of tokens between two of them.
        """
        if layer.attention is None:
            return
        if layer.attention.kind != "full":
            raise UserError(
                f"depth {self.kind!r} leaves out tokens, and attention {layer.attention.kind!r} counts on all of them; "
                "it works with attention full"
            )
        if position.acts not in ("rotation", "input", "nothing"):
            raise UserError(
                f"depth {self.kind!r} leaves out tokens, and {position.kind!r} positions count those in between; "
                "it works with positions that rotate, that are added to the embeddings, or with none"
            )

    def build(self, place: LayerContext, attends: bool) -> "DepthRouter":
        return DepthRouter(self, place, attends)

    def flops_per_token(self, width: int) -> int:
        """Of the router alone."""
        return 2 * width


class Shortened(NamedTuple):
    """Rows without the tokens that pass by.

    Attributes:
        index: (B, C) int64, which of the T tokens stands at each place; those that take part come first, in order.
        kept: (B, C) bool, whether the token takes part; the others fill up the row.
        documents: (B, C) their documents; PAD for those that fill up.
    """

    index: Tensor
    kept: Tensor
    documents: Tensor


class DepthRouter(ExactBuffers):
    """Chooses the tokens of one layer, and runs the layer on them.

    Attributes:
        weight: (D,) w.
        threshold: (1,) b, in at least fp32 whatever the dtype of the model.
        target: (1,) likewise, where the threshold goes: the quantile of the latest forward in training. It moves at the
            beginning of the next one (`advance`), so that a backward that runs the layer again chooses the same tokens,
            and is saved, so that a run goes on as if it had never stopped.
        observed: (1,) the target that this process found in its latest forward; None where it has been averaged.
        kept: (B, C) bool, the places of the latest forward's shortened rows that hold a token; None before.
    """

    exact_buffers = EXACT

    def __init__(self, spec: MixtureOfDepths, place: LayerContext, attends: bool) -> None:
        super().__init__()
        self.spec, self.place, self.attends = spec, place, attends
        self.weight = nn.Parameter(torch.empty(place.width))
        for name in self.exact_buffers:
            self.register_buffer(name, exact(torch.empty(1)))
        self.kept: Tensor | None = None
        self.observed: Tensor | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.threshold)
        nn.init.zeros_(self.target)

    def logits(self, x: Tensor) -> Tensor:
        """r (B, T) of x (B, T, D)."""
        x = exact(x)
        with without_autocast(x.device):
            return F.linear(x, self.weight.to(x.dtype)[None]).squeeze(-1)

    @torch.no_grad()
    def advance(self) -> None:
        """Move the threshold towards the latest target, the mean over all processes."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if self.observed is not None:  # DDP has put the first process' target in the place of the others'
                self.target.copy_(self.observed)
            torch.distributed.all_reduce(self.target)
            self.target /= torch.distributed.get_world_size()
        self.observed = None
        self.threshold.lerp_(self.target, self.spec.rate)

    def forward(self, x: Tensor, inputs: ForwardInputs, cache: BlockCache | None, run: Run) -> Mixed:
        """The layer `run` on the chosen tokens of x (B, T, D); the others as they are."""
        documents = None if inputs.documents is None else inputs.documents[:, inputs.past :]  # (B or 1, T)
        r = self.logits(x)  # (B, T)
        if self.training:
            self._observe(r, documents)
        short = self._shorten(r, documents, cached=cache is not None)
        self.kept = short.kept
        if short.index.shape[1] == 0:
            return Mixed(x)
        where = short.index[..., None].expand(-1, -1, x.shape[-1])  # (B, C, D)
        before = x.gather(1, where)  # (B, C, D)
        inside = inputs._replace(documents=short.documents, past=0, block_masks={})
        if self.attends:
            inside = self._context(before, inputs, short, cache and cache[DEPTH])
        after, losses, state = run(before, inside, cache)  # (B, C, D)
        share = r.gather(1, short.index).sigmoid()[..., None].to(x.dtype)  # (B, C, 1)
        y = x.scatter(1, where, torch.where(short.kept[..., None], before + share * (after - before), before))
        return Mixed(y, losses, state)

    @torch.no_grad()
    def _observe(self, r: Tensor, documents: Tensor | None) -> None:
        """Remember the r that `capacity` of the tokens exceed."""
        counted = r.flatten() if documents is None else r[(documents != PAD).expand_as(r)]  # (N,)
        if len(counted):
            self.target.copy_(torch.quantile(counted.float(), 1 - self.spec.capacity))
            self.observed = self.target.clone()

    def _shorten(self, r: Tensor, documents: Tensor | None, cached: bool) -> Shortened:
        chosen = r > self.threshold  # (B, T)
        if documents is None:
            documents = torch.zeros_like(chosen, dtype=torch.int64)
        documents = documents.expand_as(chosen)
        chosen = chosen & (documents != PAD)
        length = r.shape[1]
        longest = int(chosen.sum(1).max())
        if self.training:  # every parameter has its part in every step
            longest = max(longest, 1)
        if not cached:  # kernels meet few shapes, and are compiled for few; in a cache every place counts
            step = max(ROUND, -(-length // (8 * ROUND)) * ROUND)
            longest = min(length, -(-longest // step) * step)
        index = (~chosen).to(torch.uint8).argsort(dim=1, stable=True)[:, :longest]  # (B, C)
        kept = chosen.gather(1, index)
        return Shortened(index, kept, documents.gather(1, index).masked_fill(~kept, PAD))

    def _context(
        self, x: Tensor, inputs: ForwardInputs, short: Shortened, cache: "ChosenTokens | None"
    ) -> ForwardInputs:
        """`ForwardInputs` of the shortened rows x (B, C, D)."""
        causal, documents = not self.place.bidirectional, short.documents
        seen = documents if cache is None else cache.extend(documents)  # (B, all places so far)
        past = seen.shape[1] - documents.shape[1]
        mask = None
        if inputs.documents is not None or past or not causal:  # else what fills up a row is behind all tokens
            mask = document_mask(documents, seen, causal)
        bias = training_bias(x, mask, causal) if cache is None else None
        number, positional = self.place.positional, list(inputs.positional)
        if positional and positional[number].cos is not None:
            tables = positional[number]
            index = short.index[:, None, :, None].expand(-1, 1, -1, tables.cos.shape[-1])  # (B, 1, C, R)
            cos, sin = (table.expand(len(index), -1, -1, -1).gather(2, index) for table in (tables.cos, tables.sin))
            positional[number] = tables._replace(cos=cos, sin=sin)
        return inputs._replace(
            positional=tuple(positional),
            mask=mask,
            causal=causal and mask is None,
            bias=bias,
            documents=seen,
            past=past,
            block_masks={},  # those of all tokens
        )


def reference_mixture(router: DepthRouter, x: Tensor, inputs: ForwardInputs, run: Run) -> Tensor:
    """The same as `router(x, inputs, None, run)` in evaluation, written down plainly: the layer runs on all tokens.

    Those that pass it by are documents of padding, so that no other sees them.
    """
    documents = x.new_zeros(x.shape[:2], dtype=torch.int64) if inputs.documents is None else inputs.documents
    r = router.logits(x)  # (B, T)
    chosen = (r > router.threshold) & (documents != PAD)
    theirs = documents.expand_as(chosen).masked_fill(~chosen, PAD)
    mask = document_mask(theirs, theirs, not router.place.bidirectional)  # (B, 1, T, T)
    y = run(x, inputs._replace(mask=mask, causal=False, bias=None, block_masks={}), None).y  # (B, T, D)
    return torch.where(chosen[..., None], x + r.sigmoid()[..., None].to(x.dtype) * (y - x), x)


class ChosenTokens(LayerCache):
    """Whose keys the cache of a layer's attention holds, where not every token takes part in the layer.

    That has room for all tokens, as nobody knows beforehand which will be chosen.
    """

    def __init__(self) -> None:
        self.documents: Tensor | None = None  # (B, places so far); PAD where a row had fewer tokens than another

    def extend(self, documents: Tensor) -> Tensor:
        """Add the documents (B, C) of the next places, and return those of all places so far."""
        self.documents = documents if self.documents is None else torch.cat([self.documents, documents], dim=1)
        return self.documents

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.documents = None if self.documents is None else change(self.documents)

    def bytes(self) -> int:
        """None are counted: documents are a number a token."""
        return 0

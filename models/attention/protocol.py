"""Protocol of attention mechanisms: the inputs of a forward, and the output with losses and state.

B batch, T new tokens, S tokens that can be seen (cached and new), D model width, H query heads, G key/value heads.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from models.attention.kernels.banded import Band
from models.attention.kernels.sdpa import AttentionMask
from models.cache import LayerCache
from models.linear import Drawn
from models.positions import Positional

NOTHING: dict = {}  # never written to


class Mixed(NamedTuple):
    """Output of a sub-layer with training losses or state beside it.

    Attributes:
        y: (B, T, D).
        losses: name -> weighted training loss of the mechanism, a scalar; empty in evaluation.
        state: (layer, name) -> tensor that later layers, or this one's recomputation in the backward, read in
            `ForwardInputs.state`.
    """

    y: Tensor
    losses: dict[str, Tensor] = NOTHING
    state: dict[tuple[int, str], Tensor] = NOTHING


class ForwardInputs(NamedTuple):
    """Inputs of a forward beside the residual stream; made once, read by every block.

    Attributes:
        positional: this forward's tables of each position encoding of the model.
        mask: (B or 1, 1, T, S) bool, True = may attend; None when the pattern is plain causal or everything is visible.
        causal: without a mask, whether a token sees only itself and the tokens before it (False: it sees all S).
        bias: the same as an fp32 addend of the scores, where a training step wants it (kernels/sdpa.py).
        documents: (B or 1, S) of every token so far, the T new ones last, or None when all are of one document. The
            mask holds the same; mechanisms whose pattern is sparse read this instead, and then no mask is made.
        past: tokens before the new ones, S - T.
        state: (layer, name) -> what earlier layers returned (`Mixed.state`) or, where the backward computes a layer
            again, what that layer itself did.
        recomputed: whether the backward computes the layers again, so that they return what they decide.
        shared: weights that several layers have in common.
        block_masks: by how far a query sees (kernels/flex.py), for layers of kernel `flex` on a device with
            it, where no token is cached.
    """

    positional: tuple[Positional, ...]
    mask: Tensor | None
    causal: bool
    bias: Tensor | None = None
    documents: Tensor | None = None
    past: int = 0
    state: Mapping[tuple[int, str], Tensor] = MappingProxyType({})
    recomputed: bool = False
    shared: tuple[Tensor, ...] = ()
    block_masks: Mapping[Any, BlockMask] = MappingProxyType({})

    @property
    def visible(self) -> AttentionMask:
        return AttentionMask(self.mask, self.causal, self.bias)


def mixed_of(result: Tensor | Mixed) -> Mixed:
    """The result of a sub-layer, whether or not it has more than its output."""
    return result if isinstance(result, Mixed) else Mixed(result)


def summed(losses: dict[str, Tensor], more: dict[str, Tensor]) -> dict[str, Tensor]:
    """Training losses of two parts of a model, added by name."""
    if not more:
        return losses
    return {**losses, **{name: losses[name] + loss if name in losses else loss for name, loss in more.items()}}


class SubLayer(Drawn):
    """One of the modules that a block is made of: what it makes of the normalised stream is added to the stream."""

    def forward(self, x: Tensor, inputs: ForwardInputs, cache: LayerCache | None = None) -> Tensor | Mixed:
        """From x (B, T, D) to (B, T, D), or `Mixed` where there is a training loss or something for later layers.

        cache: what `new_cache` made, with the tokens before these; the new ones are appended.
        """
        raise NotImplementedError

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> LayerCache | None:
        """An empty cache for `capacity` tokens in each of `batch` rows; None: it remembers no tokens."""
        return None

    def advance(self) -> None:
        """Take over what the latest forward in training counted; called before the next one."""

    def after_step(self) -> None:
        """Follow an optimizer step; called behind each."""


class Attention(SubLayer):
    """A built mechanism: x (B, T, D) is mixed over the tokens that it may see."""

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> LayerCache:
        raise NotImplementedError

    def flex_bands(self) -> tuple[Band | None, ...]:
        """Bands of the `flex` kernel: how far a query sees, None for all of its document; empty for other kernels."""
        return ()


def document_mask(documents: Tensor, seen_documents: Tensor, causal: bool) -> Tensor:
    """Mask within documents.

    Args:
        documents: (B or 1, T) number of the document of each new token.
        seen_documents: (B or 1, S) of each token that can be seen; the new ones are the last T of them.
        causal: whether a token sees none behind it.

    Returns:
        (B or 1, 1, T, S) bool. Padding (document -1) attends to padding, so no row is empty.
    """
    same = documents[:, :, None] == seen_documents[:, None, :]  # (B, T, S)
    if causal:
        new, seen = documents.shape[1], seen_documents.shape[1]
        same = same & torch.ones(new, seen, dtype=torch.bool, device=documents.device).tril(seen - new)  # (T, S)
    return same[:, None]


def count_documents(documents: Tensor) -> int:
    """The most documents that a row of documents (B, T) holds, padding apart."""
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)  # (B, T)
    return int((begins & (documents >= 0)).sum(1).max())

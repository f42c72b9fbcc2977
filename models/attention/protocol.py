"""What every attention mechanism gets and gives.

B batch, T new tokens, S tokens that can be seen (cached and new), D model width, H query heads, G key/value heads.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from models.attention.standard import Visible
from models.cache import LayerCache
from models.positions import Positional
from models.registry import Registry

ATTENTIONS = Registry("attention", example="{kind: full, heads: 4}")


class Place(NamedTuple):
    """Where in a model a mechanism is built.

    Attributes:
        width: D.
        branches: sub-layers of the model that write into the residual stream.
        positional: which of `Context.positional` is this layer's.
        layer: number of the layer, from 0.
        context: tokens of the longest training sequence.
        bidirectional: whether a token also sees those behind it.
        layers: of the model that have an attention.
        shared: which of `Context.shared` is this layer's.
    """

    width: int
    branches: int = 2
    positional: int = 0
    layer: int = 0
    context: int = 1024
    bidirectional: bool = False
    layers: int = 1
    shared: int = 0


class Context(NamedTuple):
    """What one forward knows about its tokens; made once, read by every block.

    Attributes:
        positional: this forward's tables of each position encoding of the model.
        mask: (B or 1, 1, T, S) bool, True = may attend; None when the pattern is plain causal or everything is visible.
        causal: without a mask, whether a token sees only itself and the tokens before it (False: it sees all S).
        bias: the same as an fp32 addend of the scores, where a training step wants it (models/attention/standard.py).
        documents: (B or 1, S) of every token so far, the T new ones last, or None when all are of one document. The
            mask holds the same; mechanisms whose pattern is sparse read this instead, and then no mask is made.
        past: tokens before the new ones, S - T.
        notes: what a layer leaves for its own recomputation or for later layers, by (layer, name); None where no layer
            of the model does so.
        shared: weights that several layers have in common.
        block_masks: by how far a query sees (models/attention/flex.py), for layers of kernel `flex` on a device with
            it, where no token is cached.
    """

    positional: tuple[Positional, ...]
    mask: Tensor | None
    causal: bool
    bias: Tensor | None = None
    documents: Tensor | None = None
    past: int = 0
    notes: dict[tuple[int, str], Tensor] | None = None
    shared: tuple[Tensor, ...] = ()
    block_masks: Mapping[Any, BlockMask] = MappingProxyType({})

    @property
    def visible(self) -> Visible:
        return Visible(self.mask, self.causal, self.bias)


class AttentionSpec(Protocol):
    """What an attention in a config offers; `heads` and `head_width` are those that its position encoding gets.

    Attributes:
        sees_all: whether it needs the mask of all pairs (`Context.mask`).
        directions: of `causal` and `bidirectional`, what it can be; where it is one, `directions_because` says why.
        takes: which position encodings it works with, by how they act (models/positions/protocol.py), beside those
            that act on the embeddings or not at all. Empty: it ignores them. Where one of its numbers narrows them,
            `takes_because` says which.
        free_heads: whether any of its heads can be taken away; where not, `heads_because` says why.

    It may also offer `leaves_notes`, whether the model must have `Context.notes`, and `cache_singles(tokens)`, how many
    numbers its cache holds in fp32 whatever the dtype, beside `cache_elements`; `shared(context)`, a spec of weights
    that all layers which name the same one have in common; `most_documents`, how many a row may hold; and
    `check(direction)`, which raises UserError where its numbers are none of that direction.
    """

    sees_all: bool
    directions: tuple[str, ...]
    takes: tuple[str, ...]
    free_heads: bool

    def resolve(self, width: int) -> "AttentionSpec":
        """The same with everything spelled out that follows from the model's width."""

    def build(self, place: Place) -> nn.Module:
        """The module, an `Attention`."""

    def flops_per_token(self, width: int, length: int) -> int:
        """Forward FLOPs of one token that sees `length` tokens."""

    def cache_elements(self, tokens: int) -> int:
        """Numbers that the cache holds for a sequence of so many tokens."""


class Attention(Protocol):
    """A built mechanism: new tokens in, new tokens out.

    One with a training loss of its own leaves it, weighted, in an attribute `auxiliary` (name -> scalar) in every
    forward in training mode, from where the model takes it.
    """

    def __call__(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """Mix x (B, T, D) over the tokens that it may see; append to the cache when there is one."""

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> LayerCache:
        """An empty cache for `capacity` tokens."""


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

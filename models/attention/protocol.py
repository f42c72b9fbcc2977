"""What every attention mechanism gets and gives.

B batch, T new tokens, S tokens that can be seen (cached and new), D model width, H query heads, G key/value heads.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from models.attention.standard import Visible
from models.cache.protocol import LayerCache
from models.positions import Positional
from models.registry import Registry

ATTENTIONS = Registry("attention")


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
    """

    positional: tuple[Positional, ...]
    mask: Tensor | None
    causal: bool
    bias: Tensor | None = None
    documents: Tensor | None = None
    past: int = 0

    @property
    def visible(self) -> Visible:
        return Visible(self.mask, self.causal, self.bias)


class Attention(Protocol):
    """A built mechanism: new tokens in, new tokens out."""

    def __call__(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """Mix x (B, T, D) over the tokens that it may see; append to the cache when there is one."""

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> LayerCache:
        """An empty cache for `capacity` tokens."""


def causal_document_mask(documents: Tensor, seen_documents: Tensor) -> Tensor:
    """Causal mask within documents.

    Args:
        documents: (B or 1, T) number of the document of each new token.
        seen_documents: (B or 1, S) of each token that can be seen; the new ones are the last T of them.

    Returns:
        (B or 1, 1, T, S) bool. Padding (document -1) attends to padding, so no row is empty.
    """
    new, seen = documents.shape[1], seen_documents.shape[1]
    order = torch.ones(new, seen, dtype=torch.bool, device=documents.device).tril(seen - new)  # (T, S)
    same = documents[:, :, None] == seen_documents[:, None, :]  # (B, T, S)
    return (same & order)[:, None]

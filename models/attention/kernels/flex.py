"""FlexAttention (arXiv 2412.05496): patterns of packed rows and bands in one fused CUDA kernel, without a T x T mask.

B batch, H query heads, G key/value heads, T tokens, d channels of a head.

A `BlockMask` says which tiles of 128 x 128 pairs hold anything; it is made once a forward for all layers of a pattern,
outside the compiled blocks, so that other documents compile nothing anew. On CPU PyTorch has no backward for it: there
`full` takes the tiled form and `window` the blocked one, which the tests compare this one with.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from models.attention.kernels.banded import Band

DEVICES = ("cuda",)

_compiled_attention = torch.compile(flex_attention)
_compiled_mask = torch.compile(create_block_mask)


def block_masks(
    bands: Iterable[Band | None], causal: bool, documents: Tensor | None, tokens: int, device: torch.device
) -> dict[Band | None, BlockMask]:
    """The mask of every pattern that layers of a forward have; empty on a device without the kernel.

    Args:
        bands: how far a query sees; None: as far as the sequence goes.
        causal: whether a token sees none behind it.
        documents: (B or 1, T) of the tokens, or None when all are of one.
        tokens: T, none of them cached.
        device: of the tokens.
    """
    if device.type not in DEVICES:
        return {}
    create = _compiled_mask if device.type == "cuda" else create_block_mask
    rows = None if documents is None else len(documents)
    return {
        band: create(_pairs(band, causal, documents), rows, None, tokens, tokens, device=device) for band in set(bands)
    }


def _pairs(band: Band | None, causal: bool, documents: Tensor | None):
    """Whether query `row` sees key `column`, as FlexAttention asks it."""

    def sees(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        seen = row >= column if causal else row == row  # true, as a tensor
        if band is not None:
            seen = seen & band.holds(row - column)
        if documents is not None:
            seen = seen & (documents[batch, row] == documents[batch, column])
        return seen

    return sees


def attend_flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    """softmax(scale Q K^T) V over the pairs of `mask`: q (B, H, T, d), k and v (B, G, T, d) -> (B, H, T, d).

    Args:
        scale: nothing: 1 / sqrt(d).
    """
    attention = _compiled_attention if q.device.type == "cuda" else flex_attention
    return attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])

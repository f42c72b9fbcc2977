"""Entries at given places of the sequence, the same for all rows of a batch or each row's own.

B batch, H heads, S tokens, d channels of a head.
"""

import torch
from torch import Tensor


def take(x: Tensor, places: Tensor) -> Tensor:
    """Entries x (B or 1, S, ...) at places (B or 1, ...): (B, ..., ...), 1 where both have 1."""
    if len(places) == 1:
        return x[:, places[0]]
    flat = places.flatten(1)  # (B, P)
    x = x.expand(len(flat), *x.shape[1:])
    flat = flat.view(*flat.shape, *[1] * (x.ndim - 2)).expand(*flat.shape, *x.shape[2:])
    return x.gather(1, flat).unflatten(1, places.shape[1:])


def tokens_at(x: Tensor, columns: Tensor) -> Tensor:
    """The tokens `columns` (B or 1, ...) of x (B, H, S, d): (B, H, ..., d)."""
    if columns.shape[0] == 1:
        return x.index_select(2, columns.flatten()).unflatten(2, columns.shape[1:])  # its backward beats indexing's
    index = columns.flatten(1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index).unflatten(2, columns.shape[1:])


def of_heads(x: Tensor, index: Tensor) -> Tensor:
    """The tokens `index` (B, H, P) of x (B, H, S, d), each head's own: (B, H, P, d)."""
    rows = torch.arange(len(x), device=x.device)[:, None, None]
    heads = torch.arange(x.shape[1], device=x.device)[:, None]
    return x[rows, heads, index]  # copies whole rows, where gather looks at every number

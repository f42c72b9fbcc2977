"""A cache of fixed size: what a recurrence carries from one token to the next, and where it is emptied.

B batch, T new tokens, S tokens so far, the new ones last.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from models.cache.protocol import LayerCache


class RecurrentCache(LayerCache):
    """The state of one layer, zero before the first token; its layer replaces it after every call."""

    def __init__(self, shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> None:
        self.state = torch.zeros(*shape, device=device, dtype=dtype)

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.state = change(self.state)

    def shift(self, by: int) -> None:
        pass

    def bytes(self) -> int:
        return self.state.nbytes


def beginnings(documents: Tensor | None, past: int) -> Tensor | None:
    """Whether each new token is of another document than the token before it: (B or 1, T) bool; None: none is.

    Padding (document -1) is a document like any other here: what it leaves behind ends where the next one begins.

    Args:
        documents: (B or 1, S), or None when all tokens are of one.
        past: S - T.
    """
    if documents is None:
        return None
    if past:
        return documents[:, past:] != documents[:, past - 1 : -1]
    return F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))  # nothing is carried to the first token

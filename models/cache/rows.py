"""Lengths of the rows of a cache (ragged batches).

All rows end at the same place, and a row of fewer tokens begins later: number n of the S that the longest row has is a
token of row b where n >= starts[b]. Masks, positions and patterns go by these numbers, and a place before a row's first
token is padding to them. What is stored for a row begins with its own first token.

B rows, T new tokens, K keys of the longest row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

PAD = -1  # the document of padding, which nothing attends to


class Rows:
    """Where each row of a batch begins.

    Attributes:
        starts: tokens that the longest row has more than each; one of them is 0.
        even: whether all rows are as long.
    """

    def __init__(self, batch: int) -> None:
        self.begin_at([0] * batch)

    def begin_at(self, starts: Sequence[int]) -> None:
        self.starts, self.even = list(starts), not any(starts)
        self._tensor: Tensor | None = None

    def as_tensor(self, device: torch.device) -> Tensor:
        """(B, 1) int64."""
        if self._tensor is None:
            self._tensor = torch.tensor(self.starts, device=device)[:, None]
        return self._tensor

    def documents(self, tokens: int, device: torch.device) -> Tensor:
        """(B, tokens): 0 for what is a token, PAD for what is before the first of its row."""
        return torch.where(torch.arange(tokens, device=device) < self.as_tensor(device), PAD, 0)

    def numbers(self, keys: int, device: torch.device) -> Tensor:
        """(B, K): of what each row has stored the number, beyond the last where it has no more."""
        return torch.arange(keys, device=device) + self.as_tensor(device)

    def slots(self, first: int, new: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Where the tokens from number `first` on are stored: row, place in the row, which of the new ones."""
        places = torch.arange(first, first + new, device=device) - self.as_tensor(device)  # (B, T)
        if first >= max(self.starts):
            rows = torch.arange(len(places), device=device)[:, None].expand_as(places)
            return rows, places, torch.arange(new, device=device).expand_as(places)
        rows, steps = (places >= 0).nonzero(as_tuple=True)  # (N,) each
        return rows, places[rows, steps], steps

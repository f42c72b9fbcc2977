"""Packing boundaries: where the documents of packed rows begin and end.

B batch, S tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def document_starts(documents: Tensor | None, tokens: int, device: torch.device) -> Tensor:
    """(B or 1, S) int64: for each token, the number of the first token of its document.

    Args:
        documents: (B or 1, S) number of each token's document, a document being a run of equal numbers; None: one.
        tokens: S.
        device: where to.
    """
    if documents is None:
        return torch.zeros(1, tokens, dtype=torch.int64, device=device)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)  # (B, S)
    return torch.where(begins, torch.arange(tokens, device=device), 0).cummax(dim=1).values


def document_ends(documents: Tensor | None, tokens: int, device: torch.device) -> Tensor:
    """(B or 1, S) int64: for each token, the number behind the last token of its document; see `document_starts`."""
    backwards = None if documents is None else documents.flip(1)
    return tokens - document_starts(backwards, tokens, device).flip(1)

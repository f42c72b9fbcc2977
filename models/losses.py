"""Cross-entropy of the output projection: hidden states and the vocabulary matrix in, mean loss out."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100


def reference_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, z_loss: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Mean NLL in nats of targets (N,) under logits hidden (N, D) @ weight (V, D)^T, and the mean squared log-partition."""
    logits = F.linear(hidden, weight).float()  # (N, V)
    kept = targets != IGNORED
    nll = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / kept.sum().clamp(min=1)
    if not z_loss:
        return nll, None
    squared = logits.logsumexp(-1).square()  # (N,)
    return nll, torch.where(kept, squared, 0.0).sum() / kept.sum().clamp(min=1)


linear_cross_entropy = reference_linear_cross_entropy

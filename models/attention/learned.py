"""Softmax attention where what is added to the scores is trained too, for CPU.

No kernel of PyTorch's has that gradient on CPU, and what it does instead takes more passes over the scores than needed.

B batch, H heads, T queries, S keys, d channels of a head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention.standard import Scoring, Visible


def learns(q: Tensor, k: Tensor, scoring: Scoring) -> bool:
    """Whether `attend_learned` is the way: an addend is trained, alone, and every query head has its own keys."""
    position = scoring.position
    trained = position is not None and position.requires_grad and torch.is_grad_enabled()
    alone = scoring.softcap is None and scoring.sink is None and scoring.values is None
    return trained and alone and q.device.type == "cpu" and q.dtype == position.dtype and q.shape[1] == k.shape[1]


def attend_learned(q: Tensor, k: Tensor, v: Tensor, visible: Visible, scoring: Scoring, dropout: float = 0.0) -> Tensor:
    """The same as `attend` with a mask, where `learns` holds: q (B, H, T, d), k, v (B, H, S, d) -> (B, H, T, d)."""
    scale = q.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
    bias = scoring.position.masked_fill(~visible.mask, -math.inf)  # (B or 1, H or 1, T, S)
    scores = ((q * scale) @ k.transpose(-1, -2)).add_(bias)  # (B, H, T, S)
    return F.dropout(scores.softmax(-1), dropout) @ v

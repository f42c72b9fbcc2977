"""Head transform: a layer between the hidden states and the output projection.

BERT (arXiv 1810.04805) and ModernBERT (arXiv 2412.13663) have one before the vocabulary, and one between the pooled
vector and the classes. D model width.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import UserError, did_you_mean
from models.feedforward import ACTIVATIONS
from models.linear import Linear
from models.specs import NORMS

TRANSFORM_ACTIVATIONS = {**ACTIVATIONS, "tanh": torch.tanh}


@dataclass(frozen=True)
class HeadTransform:
    """norm(act(dense(x))).

    Args:
        activation: `gelu`, `gelu_tanh`, `relu`, `silu` or `tanh`.
        bias: whether the linear layer has one.
        norm: what normalises behind the activation, or nothing.
        dropout: of the output, in training.
    """

    activation: str = "gelu"
    bias: bool = True
    norm: Any = field(default=None, metadata={"registry": NORMS})
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.activation not in TRANSFORM_ACTIVATIONS:
            hint = did_you_mean(self.activation, TRANSFORM_ACTIVATIONS)
            raise UserError(f"unknown activation {self.activation!r}{hint}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be at least 0 and below 1, got {self.dropout}")

    def build(self, width: int) -> nn.Module:
        return TransformLayer(self, width)


class TransformLayer(nn.Module):
    """The module of `HeadTransform`: (..., D) -> (..., D)."""

    def __init__(self, spec: HeadTransform, width: int) -> None:
        super().__init__()
        self.activation = TRANSFORM_ACTIVATIONS[spec.activation]
        self.dense = Linear(width, width, bias=spec.bias, std=0.02)
        self.norm = nn.Identity() if spec.norm is None else spec.norm.build(width)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dropout(self.norm(self.activation(self.dense(hidden))))

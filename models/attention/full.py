"""Causal softmax attention over all earlier tokens, with grouped key/value heads (arXiv 1706.03762, GQA 2305.13245)."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from models.attention.protocol import ATTENTIONS, Context
from models.attention.standard import attend
from models.cache.contiguous import ContiguousCache
from models.errors import UserError
from models.linear import Linear, residual_std
from models.positions import POSITIONS


@ATTENTIONS.register("full")
@dataclass(frozen=True)
class Full:
    """Full causal attention.

    Args:
        heads: query heads.
        kv_heads: key/value heads; each serves heads / kv_heads query heads. Nothing: as many as heads.
        head_width: channels of a head. Nothing: model width / heads.
        bias: whether q, k and v have a bias.
        out_bias: whether the output map has one.
        dropout: of the attention probabilities, in training.
        position: this layer's own position encoding. Nothing: the model's.
    """

    heads: int
    kv_heads: int | None = None
    head_width: int | None = None
    bias: bool = False
    out_bias: bool = False
    dropout: float = 0.0
    position: Any = field(default=None, metadata={"registry": POSITIONS})

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise UserError(f"attention needs at least one head, got heads {self.heads}")
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise UserError(f"kv_heads must divide heads, got {self.heads} heads and {self.kv_heads} kv_heads")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be at least 0 and below 1, got {self.dropout}")

    def resolve(self, width: int) -> "Full":
        """The same attention with its head width spelled out for a model of this width."""
        if self.head_width is not None:
            return self
        if width % self.heads:
            raise UserError(f"width {width} is not a multiple of {self.heads} heads: give head_width")
        return Full(**{**self.__dict__, "head_width": width // self.heads})

    def build(self, width: int, branches: int, positional: int) -> nn.Module:
        return FullAttention(self, width, branches, positional)

    def flops_per_token(self, width: int, length: int) -> int:
        """Forward FLOPs of one token that sees `length` tokens (as in PaLM: the causal half is not subtracted)."""
        projections = 2 * width * self.head_width * (2 * self.heads + 2 * self.kv_heads)
        return projections + 4 * self.heads * self.head_width * length

    def cache_elements_per_token(self) -> int:
        return 2 * self.kv_heads * self.head_width


class FullAttention(nn.Module):
    """The module of `Full`: query head h reads key/value head h * kv_heads // heads."""

    def __init__(self, spec: Full, width: int, branches: int, positional: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_width = spec.heads, spec.kv_heads, spec.head_width
        self.dropout, self.positional = spec.dropout, positional
        self.q = Linear(width, self.heads * self.head_width, bias=spec.bias, std=0.02)
        self.k = Linear(width, self.kv_heads * self.head_width, bias=spec.bias, std=0.02)
        self.v = Linear(width, self.kv_heads * self.head_width, bias=spec.bias, std=0.02)
        self.o = Linear(self.heads * self.head_width, width, bias=spec.out_bias, std=residual_std(0.02, branches))

    def forward(self, x: Tensor, context: Context, cache: ContiguousCache | None = None) -> Tensor:
        batch, new, _ = x.shape
        positional = context.positional[self.positional]
        q = self.q(x).view(batch, new, self.heads, self.head_width).transpose(1, 2)  # (B, H, T, head_width)
        k = self.k(x).view(batch, new, self.kv_heads, self.head_width).transpose(1, 2)  # (B, G, T, head_width)
        v = self.v(x).view(batch, new, self.kv_heads, self.head_width).transpose(1, 2)  # (B, G, T, head_width)
        q, k = positional.rotate(q), positional.rotate(k)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, G, S, head_width)
        dropout = self.dropout if self.training else 0.0
        seen = {"mask": context.mask, "causal": context.causal, "bias": context.bias}
        y = attend(q, k, v, **seen, dropout=dropout)  # (B, H, T, head_width)
        return self.o(y.transpose(1, 2).reshape(batch, new, self.heads * self.head_width))  # (B, T, D)

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> ContiguousCache:
        return ContiguousCache(batch, self.kv_heads, capacity, self.head_width, device, dtype)

"""Single heads side by side, each with its own maps; what they find, joined, is the output (Raschka, Build a Large
Language Model (From Scratch), section 3.6.1).

B batch, T new tokens, D model width, H heads, d channels of a head.

The same as multi-head attention whose output map is the identity. Stacked in depth instead, single heads are layers of
`full` with `heads: 1`.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from models.attention.full import in_sight, positioned, token_distance
from models.attention.kernels.sdpa import PLAIN, ScoreMod, attend
from models.attention.options import check_dropout
from models.attention.protocol import Attention, ForwardInputs
from models.cache import ContiguousCache, Kept, KeyValueCache
from models.errors import UserError
from models.linear import Linear, residual_std
from models.specs import ATTENTIONS, POSITIONS, AttentionSpec, LayerContext


@ATTENTIONS.register("single_heads")
@dataclass(frozen=True)
class SingleHeads(AttentionSpec):
    """Attention heads in parallel, joined without an output map.

    Args:
        heads: how many; together they are as wide as the model.
        head_width: channels of a head. Nothing: model width / heads.
        bias: whether q, k and v have a bias.
        dropout: of the attention probabilities, in training.
        position: this layer's own position encoding. Nothing: the model's.
    """

    needs_mask = True
    position_types = ("rotation", "scores", "queries")
    heads_because = "without an output map each of them is a part of the model's width"

    heads: int
    head_width: int | None = None
    bias: bool = False
    dropout: float = 0.0
    position: Any = field(default=None, metadata={"registry": POSITIONS})

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise UserError(f"attention needs at least one head, got heads {self.heads}")
        check_dropout(self.dropout)

    def resolve(self, width: int, layer: int = 0) -> Self:
        """The same attention with its head width spelled out for a model of this width."""
        head_width = width // self.heads if self.head_width is None else self.head_width
        if self.heads * head_width != width:
            raise UserError(
                f"single heads have no output map, so all of them together must be as wide as the model: "
                f"{self.heads} heads of {head_width} channels are not {width}"
            )
        return replace(self, head_width=head_width)

    def build(self, place: LayerContext) -> nn.Module:
        return SingleHeadsAttention(self, place)

    def flops_per_token(self, width: int, length: int) -> int:
        """Forward FLOPs of one token that sees `length` tokens (as in PaLM: the causal half is not subtracted)."""
        return 6 * width * width + 4 * width * length

    def cache_elements(self, tokens: int) -> int:
        """Numbers that the cache holds for a sequence of so many tokens."""
        return 2 * self.heads * self.head_width * tokens


class SingleHead(nn.Module):
    """The maps of one head: x (B, T, D) -> its queries, keys and values (B, T, d)."""

    def __init__(self, spec: SingleHeads, place: LayerContext) -> None:
        super().__init__()
        self.q = Linear(place.width, spec.head_width, bias=spec.bias, std=0.02)
        self.k = Linear(place.width, spec.head_width, bias=spec.bias, std=0.02)
        self.v = Linear(place.width, spec.head_width, bias=spec.bias, std=residual_std(0.02, place.branches))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)


class SingleHeadsAttention(Attention):
    """The module of `SingleHeads`."""

    def __init__(self, spec: SingleHeads, place: LayerContext) -> None:
        super().__init__()
        self.head_width, self.dropout, self.positional = spec.head_width, spec.dropout, place.positional
        self.heads = nn.ModuleList(SingleHead(spec, place) for _ in range(spec.heads))

    def forward(self, x: Tensor, inputs: ForwardInputs, cache: KeyValueCache | None = None) -> Tensor:
        found = (head(x) for head in self.heads)
        q, k, v = (torch.stack(parts, dim=1) for parts in zip(*found, strict=True))  # (B, H, T, d) each
        positional, scoring = inputs.positional[self.positional], PLAIN
        q, k = positional.rotate(q), positional.rotate(k)
        kept = Kept(k, v, None) if cache is None else cache.append(k, v)
        kept, visible = in_sight(kept, inputs, ordered=positional.biases)
        if positional.biases:
            distance = token_distance(q, kept, inputs)  # (T, S)
            position, values = positioned(positional, q, kept.keys, distance, None, inputs.past)
            scoring = ScoreMod(position=position, values=values)
        dropout = self.dropout if self.training else 0.0
        y = attend(q, kept.keys, kept.values, visible, scoring, dropout)  # (B, H, T, d)
        return y.transpose(1, 2).flatten(2)  # (B, T, D)

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> KeyValueCache:
        return ContiguousCache(batch, len(self.heads), capacity, self.head_width, device, dtype)

"""Softmax attention over all tokens (in a decoder: all earlier ones), grouped heads (arXiv 1706.03762, 2305.13245)."""

from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from models.attention.kernels.banded import Band
from models.attention.kernels.flash import tiled_attention
from models.attention.kernels.flex import attend_flex
from models.attention.kernels.sdpa import AttentionMask, ScoreMod, ValueTerms, attend, reference_attention
from models.attention.options import QK_NORMS, SINKS, check_dropout, head_width_of
from models.attention.protocol import Attention, ForwardInputs, Mixed, mixed_of
from models.cache import ContiguousCache, Kept, KeyValueCache
from models.cpu.bias_attention import attend_causal
from models.cpu.dispatch import trains_bias
from models.errors import UserError, did_you_mean
from models.linear import Linear, residual_std
from models.positions import Positional
from models.specs import ATTENTIONS, POSITIONS, AttentionSpec, LayerContext

KERNELS = ("sdpa", "flex", "tiled", "reference")


@ATTENTIONS.register("full")
@dataclass(frozen=True)
class Full(AttentionSpec):
    """Full attention: of a decoder over all earlier tokens, of an encoder over all.

    Args:
        heads: query heads.
        kv_heads: key/value heads; each serves heads / kv_heads query heads. Nothing: as many as heads.
        head_width: channels of a head. Nothing: model width / heads.
        bias: whether q, k and v have a bias.
        out_bias: whether the output map has one.
        dropout: of the attention probabilities, in training.
        position: this layer's own position encoding. Nothing: the model's.
        scale: of the scores. Nothing: 1 / sqrt(head_width).
        qk_norm: normalisation of every query and key head before the rotation (arXiv 2302.05442), or nothing.
        softcap: c, where scores become c tanh(scores / c) (Gemma 2); nothing leaves them.
        sink: one more logit in every softmax, without a value: `learned` by each head (gpt-oss), `zero`, or nothing.
        kernel: what computes the softmax (models/attention/kernels). `sdpa`, PyTorch's kernels, is for all work.
            `flex`, FlexAttention, makes no mask of packed rows on CUDA; elsewhere, and behind a cache, it is `tiled`.
            `tiled`, FlashAttention in plain PyTorch, needs O(T) memory wherever PyTorch runs, also where no fused
            kernel fits. `reference` has all scores in memory, and is what others are compared with.
    """

    needs_mask = True
    position_types = ("rotation", "scores", "queries")
    heads_prunable = True

    heads: int
    kv_heads: int | None = None
    head_width: int | None = None
    bias: bool = False
    out_bias: bool = False
    dropout: float = 0.0
    position: Any = field(default=None, metadata={"registry": POSITIONS})
    scale: float | None = None
    qk_norm: Any = field(default=None, metadata={"registry": QK_NORMS})
    softcap: float | None = None
    sink: str | None = None
    kernel: str = "sdpa"

    def __init_subclass__(cls) -> None:
        """A mechanism that hands its own queries and keys to `scoring`, and all of `ScoreMod` to `attend`, says so."""
        if "position_types" not in cls.__dict__:
            cls.position_types = ("rotation", "scores")

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise UserError(f"attention needs at least one head, got heads {self.heads}")
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.heads)
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise UserError(f"kv_heads must divide heads, got {self.heads} heads and {self.kv_heads} kv_heads")
        check_dropout(self.dropout)
        for name in ("scale", "softcap"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")
        if self.sink not in (None, *SINKS):
            raise UserError(f"unknown sink {self.sink!r}{did_you_mean(self.sink, SINKS)}")
        self._check_kernel()

    def _check_kernel(self) -> None:
        if self.kernel not in KERNELS:
            raise UserError(f"unknown kernel {self.kernel!r}{did_you_mean(self.kernel, KERNELS)}")
        if self.kernel != "sdpa" and self.kind != "full" and (self.kind, self.kernel) != ("window", "flex"):
            raise UserError(f"kernel {self.kernel} is an option of full alone: {self.kind} has a way of its own")
        if self.kernel not in ("flex", "tiled"):
            return
        for name in ("softcap", "sink", "dropout"):
            if getattr(self, name):
                raise UserError(f"kernel {self.kernel} has no {name}: leave it out, or take kernel sdpa")
        # it compares the documents of a tile, and knows no addends of the scores
        object.__setattr__(self, "needs_mask", False)
        object.__setattr__(self, "position_types", ("rotation",))
        because = f"kernel {self.kernel} adds nothing to the scores; take kernel sdpa"
        object.__setattr__(self, "position_types_because", because)

    def resolve(self, width: int, layer: int = 0) -> Self:
        """The same attention with its head width spelled out for a model of this width."""
        return replace(self, head_width=head_width_of(self.head_width, self.heads, width))

    def build(self, place: LayerContext) -> nn.Module:
        return FullAttention(self, place)

    def flops_per_token(self, width: int, length: int) -> int:
        """Forward FLOPs of one token that sees `length` tokens (as in PaLM: the causal half is not subtracted)."""
        projections = 2 * width * self.head_width * (2 * self.heads + 2 * self.kv_heads)
        return projections + 4 * self.heads * self.head_width * length

    def cache_elements(self, tokens: int) -> int:
        """Numbers that the cache holds for a sequence of so many tokens."""
        return 2 * self.kv_heads * self.head_width * tokens

    def extras(self) -> list[str]:
        """The options that go beyond softmax(Q K^T / sqrt(d)) V, by name."""
        return [name for name in ("scale", "qk_norm", "softcap", "sink") if getattr(self, name) is not None]


class FullAttention(Attention):
    """The module of `Full`: query head h reads key/value head h * kv_heads // heads.

    Attributes:
        reach: how far from its key a query may lie; None: as far as the sequence goes.
    """

    reach: int | None = None

    def __init__(self, spec: Full, place: LayerContext) -> None:
        super().__init__()
        width = place.width
        self.heads, self.kv_heads, self.head_width = spec.heads, spec.kv_heads, spec.head_width
        self.dropout, self.positional, self.bidirectional = spec.dropout, place.positional, place.bidirectional
        self.scale, self.softcap, self.kernel = spec.scale, spec.softcap, spec.kernel
        self.q = Linear(width, self.heads * self.head_width, bias=spec.bias, std=0.02)
        self.k = Linear(width, self.kv_heads * self.head_width, bias=spec.bias, std=0.02)
        self.v = Linear(width, self.kv_heads * self.head_width, bias=spec.bias, std=0.02)
        self.o = Linear(self.heads * self.head_width, width, bias=spec.out_bias, std=residual_std(0.02, place.branches))
        if spec.qk_norm is not None:
            self.q_norm, self.k_norm = (spec.qk_norm.build(self.head_width) for _ in range(2))
        self.normalises = spec.qk_norm is not None
        self.sink = None if spec.sink is None else SINKS[spec.sink](self.heads)

    def forward(self, x: Tensor, inputs: ForwardInputs, cache: KeyValueCache | None = None) -> Tensor | Mixed:
        batch, new, _ = x.shape
        positional = inputs.positional[self.positional]
        q = self.q(x).view(batch, new, self.heads, self.head_width).transpose(1, 2)  # (B, H, T, head_width)
        k = self.k(x).view(batch, new, self.kv_heads, self.head_width).transpose(1, 2)  # (B, G, T, head_width)
        v = self.v(x).view(batch, new, self.kv_heads, self.head_width).transpose(1, 2)  # (B, G, T, head_width)
        if self.normalises:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = positional.rotate(q), positional.rotate(k)
        result = self.mix(q, Kept(k, v, None) if cache is None else cache.append(k, v), inputs)
        y, losses, state = mixed_of(result)  # (B, H, T, head_width)
        y = self.o(y.transpose(1, 2).reshape(batch, new, self.heads * self.head_width))  # (B, T, D)
        return Mixed(y, losses, state) if losses or state else y

    def mix(self, q: Tensor, kept: Kept, inputs: ForwardInputs) -> Tensor | Mixed:
        """Attention of the new queries (B, H, T, head_width) over what is kept: (B, H, T, head_width)."""
        if self.kernel == "flex" and (mask := inputs.block_masks.get(None)) is not None:
            return attend_flex(q, kept.keys, kept.values, mask, self.scale)
        if self.kernel in ("flex", "tiled"):
            kept = kept.in_order()
            documents = None if inputs.documents is None else (inputs.documents[:, inputs.past :], inputs.documents)
            causal = not self.bidirectional
            return tiled_attention(q, kept.keys, kept.values, causal=causal, scale=self.scale, documents=documents)
        biases = inputs.positional[self.positional].biases
        kept, visible = in_sight(kept, inputs, ordered=biases)
        scoring = self.scoring(q, kept.keys, token_distance(q, kept, inputs) if biases else None, inputs)
        if self.kernel == "reference":
            return reference_attention(q, kept.keys, kept.values, visible, scoring, self.drop())
        if scoring.additive and trains_bias(q, scoring.position) and not self.bidirectional and not self.drop():
            seen = visible.dense(q, kept.keys)
            return attend_causal(q, kept.keys, kept.values, scoring.position, seen, scoring.scale)
        return attend(q, kept.keys, kept.values, visible, scoring, self.drop())

    def scoring(self, q: Tensor, k: Tensor, distance: Tensor | None, inputs: ForwardInputs) -> ScoreMod:
        """Score modification for q (B, H, T, d), `distance` (T, S) tokens behind their keys k (B, G, S, d).

        The distance is read only where the position encoding adds something to the scores.
        """
        sink = None if self.sink is None else self.sink(q)
        positional = inputs.positional[self.positional]
        if not positional.biases:
            return ScoreMod(self.scale, None, self.softcap, sink)
        position, values = positioned(positional, q, k, distance, self.scale, inputs.past, self.reach)
        return ScoreMod(self.scale, position, self.softcap, sink, values)

    def flex_bands(self) -> tuple[Band | None, ...]:
        return (None,) if self.kernel == "flex" else ()

    def drop(self) -> float:
        return self.dropout if self.training else 0.0

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> KeyValueCache:
        return ContiguousCache(batch, self.kv_heads, capacity, self.head_width, device, dtype)


def in_sight(kept: Kept, inputs: ForwardInputs, ordered: bool) -> tuple[Kept, AttentionMask]:
    """What is kept, and which of it the new queries see.

    ordered: whether rows of other lengths have to end at the same place; else they are taken as they are stored.
    """
    if ordered or not kept.by_row:
        return kept.in_order(), inputs.visible
    tokens = inputs.mask.shape[3]
    index = kept.key_positions[:, None, None]  # (B, 1, 1, K)
    found = inputs.mask.gather(3, index.clamp(max=tokens - 1).expand(-1, 1, inputs.mask.shape[2], -1))
    return kept._replace(key_positions=None), AttentionMask(found & (index < tokens), causal=False)  # (B, 1, T, K)


def positioned(
    positional: Positional,
    q: Tensor,
    k: Tensor,
    distance: Tensor,
    scale: float | None,
    past: int,
    reach: int | None = None,
) -> tuple[Tensor, ValueTerms | None]:
    """Position bias of the scores, and relative values; arguments as of `Positional.terms`."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    relative, values = positional.relative, None
    if relative is not None and relative.values is not None:
        values = ValueTerms(relative.values, relative.rows(distance))
    return positional.terms(q, k, distance, scale, past, reach), values


def token_distance(q: Tensor, kept: Kept, inputs: ForwardInputs) -> Tensor:
    """Tokens from each key that is kept to each new query: (T, K)."""
    rows = inputs.past + torch.arange(q.shape[2], device=q.device)
    columns = torch.arange(kept.keys.shape[2], device=q.device) if kept.key_positions is None else kept.key_positions
    return rows[:, None] - columns

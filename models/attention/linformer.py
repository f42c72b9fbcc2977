"""Attention to k sums over the sequence in place of its tokens (Linformer, arXiv 2006.04768, section 4): O(T k).

    softmax(Q (E K)^T / sqrt(d)) (F V), with E and F (k, T) acting on the sequence

Each document is summed by itself: column p of E and F belongs to position p of a document, so a row of several packed
documents has k sums for each of them. Padding takes no part in the sums, as it could not be masked behind them.

B batch, H heads, T tokens, d channels of a head, k sums, n the model's context, M documents of a row.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.kernels.sdpa import AttentionMask, ScoreMod, attend
from models.attention.options import check_dropout, head_width_of
from models.attention.protocol import Attention, ForwardInputs
from models.cache import LayerCache
from models.errors import UserError, did_you_mean
from models.linear import Drawn, Linear, residual_std
from models.specs import ATTENTIONS, AttentionSpec, LayerContext

SHARINGS = ("none", "headwise", "key_value", "layerwise")
SUMS = ("linear", "convolution", "mean", "max")


@ATTENTIONS.register("linformer")
@dataclass(frozen=True)
class Linformer(AttentionSpec):
    """Attention to projections of the sequence.

    Args:
        heads: heads, each with its own queries, keys and values.
        rank: k, what each document is projected to.
        documents: M, that a row may hold at most; every one costs as much as the first. 1: rows are not packed
            (`cross_documents: true` makes one document of a row).
        sharing: `none`, E and F of every head; `headwise`, one E and one F; `key_value`, E = F for all heads;
            `layerwise`, E = F for all heads and layers.
        sums: `linear`, E is learned; `convolution`, one learned kernel for all of k equal parts of the context; `mean`
            or `max` of these parts, where nothing is learned or shared.
        head_width: channels of a head. Nothing: model width / heads.
        bias: whether q, k and v have a bias.
        out_bias: whether the output map has one.
        dropout: of the attention probabilities, in training.
    """

    directions = ("bidirectional",)
    directions_because = "its sums run over the whole sequence, so each of them knows later tokens"
    heads_because = "projections of the sequence belong to them"

    heads: int
    rank: int
    documents: int
    sharing: str = "headwise"
    sums: str = "linear"
    head_width: int | None = None
    bias: bool = False
    out_bias: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("heads", "rank", "documents"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sharing not in SHARINGS:
            raise UserError(f"unknown sharing {self.sharing!r}{did_you_mean(self.sharing, SHARINGS)}")
        if self.sums not in SUMS:
            raise UserError(f"unknown sums {self.sums!r}{did_you_mean(self.sums, SUMS)}")
        if self.sums in ("mean", "max") and self.sharing != "headwise":
            raise UserError(f"sums {self.sums} learns nothing that could be shared {self.sharing}: leave sharing out")
        check_dropout(self.dropout)

    @property
    def max_documents(self) -> int:
        return self.documents

    def resolve(self, width: int, layer: int = 0) -> Self:
        """The same with its head width spelled out for a model of this width."""
        return replace(self, head_width=head_width_of(self.head_width, self.heads, width))

    def build(self, place: LayerContext) -> nn.Module:
        return LinformerAttention(self, place)

    def shared(self, context: int) -> "Columns | None":
        """Projection that the layers of a model of this context share."""
        return self.columns(context) if self.sharing == "layerwise" else None

    def columns(self, context: int) -> "Columns | None":
        """The learned projections of a model of this context, if there are any."""
        if self.sums in ("mean", "max"):
            return None
        tables = self.heads if self.sharing == "none" else 1
        kernel = self.sums == "convolution"
        return Columns(tables, 1 if kernel else self.rank, part(context, self.rank) if kernel else context)

    def flops_per_token(self, width: int, length: int) -> int:
        """Forward FLOPs of one token in a row of one document, of whatever length."""
        inner = self.heads * self.head_width
        sums = 0 if self.sums == "max" else 4 * inner * self.rank
        return 8 * width * inner + sums + 4 * inner * self.rank

    def cache_elements(self, tokens: int) -> int:
        """None: what is bidirectional is not decoded with a cache."""
        return 0


def part(context: int, rank: int) -> int:
    """Positions in each of k parts of the context."""
    return -(-context // rank)


@dataclass(frozen=True)
class Columns:
    """Learned projections (tables, rows, length) of the positions."""

    tables: int
    rows: int
    length: int

    def build(self) -> "Projection":
        return Projection(self)


class Projection(Drawn):
    """The module of `Columns`."""

    def __init__(self, spec: Columns) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.tables, spec.rows, spec.length))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """So that sums over the whole context are about as large as what is summed."""
        nn.init.normal_(self.weight, std=self.weight.shape[-1] ** -0.5)

    def forward(self) -> Tensor:
        return self.weight


class Spans(NamedTuple):
    """Positions of the tokens of a row in its documents and projected parts.

    Attributes:
        position: (B or 1, T) of each token in its document.
        slot: (B or 1, T) number of its document in the row, -1 for padding.
        count: slots of a row.
        whole: whether every row is one document, without padding.
    """

    position: Tensor
    slot: Tensor
    count: int
    whole: bool


class LinformerAttention(Attention):
    """The module of `Linformer`."""

    def __init__(self, spec: Linformer, place: LayerContext) -> None:
        super().__init__()
        self.spec, self.place, self.part = spec, place, part(place.context, spec.rank)
        inner = spec.heads * spec.head_width
        self.q, self.k, self.v = (Linear(place.width, inner, bias=spec.bias, std=0.02) for _ in range(3))
        self.o = Linear(inner, place.width, bias=spec.out_bias, std=residual_std(0.02, place.branches))
        columns = spec.columns(place.context)
        self.e = self.f = None
        if columns is not None and spec.sharing != "layerwise":
            self.e = columns.build()
            self.f = columns.build() if spec.sharing != "key_value" else None

    def forward(self, x: Tensor, inputs: ForwardInputs, cache: LayerCache | None = None) -> Tensor:
        batch, tokens, _ = x.shape
        spec = self.spec
        if tokens > self.place.context:
            raise UserError(
                f"{tokens} tokens are more than the context of {self.place.context} that linformer projects"
            )
        q, k, v = (
            linear(x).view(batch, tokens, spec.heads, spec.head_width).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )  # (B, H, T, d) each
        spans = spans_of(inputs.documents, spec.documents, x)
        e = inputs.shared[self.place.shared] if spec.sharing == "layerwise" else None
        e = e if self.e is None else self.e()  # (H or 1, k, n)
        f = e if self.f is None else self.f()
        k, v = self._sums(k, e, spans), self._sums(v, f, spans)  # (B, H, M * k, d) each
        drop = spec.dropout if self.training else 0.0
        y = attend(q, k, v, AttentionMask(self._visible(spans), causal=False), ScoreMod(), drop)  # (B, H, T, d)
        return self.o(y.transpose(1, 2).reshape(batch, tokens, spec.heads * spec.head_width))  # (B, T, D)

    def _sums(self, x: Tensor, table: Tensor | None, spans: Spans) -> Tensor:
        """The sums (B, H, M * k, d) of x (B, H, T, d) over the sequence."""
        spec = self.spec
        if spec.sums == "linear" and spans.whole:
            return table[:, :, : x.shape[2]].to(x.dtype) @ x
        if spec.sums == "max":
            cells = self._cells(spans)[:, None, :, None].expand_as(x)  # the last cell is for padding
            lowest = x.new_full((*x.shape[:2], spans.count * spec.rank + 1, x.shape[-1]), torch.finfo(x.dtype).min)
            found = lowest.scatter_reduce(2, cells, x, "amax")[:, :, :-1]
            return found * self._filled(spans)[:, None, :, None]
        return self._matrix(table, spans, x.dtype) @ x

    def _matrix(self, table: Tensor | None, spans: Spans, dtype: torch.dtype) -> Tensor:
        """E (or F) for the tokens of these rows: (B or 1, H or 1, M * k, T)."""
        if self.spec.sums == "linear":
            columns = table.to(dtype)[:, :, spans.position].movedim(2, 0)  # (B, H or 1, k, T)
            own = F.one_hot(spans.slot + 1, spans.count + 1)[..., 1:].transpose(1, 2)  # (B, M, T)
            return (own[:, None, :, None] * columns[:, :, None]).flatten(2, 3)
        own = F.one_hot(self._cells(spans), spans.count * self.spec.rank + 1)[..., :-1].to(dtype)
        own = own.transpose(1, 2)[:, None]  # (B, 1, M * k, T)
        if self.spec.sums == "mean":
            return own / own.sum(-1, keepdim=True).clamp(min=1)
        return own * table[:, 0].to(dtype)[:, spans.position % self.part].movedim(1, 0)[:, :, None]

    def _cells(self, spans: Spans) -> Tensor:
        """Index of the part of each token among M * k, (B or 1, T); M * k for padding."""
        cell = spans.slot * self.spec.rank + spans.position // self.part
        return torch.where(spans.slot < 0, spans.count * self.spec.rank, cell)

    def _filled(self, spans: Spans) -> Tensor:
        """Mask of the M * k sums that are not empty, (B or 1, M * k) bool."""
        return F.one_hot(self._cells(spans), spans.count * self.spec.rank + 1)[..., :-1].amax(1) > 0

    def _visible(self, spans: Spans) -> Tensor | None:
        """Mask of the sums that each token sees, (B or 1, 1, T, M * k) bool: those of its document that are not empty.

        Padding sees them all, as no row may be empty.
        """
        if self.spec.sums == "linear" and spans.count == 1:
            return None
        slots = torch.arange(spans.count, device=spans.slot.device).repeat_interleave(self.spec.rank)  # (M * k,)
        own = spans.slot[..., None] == slots  # (B or 1, T, M * k)
        if self.spec.sums != "linear":
            own = own & self._filled(spans)[:, None]
        return (own | (spans.slot < 0)[..., None])[:, None]

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> LayerCache:
        raise UserError("linformer attention cannot generate: its sums run over the whole sequence")


def spans_of(documents: Tensor | None, most: int, x: Tensor) -> Spans:
    """Positions of the tokens x (B, T, D), whose documents (B, T) are runs, at most so many in a row."""
    steps = torch.arange(x.shape[1], device=x.device)[None]  # (1, T)
    if documents is None:
        return Spans(steps, torch.zeros_like(steps), 1, whole=True)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)  # (B, T)
    start = torch.where(begins, steps, 0).cummax(dim=1).values
    slot = (begins & (documents >= 0)).cumsum(dim=1) - 1
    return Spans(steps - start, torch.where(documents < 0, -1, slot.clamp(max=most - 1)), most, whole=False)

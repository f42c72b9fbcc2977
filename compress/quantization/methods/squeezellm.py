"""SqueezeLLM: a look-up table for each row, by k-means weighted with the Fisher information (arXiv 2306.07629).

    minimise  sum_j F_j (w_j - c_a(j))^2  over the 2^b values c of a row        (eq. 5; F is the Fisher diagonal)

A few weights are taken out before and kept as they are: those with the largest F, and of the others those with the
largest magnitude (section 4.2, dense-and-sparse). The values are rounded to the dtype of the table before any weight is
given one: what is stored is what was optimised. The Fisher diagonal is that of the whole model before any layer is
changed: a run that goes on where it was interrupted computes it again, from the same weights and text.

N rows (outputs), K columns (inputs).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from compress.calibration.records import LayerRecord
from compress.calibration.sequential import Batch, steps_of
from compress.calibration.statistics import Statistic
from compress.quantization.fisher import fisher
from compress.quantization.formats.lookup_table import (
    BITS,
    DTYPES,
    Looked,
    Lookup,
    LookupEmbedding,
    LookupFormat,
    LookupLinear,
    Sparse,
    StoredLookup,
)
from compress.quantization.kmeans import assign, kmeans
from compress.quantization.methods.rtn import bits_per_weight, checked_weight, relative_error
from compress.quantization.quantizer import METHODS, Quantizer, requested
from models.errors import UserError


@METHODS.register("squeezellm")
@dataclass(frozen=True)
class SqueezeLlm(Quantizer):
    """Weighted k-means of each row, and the weights that matter most as they are.

    Args:
        format: bits of an index, and the dtype of the tables.
        sensitive: share of a matrix's weights that stay for their Fisher information.
        outliers: share that stay for their magnitude.
        pruned_share: a weight with at least this share of zeros counts as pruned: its zeros stay zero exactly.
    """

    calibrates: ClassVar[bool] = True
    grid: ClassVar[tuple[str, ...]] = ("bits",)
    bits: ClassVar[tuple[int, ...]] = BITS
    embedding_bits: ClassVar[tuple[int, ...]] = BITS

    format: LookupFormat = field(default_factory=LookupFormat)
    sensitive: float = 0.0005
    outliers: float = 0.0045
    pruned_share: float = 0.05
    _fisher: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("sensitive", "outliers"):
            share = getattr(self, name)
            if not 0 <= share <= 0.5:
                raise UserError(f"{name} must be a share of the weights between 0 and 0.5, got {share!r}")
        if not 0 < self.pruned_share <= 1:
            raise UserError(f"pruned_share must be above 0 and at most 1, got {self.pruned_share!r}")

    def prepare(
        self,
        model: nn.Module,
        batches: Sequence[Batch] | None,
        *,
        like: "SqueezeLlm | None" = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Compute the Fisher diagonal of every layer of the model, or share what `like` has computed."""
        if like is not None:
            object.__setattr__(self, "_fisher", like._fisher)
            return
        names = [name for step in steps_of(model) for name in step.linears]
        object.__setattr__(self, "_fisher", fisher(model, batches, names, progress))  # not cleared: others may hold it

    def stored_form(self, kind: type[nn.Module], shape: tuple[int, int]) -> Lookup:
        count = shape[0] * shape[1]
        sparse = round(self.sensitive * count) + round(self.outliers * count)
        tables = StoredLookup(self.format.bits, self.format.dtype, sparse)
        with torch.device("meta"):
            return (LookupEmbedding if issubclass(kind, nn.Embedding) else LookupLinear)(*shape, tables)

    def nearest(self, weight: Tensor) -> Tensor:
        return squeeze(weight, torch.ones_like(weight), self.format, self.sensitive, self.outliers).dequantize()

    def compress(self, name: str, module: nn.Module, statistic: Statistic | None) -> tuple[nn.Module, LayerRecord]:
        started = time.perf_counter()
        weight, importance = checked_weight(name, module), self._fisher.pop(name)
        pruned = (weight == 0) if (weight == 0).float().mean() >= self.pruned_share else None
        looked = squeeze(weight, importance, self.format, self.sensitive, self.outliers, pruned)
        new = (LookupEmbedding if isinstance(module, nn.Embedding) else LookupLinear).of(module, looked)
        dense = looked.dequantize()
        achieved = {
            "bits": bits_per_weight(new),
            "sparse": new.format.sparse / weight.numel(),
            "error_of": "weights",
            "fisher_error": _fisher_error(weight, dense, importance),
        }
        error, seconds = relative_error(weight, dense), time.perf_counter() - started
        note = _notes(importance, pruned)
        return new, LayerRecord(name, tuple(weight.shape), requested(self), achieved, error, seconds, note)


def squeeze(
    weight: Tensor,
    importance: Tensor,
    format: LookupFormat,
    sensitive: float = 0.0,
    outliers: float = 0.0,
    pruned: Tensor | None = None,
) -> Looked:
    """Quantize a weight matrix.

    Args:
        weight: (N, K) fp32.
        importance: (N, K) at least 0; a row of zeros counts as a row of ones.
        format: the tables.
        sensitive, outliers: shares of the weights that stand apart.
        pruned: (N, K) bool, weights that must be exactly zero; each table then has a zero.
    """
    apart = set_apart(weight, importance, sensitive, outliers)
    out = apart if pruned is None else apart | pruned
    inside = importance.masked_fill(out, 0)
    blind = inside.sum(1, keepdim=True) == 0
    inside = torch.where(blind, (~out).to(inside), inside)
    table = kmeans(weight, inside, format.entries - (pruned is not None))
    if pruned is not None:
        table = torch.cat([table, table.new_zeros(len(table), 1)], dim=1).sort(dim=1).values
    table = table.to(DTYPES[format.dtype])
    codes = assign(weight, table.float()).to(torch.uint8)
    sparse = Sparse.of(weight, apart, table.dtype) if apart.any() else None
    return Looked(codes, table, sparse, format)


def set_apart(weight: Tensor, importance: Tensor, sensitive: float, outliers: float) -> Tensor:
    """Mask (N, K) of the sparse part: the most important weights, then the largest; no zeros."""
    apart = torch.zeros_like(weight, dtype=torch.bool)
    for share, score in ((sensitive, importance), (outliers, weight.abs())):
        score = score.masked_fill(apart | (weight == 0), 0).flatten()
        best = score.topk(round(share * score.numel()))
        apart.view(-1)[best.indices[best.values > 0]] = True
    return apart


def _fisher_error(weight: Tensor, dense: Tensor, importance: Tensor) -> float:
    """sum F (W - V)^2 / sum F W^2."""
    lost, whole = ((importance.double() * x.square()).sum() for x in (weight - dense, weight))
    return float(lost / whole) if whole > 0 else 0.0


def _notes(importance: Tensor, pruned: Tensor | None) -> str:
    notes = []
    if blind := int((importance.amax(1) == 0).sum()):
        notes.append(f"no gradient reached {blind} of {len(importance)} rows: their weights count alike")
    if pruned is not None:
        notes.append(f"pruned: its {int(pruned.sum())} zeros stay zero")
    return "; ".join(notes)

"""GPTQ: round column by column and let the columns to come make up for each error (arXiv 2210.17323).

The sweep and its factor are those of `compress/calibration/optimal_brain_surgeon.py`; a column becomes the nearest
points of its grids.

N rows (outputs), K columns (inputs).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.calibration.optimal_brain_surgeon import (
    Factor,
    column_blocks,
    factor_of,
    output_error,
    sweep,
)
from compress.calibration.records import LayerRecord
from compress.calibration.sequential import Batch
from compress.calibration.statistics import Hessian, Statistic, StatisticType
from compress.pruning.patterns import PATTERNS, Pattern
from compress.pruning.solvers.sparsegpt import Choice
from compress.quantization.affine import CLIPS, IntFormat, MseClip, Quantized, encode, fit, fit_matrix, stored
from compress.quantization.methods.rtn import (
    AffineQuantizer,
    Rtn,
    bits_per_weight,
    checked_weight,
    group_note,
    packed,
    relative_error,
)
from compress.quantization.quantizer import METHODS, requested
from models.errors import UserError


@METHODS.register("gptq")
@dataclass(frozen=True)
class Gptq(AffineQuantizer):
    """GPTQ with the Cholesky form and lazy blocks.

    Args:
        format: bits, groups, symmetry and scale dtype.
        clip: search for a smaller range with less squared error, or nothing for the full range.
        act_order: take the columns with the largest diagonal of H first. The grids of the groups are then fitted before
            the solve and keep their columns (static groups); otherwise each is fitted when the solve reaches it.
        damping: share of the mean diagonal of H that is added to it; grown tenfold while the factorisation fails.
        pruned_share: a weight with at least this share of zeros counts as pruned: its zeros stay zero exactly.
        precision: `float32` or `float64` of the solve.
        prune: pattern such as 2:4 of weights in the blocks that become zero in the same pass: SparseGPT's joint form.
    """

    calibrates: ClassVar[bool] = True

    format: IntFormat = field(default_factory=IntFormat)
    clip: MseClip | None = field(default=None, metadata={"registry": CLIPS})
    act_order: bool = True
    damping: float = 0.01
    pruned_share: float = 0.05
    precision: str = "float32"
    prune: Pattern | None = field(default=None, metadata={"registry": PATTERNS})

    def __post_init__(self) -> None:
        if not 0 < self.damping < 1:
            raise UserError(f"damping must be a share between 0 and 1 of the mean diagonal, got {self.damping!r}")
        if not 0 < self.pruned_share <= 1:
            raise UserError(f"pruned_share must be above 0 and at most 1, got {self.pruned_share!r}")
        if self.precision not in ("float32", "float64"):
            raise UserError(f"precision must be float32 or float64, got {self.precision!r}")
        if self.prune is not None:
            self._check_prune(self.prune)

    def _check_prune(self, pattern: Pattern) -> None:
        if pattern.scope == "global":
            raise UserError("prune with scope global compares layers, and GPTQ does one at a time; use row or layer")
        if pattern.span is not None and self.act_order:
            raise UserError(f"prune {pattern.spec()['pattern']} needs the inputs in their order; give act_order false")

    def prepare(self, model: nn.Module, batches: Sequence[Batch] | None, **how: Any) -> None:
        group, span = self.format.group_size, self.prune.span if self.prune is not None else None
        if span is not None and isinstance(group, int) and group % span:
            shown = self.prune.spec()["pattern"]
            raise UserError(f"prune {shown} needs groups of a multiple of {span} inputs, and group_size is {group}")

    def statistic(self, name: str, module: nn.Module) -> StatisticType | None:
        return Hessian

    def compress(self, name: str, module: nn.Module, statistic: Statistic | None) -> tuple[nn.Module, LayerRecord]:
        started = time.perf_counter()
        if statistic is None or statistic.tokens == 0:
            why = "it reads token ids" if isinstance(module, nn.Embedding) else "no calibration token reached it"
            return self._rounded(name, module, f"{why}: rounded to nearest")
        factor = factor_of(statistic, self.damping, self.act_order, self.precision)
        if factor is None:
            return self._rounded(name, module, "the Hessian could not be factorised at any damping: rounded to nearest")
        weight = checked_weight(name, module)
        keep = (weight == 0) if (weight == 0).float().mean() >= self.pruned_share else None
        prune = None if name in ("embedding", "head") else self.prune
        if prune is not None:
            prune.check(name, tuple(weight.shape))
        quantized = solve(weight, factor, self.format, clip=self.clip, keep=keep, prune=prune)
        new = packed(module, quantized)
        dense = quantized.dequantize()
        achieved = {"bits": bits_per_weight(new), "error_of": "outputs", "weight_error": relative_error(weight, dense)}
        if prune is not None:
            zeros = int((dense == 0).sum())
            achieved |= {"sparsity": zeros / dense.numel(), "zeros": zeros}
        error = output_error(weight, dense, statistic.matrix())
        seconds = time.perf_counter() - started
        note = "; ".join(filter(None, (group_note(self.format, weight), self._notes(factor, keep))))
        return new, LayerRecord(name, tuple(weight.shape), requested(self), achieved, error, seconds, note)

    def _rounded(self, name: str, module: nn.Module, note: str) -> tuple[nn.Module, LayerRecord]:
        if self.prune is not None and name not in ("embedding", "head"):
            self.prune.check(name, tuple(module.weight.shape))
            module.weight.data.masked_fill_(~self.prune.mask(module.weight.data.float().abs()), 0)
            note += ", and pruned by magnitude"
        new, record = Rtn(self.format, self.clip).compress(name, module, None)
        values = record.to_dict() | {
            "requested": requested(self),
            "note": "; ".join(filter(None, (record.note, note))),
        }
        return new, LayerRecord.from_dict(values)

    def _notes(self, factor: Factor, keep: Tensor | None) -> str:
        notes = []
        if factor.damping != self.damping:
            notes.append(f"damping grown to {factor.damping:g} until the Hessian could be factorised")
        if dead := int(factor.dead.sum()):
            notes.append(f"{dead} inputs were zero on every calibration token; their weights are zero now")
        if keep is not None:
            notes.append(f"pruned: its {int(keep.sum())} zeros stay zero")
        return "; ".join(notes)


def solve(
    weight: Tensor,
    factor: Factor,
    format: IntFormat,
    *,
    clip: MseClip | None = None,
    keep: Tensor | None = None,
    grids: tuple[Tensor, Tensor] | None = None,
    prune: Pattern | None = None,
) -> Quantized:
    """Quantize a weight matrix.

    Args:
        weight: (N, K).
        factor: of the Hessian of its inputs; the solve runs in its dtype.
        format: the grid.
        clip: how the ranges are fitted.
        keep: (N, K) bool, weights that must be exactly zero.
        grids: scale and zero, (N, G) or (1, 1), where the ranges were fitted before.
        prune: pattern of weights that become zero as well, chosen as by SparseGPT while the solve goes on.
    """
    upper = factor.upper
    columns = weight.to(upper.dtype).masked_fill(factor.dead, 0).T.contiguous()  # (K, N): a column lies in one piece
    free = None if keep is None else (~keep).T.to(upper.dtype).contiguous()  # (K, N), 0 where a weight stays zero
    static = grids is not None or factor.order is not None or isinstance(format.group_size, str)
    scale, zero = fit_matrix(columns.T, format, clip) if grids is None else grids  # (N, G) or (1, 1)
    grids = torch.stack([scale, zero]).transpose(1, 2).contiguous()  # (2, G, N)
    width, group = columns.shape[0], format.group(columns.shape[0])
    member = torch.arange(width, device=columns.device) // group  # (K,) the group of each column
    if factor.order is not None:
        columns, member = columns[factor.order], member[factor.order]
        free = free if free is None else free[factor.order]
    codes, member = torch.empty_like(columns), member.tolist()
    blocks, choice = column_blocks(width, 1 if static else group), None
    if prune is not None:
        choice = Choice(columns, factor, prune, unit=1 if static else group, free=free)
        blocks, free = choice.blocks, choice.free

    def settle(i: int, column: Tensor) -> Tensor:
        if choice is not None:
            choice.at(i)
        (scale, zero), code = grids[:, member[i]], codes[i]  # (N,) each
        if not static and i % group == 0:
            values = columns[i : i + group]
            values = values if free is None else values * free[i : i + group]
            for grid, fitted in zip((scale, zero), fit(values.T, format, clip), strict=True):
                grid.copy_(fitted)
        encode(column, scale, zero, format, out=code)
        if free is not None:
            code.copy_(torch.where(free[i] > 0, code, zero))
        return (code - zero).mul_(scale)

    sweep(columns, upper, blocks, settle)
    if factor.order is not None:
        codes = codes[factor.order.argsort()]
    return Quantized(*stored(codes.T.contiguous(), grids[0].T, grids[1].T, format), format)

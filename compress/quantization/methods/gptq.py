"""GPTQ: round column by column and let the columns to come make up for each error (arXiv 2210.17323).

With H = E[x x'] + damping and H^-1 = U' U, U upper triangular, the columns are taken in order:

    v_i = nearest grid point of w_i,    e_i = (w_i - v_i) / U_ii,    W[:, i+1:] -= e_i U[i, i+1:]

which is the exact optimal-brain-surgeon update for the inverse of H[i:, i:], without forming that inverse. Updates
reach the columns behind a block of 128 in one product. One Cholesky factorisation gives U: for J the reversal of the
order, J H J = L L' makes U = J L^-1 J.

N rows (outputs), K columns (inputs).
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from compress.calibration.records import LayerRecord
from compress.calibration.statistics import Hessian, Statistic, StatisticType
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

BLOCK = 128
SMALL_BLOCK = 1 << 20  # elements
DAMPING_GROWTH, MOST_DAMPING = 10.0, 10.0


class Factor(NamedTuple):
    """Cholesky factor of one Hessian, shared by the solves over it.

    Attributes:
        upper: U (K, K), in the order of the solve.
        order: (K,) column that comes i-th; None for the given order.
        dead: (K,) bool, inputs that were zero on every token.
        damping: the share of the mean diagonal that was added in the end.
    """

    upper: Tensor
    order: Tensor | None
    dead: Tensor
    damping: float


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
    """

    calibrates: ClassVar[bool] = True

    format: IntFormat = field(default_factory=IntFormat)
    clip: MseClip | None = field(default=None, metadata={"registry": CLIPS})
    act_order: bool = True
    damping: float = 0.01
    pruned_share: float = 0.05
    precision: str = "float32"
    _factors: WeakKeyDictionary = field(default_factory=WeakKeyDictionary, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.damping < 1:
            raise UserError(f"damping must be a share between 0 and 1 of the mean diagonal, got {self.damping!r}")
        if not 0 < self.pruned_share <= 1:
            raise UserError(f"pruned_share must be above 0 and at most 1, got {self.pruned_share!r}")
        if self.precision not in ("float32", "float64"):
            raise UserError(f"precision must be float32 or float64, got {self.precision!r}")

    def statistic(self, name: str, module: nn.Module) -> StatisticType | None:
        return Hessian

    def compress(self, name: str, module: nn.Module, statistic: Statistic | None) -> tuple[nn.Module, LayerRecord]:
        started = time.perf_counter()
        if statistic is None or statistic.tokens == 0:
            why = "it reads token ids" if isinstance(module, nn.Embedding) else "no calibration token reached it"
            return self._rounded(name, module, f"{why}: rounded to nearest")
        factor = self._factor(statistic)
        if factor is None:
            return self._rounded(name, module, "the Hessian could not be factorised at any damping: rounded to nearest")
        weight = checked_weight(name, module)
        keep = (weight == 0) if (weight == 0).float().mean() >= self.pruned_share else None
        quantized = solve(weight, factor, self.format, clip=self.clip, keep=keep)
        new = packed(module, quantized)
        dense = quantized.dequantize()
        achieved = {"bits": bits_per_weight(new), "error_of": "outputs", "weight_error": relative_error(weight, dense)}
        error = output_error(weight, dense, statistic.matrix())
        seconds = time.perf_counter() - started
        note = "; ".join(filter(None, (group_note(self.format, weight), self._notes(factor, keep))))
        return new, LayerRecord(name, tuple(weight.shape), requested(self), achieved, error, seconds, note)

    def _rounded(self, name: str, module: nn.Module, note: str) -> tuple[nn.Module, LayerRecord]:
        new, record = Rtn(self.format, self.clip).compress(name, module, None)
        values = record.to_dict() | {
            "requested": requested(self),
            "note": "; ".join(filter(None, (record.note, note))),
        }
        return new, LayerRecord.from_dict(values)

    def _factor(self, statistic: Hessian) -> Factor | None:
        if statistic not in self._factors:
            precision = getattr(torch, self.precision)
            self._factors[statistic] = factorise(statistic.matrix().to(precision), self.damping, self.act_order)
        return self._factors[statistic]

    def _notes(self, factor: Factor, keep: Tensor | None) -> str:
        notes = []
        if factor.damping != self.damping:
            notes.append(f"damping grown to {factor.damping:g} until the Hessian could be factorised")
        if dead := int(factor.dead.sum()):
            notes.append(f"{dead} inputs were zero on every calibration token; their weights are zero now")
        if keep is not None:
            notes.append(f"pruned: its {int(keep.sum())} zeros stay zero")
        return "; ".join(notes)


def factorise(hessian: Tensor, damping: float, act_order: bool) -> Factor | None:
    """Factorise E[x x'] (K, K), with more damping when it fails; None when nothing helps."""
    diagonal = hessian.diagonal()
    dead, mean = diagonal <= 0, diagonal.mean()
    order = diagonal.argsort(descending=True, stable=True) if act_order else None
    taken = torch.arange(len(hessian), device=hessian.device) if order is None else order
    taken = taken.flip(0)
    # J H J, and its diagonal without damping
    reverse, diagonal = hessian[taken[:, None], taken], (diagonal + dead.to(diagonal.dtype))[taken]
    del hessian  # the matrices of a wide layer are large: none is held longer than it is read
    while damping <= MOST_DAMPING:
        reverse.diagonal().copy_(diagonal + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(reverse)
        if not failed and bool(lower.isfinite().all()):
            del reverse
            identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            inverse = torch.linalg.solve_triangular(lower, identity, upper=False)
            del lower, identity
            return Factor(inverse.flip(0, 1), order, dead, damping)
        damping *= DAMPING_GROWTH
    return None


def solve(
    weight: Tensor,
    factor: Factor,
    format: IntFormat,
    *,
    clip: MseClip | None = None,
    keep: Tensor | None = None,
    grids: tuple[Tensor, Tensor] | None = None,
) -> Quantized:
    """Quantize a weight matrix.

    Args:
        weight: (N, K).
        factor: of the Hessian of its inputs; the solve runs in its dtype.
        format: the grid.
        clip: how the ranges are fitted.
        keep: (N, K) bool, weights that must be exactly zero.
        grids: scale and zero, (N, G) or (1, 1), where the ranges were fitted before.
    """
    upper = factor.upper
    columns = weight.to(upper.dtype).masked_fill(factor.dead, 0).T.contiguous()  # (K, N): a column lies in one piece
    free = None if keep is None else (~keep).T.to(upper.dtype).contiguous()  # (K, N), 0 where a weight stays zero
    static = grids is not None or factor.order is not None or isinstance(format.group_size, str)
    scale, zero = fit_matrix(columns.T, format, clip) if grids is None else grids  # (N, G) or (1, 1)
    grids = torch.stack([scale, zero]).transpose(1, 2).contiguous()  # (2, G, N)
    width, group = columns.shape[0], format.group(columns.shape[0])
    member = torch.arange(width, device=columns.device) // group  # (K,) the group of each column
    diagonal = upper.diagonal().tolist()
    if factor.order is not None:
        columns, member = columns[factor.order], member[factor.order]
        free = free if free is None else free[factor.order]
    codes = torch.empty_like(columns)
    for start, end in _blocks(width, group, static):
        block = columns[start:end]  # (block, N), whose rows become the errors
        scales, zeros = grids[:, member[start:end]]  # (block, N) both
        factors = upper[start:end, start:end]
        steps = zip(block.unbind(), codes[start:end].unbind(), scales.unbind(), zeros.unbind(), strict=True)
        with _few_threads(block.numel()):
            for i, (row, code, s, z) in enumerate(steps):
                if not static and (start + i) % group == 0:
                    values = columns[start + i :][:group]
                    values = values if free is None else values * free[start + i :][:group]
                    fitted = fit(values.T, format, clip)
                    for grid, own, new in zip(grids, (scales, zeros), fitted, strict=True):
                        grid[member[start + i]] = own[i : i + group] = new
                encode(row, s, z, format, out=code)
                if free is not None:
                    code.copy_(torch.where(free[start + i] > 0, code, z))
                row.sub_((code - z).mul_(s)).div_(diagonal[start + i])
                block[i + 1 :].addr_(factors[i, i + 1 :], row, alpha=-1)
        columns[end:].addmm_(upper[start:end, end:].T, block, alpha=-1)
    if factor.order is not None:
        codes = codes[factor.order.argsort()]
    return Quantized(*stored(codes.T.contiguous(), grids[0].T, grids[1].T, format), format)


@contextmanager
def _few_threads(elements: int) -> Iterator[None]:
    """One thread for the thousands of short operations on the columns of a block of `elements`, if that is small.

    Each would be split among the threads and wait for the slowest: on a machine that is busy with other work that wait
    is many times longer than the operation.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if elements < SMALL_BLOCK else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _blocks(width: int, group: int, static: bool) -> list[tuple[int, int]]:
    """Blocks of at most 128 columns that no group straddles: a group is fitted on columns that are all up to date."""
    if static:
        return [(start, min(start + BLOCK, width)) for start in range(0, width, BLOCK)]
    if group <= BLOCK:
        step = BLOCK // group * group
        return [(start, min(start + step, width)) for start in range(0, width, step)]
    return [
        (start, min(start + BLOCK, first + group, width))
        for first in range(0, width, group)
        for start in range(first, min(first + group, width), BLOCK)
    ]


def output_error(weight: Tensor, quantized: Tensor, hessian: Tensor) -> float:
    """|X (W - V)'|^2 / |X W'|^2 over the calibration tokens, from E[x x'] (K, K)."""
    difference = weight - quantized
    lost = (difference @ hessian).mul_(difference).sum()
    return float(lost / (weight @ hessian).mul_(weight).sum().clamp_min(1e-30))

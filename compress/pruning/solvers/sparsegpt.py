"""SparseGPT: prune column by column and let the columns to come make up for each weight (arXiv 2301.00774).

The sweep is that of `compress/calibration/optimal_brain_surgeon.py`. A mask is chosen on weights that are up to date,
by w^2 / U_ii^2: what zeroing costs once the columns behind have made up for it. N:M chooses at every M columns, an
unstructured pattern at every block of 128, over all rows (`scope: layer`) or in each row (`scope: row`). The article
takes the same share of each block. Here, by default, a block competes with all columns behind it: the error is lower,
and several times lower where inputs differ in energy. Either way the zeros of the blocks add up to exactly the number
that the whole is asked for.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from compress.calibration.optimal_brain_surgeon import Factor, column_blocks, factor_of, sweep
from compress.calibration.statistics import Hessian, StatisticType
from compress.pruning.method import METHODS
from compress.pruning.patterns import PATTERNS, Pattern, Unstructured
from compress.pruning.sparsify import Pruned, WeightPruning
from models.errors import UserError

Among = Literal["rest", "block"]


@METHODS.register("sparsegpt")
@dataclass(frozen=True)
class SparseGpt(WeightPruning):
    """SparseGPT: what zeroing an input of a layer loses, the inputs after it make up for.

    Args:
        pattern: which weights are compared with each other.
        among: unstructured patterns: with which inputs those of a block of 128 compete: with the block's own, as the
            article has it, or with all the rest too.
        damping: share of the mean diagonal of the Hessian that is added to it; grown tenfold while it cannot be
            factorised.
        precision: float32 or float64 of the solve.
    """

    updates: ClassVar[bool] = True
    label: ClassVar[str] = "SparseGPT"

    pattern: Pattern = field(default=Unstructured(scope="layer"), metadata={"registry": PATTERNS})
    among: Among = "rest"
    damping: float = 0.01
    precision: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damping < 1:
            raise UserError(f"damping must be a share between 0 and 1 of the mean diagonal, got {self.damping!r}")
        if self.precision not in ("float32", "float64"):
            raise UserError(f"precision must be float32 or float64, got {self.precision!r}")

    def statistic(self) -> StatisticType:
        return Hessian

    def solve(self, weight: Tensor, statistic: Hessian, pattern: Pattern) -> Pruned | None:
        factor = factor_of(statistic, self.damping, False, self.precision)
        if factor is None:
            return None
        note = ""
        if factor.damping != self.damping:
            note = f"damping grown to {factor.damping:g} until the Hessian could be factorised"
        return Pruned(*solve(weight, factor, pattern, self.among), note)


def solve(weight: Tensor, factor: Factor, pattern: Pattern, among: Among = "rest") -> tuple[Tensor, Tensor]:
    """Prune a weight (N, K) by the factor of the Hessian of its inputs: new weight fp32, and mask (N, K).

    Inputs that were zero on every token go first; a weight of theirs that stays keeps its value.
    """
    columns = weight.to(factor.upper.dtype).T.contiguous()  # (K, N): a column lies in one piece
    choice, settled = Choice(columns, factor, pattern, among), torch.empty_like(columns)

    def settle(i: int, column: Tensor) -> Tensor:
        return torch.mul(column, choice.at(i), out=settled[i])

    sweep(columns, factor.upper, choice.blocks, settle)
    return settled.T.float().contiguous(), choice.free.T > 0


class Choice:
    """The mask of a weight while a sweep goes over its columns.

    Args:
        columns: (K, N), which the sweep keeps up to date, in its order.
        factor: of the Hessian.
        pattern: the mask's.
        among: see `SparseGpt`.
        unit: columns that a block of the sweep must not straddle; a multiple of the pattern's span, or 1.
        free: (K, N), 0 where a weight is zero beforehand: those go first.

    Attributes:
        free: (K, N), 0 where a weight is zero; 1 where that is not known yet.
        blocks: of the sweep.
    """

    def __init__(
        self,
        columns: Tensor,
        factor: Factor,
        pattern: Pattern,
        among: Among = "rest",
        unit: int = 1,
        free: Tensor | None = None,
    ) -> None:
        self.columns, self.pattern, self.among = columns, pattern, among
        self.free = torch.ones_like(columns) if free is None else free
        scale = factor.upper.diagonal().reciprocal()  # (K,)
        self.scale = scale.masked_fill(factor.dead if factor.order is None else factor.dead[factor.order], 0)
        span = pattern.span
        self.blocks = column_blocks(len(columns), max(unit, span or 1))
        self._ends = dict(column_blocks(len(columns), span, span) if span else self.blocks)

    def at(self, i: int) -> Tensor:
        """`free` (N,) of the column to be settled next."""
        if i in self._ends:
            end = self._ends[i]
            whole = self.among == "rest" and self.pattern.span is None
            seen = slice(i, None if whole else end)
            scores = (self.columns[seen] * self.scale[seen, None] * self.free[seen]).square_().T  # (N, n)
            if whole:
                mask = self.pattern.rest(scores, (self.free[:i] == 0).sum(0), len(self.columns))
            else:
                mask = self.pattern.part(scores, i)
            self.free[i:end] *= mask[:, : end - i].T
        return self.free[i]

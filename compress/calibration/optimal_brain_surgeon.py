"""Optimal brain surgeon, column by column (arXiv 2208.11580): what GPTQ and SparseGPT have in common.

With H = E[x x'] + damping and H^-1 = U' U, U upper triangular, the columns are taken in order. Each becomes what the
method makes of it, and those to come make up for the error:

    v_i = settle(w_i),    e_i = (w_i - v_i) / U_ii,    W[:, i+1:] -= e_i U[i, i+1:]

which is the exact update for the inverse of H[i:, i:], without forming that inverse. Updates reach the columns behind a
block of 128 in one product. One Cholesky factorisation gives U: for J the reversal of the order, J H J = L L' makes
U = J L^-1 J.

N rows (outputs), K columns (inputs).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from compress.calibration.statistics import Hessian

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


_FACTORS: WeakKeyDictionary[Hessian, dict[tuple[float, bool, str], Factor | None]] = WeakKeyDictionary()


def factor_of(statistic: Hessian, damping: float, act_order: bool, precision: str) -> Factor | None:
    """The factor of a statistic, worked out once for all layers that share it; otherwise as `factorise`."""
    known, key = _FACTORS.setdefault(statistic, {}), (damping, act_order, precision)
    if key not in known:
        known[key] = factorise(statistic.matrix().to(getattr(torch, precision)), damping, act_order)
    return known[key]


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


def sweep(
    columns: Tensor, upper: Tensor, blocks: list[tuple[int, int]], settle: Callable[[int, Tensor], Tensor]
) -> None:
    """Settle column after column, and let those to come make up for the error of each.

    Args:
        columns: (K, N), the transposed weight; afterwards it holds e.
        upper: U (K, K).
        blocks: (start, end) of the columns that are kept up to date at once; `settle` may read all of a block.
        settle: number of a column, its values (N,) -> what it becomes (N,).
    """
    diagonal = upper.diagonal().tolist()
    for start, end in blocks:
        block, factors = columns[start:end], upper[start:end, start:end]  # (block, N), whose rows become the errors
        with _few_threads(block.numel()):
            for i, row in enumerate(block.unbind()):
                row.sub_(settle(start + i, row)).div_(diagonal[start + i])
                block[i + 1 :].addr_(factors[i, i + 1 :], row, alpha=-1)
        columns[end:].addmm_(upper[start:end, end:].T, block, alpha=-1)


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


def column_blocks(width: int, unit: int = 1, most: int = BLOCK) -> list[tuple[int, int]]:
    """Blocks of at most `most` columns that no run of `unit` columns straddles; wider units are cut."""
    step = max(unit, most // unit * unit)
    return [
        (start, min(start + most, first + step, width))
        for first in range(0, width, step)
        for start in range(first, min(first + step, width), most)
    ]


def output_error(weight: Tensor, changed: Tensor, hessian: Tensor) -> float:
    """|X (W - V)'|^2 / |X W'|^2 over the calibration tokens, from E[x x'] (K, K)."""
    difference = weight - changed
    lost = (difference @ hessian).mul_(difference).sum()
    return float(lost / (weight @ hessian).mul_(weight).sum().clamp_min(1e-30))

"""SparseSwaps: swap one kept for one pruned weight of a row while that lowers the error (arXiv 2512.10922).

For a row w, its pruned form v, d = w - v, G = E[x x'] and c = G d, the error d' G d changes by

    2 v_p c_p + v_p^2 G_pp                        where the kept v_p becomes 0,
    -2 a c_u + a^2 G_uu - 2 a v_p G_pu            and the pruned u becomes a,

and each step takes the pair (p, u) for which the sum is lowest. a is w_u, or the best value (c_u + v_p G_pu) / G_uu
where the weights that stay are free. A swap keeps the number of weights of its row, or of its group of an N:M pattern.

R rows at once, K inputs, S groups of M inputs (one of all K for an unstructured pattern).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.pruning.solvers.refinement import REFINEMENTS, Refinement
from models.errors import UserError

ELEMENTS = 1 << 18  # pairs at once
LEAST = 1e-6  # share of a row's error that a swap must win


@REFINEMENTS.register("swaps")
@dataclass(frozen=True)
class Swaps(Refinement):
    """One kept for one pruned weight of a row, always the pair that lowers the layer's error most.

    Args:
        steps: most swaps of a row; a row ends earlier where no swap helps.
    """

    steps: int = 25

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps is {self.steps}; it must be at least 1 swap")

    def refine(
        self, dense: Tensor, pruned: Tensor, mask: Tensor, hessian: Tensor, span: int | None, refit: bool
    ) -> tuple[Tensor, Tensor]:
        weight, kept = pruned.clone(), mask.clone()
        rows = max(1, ELEMENTS // (dense.shape[1] * (span or dense.shape[1])))
        for start in range(0, len(dense), rows):
            part = slice(start, start + rows)
            _Rows(dense[part], weight[part], kept[part], hessian, span, refit).swap(self.steps)
        better = _errors(dense, weight, hessian) < _errors(dense, pruned, hessian)  # whatever was rounded on the way
        return torch.where(better[:, None], weight, pruned), torch.where(better[:, None], kept, mask)


class _Rows:
    """Some rows of a layer, changed in place."""

    def __init__(
        self, dense: Tensor, weight: Tensor, mask: Tensor, gram: Tensor, span: int | None, refit: bool
    ) -> None:
        self.dense, self.weight, self.mask, self.gram, self.refit = dense, weight, mask, gram, refit
        width = dense.shape[1]
        self.span = span or width
        self.diagonal = gram.diagonal()  # (K,)
        self.blocks = gram.view(width // self.span, self.span, width // self.span, self.span)
        self.blocks = self.blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()  # (S, M, M)
        self.error = (dense - weight) @ gram  # c (R, K)
        self.start = ((dense - weight) * self.error).sum(1)  # (R,)
        # 2 v_p w_u G_pu (R, S, M, M): as long as weights have their dense values, no swap changes it
        self.shared = None if refit else 2 * self._pairs(dense) * self._grouped(dense)[:, :, None]

    def swap(self, steps: int) -> None:
        """At most so many swaps of each row."""
        number = torch.arange(len(self.dense), device=self.dense.device)
        for _ in range(steps):
            gain, p, u = self._best()
            taken = gain < -LEAST * self.start
            if not taken.any():
                return
            r, p, u = number[taken], p[taken], u[taken]
            gone = self.weight[r, p]
            value = self.dense[r, u]
            if self.refit:
                value = (self.error[r, u] + gone * self.gram[p, u]) / self.diagonal[u]
            self.error[r] += gone[:, None] * self.gram[p] - value[:, None] * self.gram[u]
            self.weight[r, p], self.weight[r, u] = 0.0, value
            self.mask[r, p], self.mask[r, u] = False, True

    def _best(self) -> tuple[Tensor, Tensor, Tensor]:
        """Change of the error by the best swap of each row, and the inputs p and u of it: (R,) each."""
        zeroing = 2 * self.weight * self.error + self.weight.square() * self.diagonal  # (R, K)
        zeroing = self._grouped(zeroing.masked_fill_(~self.mask, torch.inf))  # (R, S, M)
        if self.refit:
            blocked = self.mask | (self.diagonal <= 0)
            reviving = self._grouped(torch.zeros_like(self.error).masked_fill_(blocked, torch.inf))
            pulls = (self._pairs(self.weight) + self._grouped(self.error)[:, :, None]).square_()  # (R, S, M, M)
            change = pulls.div_(-self._grouped(self.diagonal.clamp_min(1e-30)[None])[:, :, None])
            change += zeroing[..., None]
        else:
            reviving = -2 * self.dense * self.error + self.dense.square() * self.diagonal
            reviving = self._grouped(reviving.masked_fill_(self.mask, torch.inf))
            change = zeroing[..., None] - self.shared
        gain, u = (change.amin(2) + reviving).flatten(1).min(1)  # (R,): the best p of each u, then the best u
        group, inner = u // self.span, u % self.span
        p = change[torch.arange(len(u), device=u.device), group, :, inner].argmin(1)  # (R, M) -> (R,)
        return gain, group * self.span + p, u

    def _pairs(self, weight: Tensor) -> Tensor:
        """v_p G_pu (R, S, M, M)."""
        return self._grouped(weight)[..., None] * self.blocks

    def _grouped(self, values: Tensor) -> Tensor:
        """(R, K) as (R, S, M)."""
        return values.view(len(values), -1, self.span)


def _errors(dense: Tensor, pruned: Tensor, hessian: Tensor) -> Tensor:
    """(w - v) H (w - v)' of each row (N,) in fp64."""
    difference = (dense - pruned).double()
    return ((difference @ hessian.double()) * difference).sum(1)

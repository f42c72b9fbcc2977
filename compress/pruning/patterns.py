"""Sparsity patterns: unstructured, with exact counts over rows, layers or the whole model, and N:M.

A pattern turns scores (out, in) into a mask (out, in) of bool in which True keeps the weight. It knows no criterion.
Of equal scores the one at the lowest index goes first, so that the count is exact and the same on every run.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from models.errors import UserError
from models.registry import Registry

Scope = Literal["row", "layer", "global"]


class Pattern(ABC):
    """A sparsity pattern: turns the scores of a criterion into a mask.

    Attributes:
        sparsity: fraction of the weights that the pattern removes, as it was asked for.
        scope: among which scores the smallest are found; with `global`, those of all layers.
        span: consecutive inputs among which it counts; None: any number of them.
        allocated: whether each layer can have a sparsity of its own.
    """

    sparsity: float
    scope: str = "group"
    span: int | None = None
    allocated: bool = False

    @abstractmethod
    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Raise `UserError` when a weight of this shape (out, in) cannot take the pattern."""

    @abstractmethod
    def mask(self, scores: Tensor) -> Tensor:
        """Return the mask (out, in), True = keep, for scores (out, in)."""

    def part(self, scores: Tensor, start: int) -> Tensor:
        """The mask of scores (out, n) of a run of inputs: the zeros of all runs add up to those of the pattern.

        Args:
            start: number of the first input of the run; a multiple of `span`, as n is.
        """
        return self.mask(scores)

    @abstractmethod
    def given(self, sparsity: float | None = None, scope: str | None = None) -> Self:
        """The pattern with what is not None. Raises `UserError` for what it does not have or contradicts it."""

    @abstractmethod
    def spec(self) -> dict[str, object]:
        """The pattern as JSON values."""


class _Patterns(Registry):
    def parse(self, value: Any, where: str) -> Pattern:
        if isinstance(value, str) and (numbers := re.fullmatch(r"(\d{1,9}):(\d{1,9})", value)):
            value = {"kind": "N:M", "n": int(numbers[1]), "m": int(numbers[2])}
        return super().parse(value, where)


PATTERNS = _Patterns("pattern", example="2:4 (keep 2 of every 4)")


@PATTERNS.register("unstructured")
@dataclass(frozen=True)
class Unstructured(Pattern):
    """Remove the `sparsity` smallest scores of each row ("row"), of each layer ("layer") or of all layers ("global").

    The number removed of n weights is `round(sparsity * n)`. "row" means per output row, Wanda's comparison group
    (arXiv 2306.11695, section 3); "global" needs the scores of all layers at once: `global_masks`.

    Args:
        sparsity: fraction removed, from 0 on and below 1.
        scope: within which weights the smallest are sought.
    """

    sparsity: float = 0.5
    scope: Scope = "row"

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity < 1.0:
            raise UserError(f"sparsity is {self.sparsity:g}; it is the fraction removed and must lie in [0, 1)")

    @property
    def allocated(self) -> bool:
        return self.scope != "global"

    def given(self, sparsity: float | None = None, scope: str | None = None) -> Self:
        return replace(
            self, sparsity=self.sparsity if sparsity is None else sparsity, scope=self.scope if scope is None else scope
        )

    def check(self, name: str, shape: tuple[int, int]) -> None:
        count = shape[1] if self.scope == "row" else shape[0] * shape[1]
        if self.scope != "global" and round(self.sparsity * count) >= count:
            where = f"rows of {count} weights" if self.scope == "row" else f"{count} weights"
            raise UserError(f"sparsity {self.sparsity:g} leaves nothing of {name} ({where}); ask for less")

    def mask(self, scores: Tensor) -> Tensor:
        if self.scope == "global":
            raise ValueError("a global pattern compares layers: use global_masks")
        rows = scores if self.scope == "row" else scores.reshape(1, -1)  # (groups, members)
        keep = ~smallest(rows, round(self.sparsity * rows.shape[1]))
        return keep.reshape(scores.shape)

    def part(self, scores: Tensor, start: int) -> Tensor:
        rows = scores if self.scope == "row" else scores.reshape(1, -1)
        each = scores.shape[0] // rows.shape[0]  # weights of one input that are compared
        count = round(self.sparsity * (each * (start + scores.shape[1]))) - round(self.sparsity * (each * start))
        return ~smallest(rows, count).reshape(scores.shape)

    def rest(self, scores: Tensor, zeros: Tensor, width: int) -> Tensor:
        """The mask of scores (out, n) of the last n of `width` inputs; each row has `zeros` (out,) before them."""
        if self.scope == "row":
            return ~smallest(scores, (round(self.sparsity * width) - zeros).clamp_min(0))
        count = round(self.sparsity * (scores.shape[0] * width)) - int(zeros.sum())
        return ~smallest(scores.reshape(1, -1), max(0, count)).reshape(scores.shape)

    def spec(self) -> dict[str, object]:
        return {"pattern": "unstructured", "scope": self.scope, "sparsity": self.sparsity}


@PATTERNS.register("N:M")
@dataclass(frozen=True)
class NOfM(Pattern):
    """Keep the `n` largest scores of every `m` consecutive inputs (2:4, 4:8, ...), along the input axis; written `2:4`.

    Args:
        n: inputs that stay.
        m: of so many.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise UserError(
                f"pattern {self.n}:{self.m} keeps {self.n} of every {self.m}; it needs 0 < N < M, as in 2:4"
            )

    @property
    def sparsity(self) -> float:
        return 1.0 - self.n / self.m

    @property
    def span(self) -> int:
        return self.m

    def given(self, sparsity: float | None = None, scope: str | None = None) -> Self:
        if sparsity is not None and abs(sparsity - self.sparsity) > 1e-6:
            raise UserError(
                f"pattern {self.n}:{self.m} removes {self.sparsity:g} of the weights, not {sparsity:g}; leave sparsity "
                "out"
            )
        if scope is not None:
            raise UserError(
                f"scope is an option of pattern unstructured, not of {self.n}:{self.m}; leave it out, or choose "
                "unstructured"
            )
        return self

    def check(self, name: str, shape: tuple[int, int]) -> None:
        if shape[1] % self.m:
            raise UserError(
                f"pattern {self.n}:{self.m} needs an input width divisible by {self.m}; {name} has {shape[1]}"
            )

    def mask(self, scores: Tensor) -> Tensor:
        groups = scores.reshape(-1, self.m)  # (out * in / m, m)
        return ~smallest(groups, self.m - self.n).reshape(scores.shape)

    def spec(self) -> dict[str, object]:
        return {"pattern": f"{self.n}:{self.m}", "sparsity": self.sparsity}


def smallest(scores: Tensor, count: int | Tensor) -> Tensor:
    """Mark exactly `count` smallest scores of every row; of equal ones the lowest index first. (rows, n) -> bool.

    Args:
        count: of every row, or (rows,).
    """
    if torch.isnan(scores).any():
        raise UserError("a pruning score is not a number: the weights or the calibration activations contain NaN")
    if isinstance(count, Tensor):
        count = count[:, None]
        threshold = scores.sort(dim=1).values.gather(1, (count - 1).clamp_min(0))  # (rows, 1)
        threshold = threshold.masked_fill(count == 0, -torch.inf)
    elif count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    else:
        threshold = scores.kthvalue(count, dim=1, keepdim=True).values  # (rows, 1)
    below, tied = scores < threshold, scores == threshold
    quota = count - below.sum(dim=1, keepdim=True)  # how many of the tied ones still go  (rows, 1)
    return below | (tied & (tied.cumsum(dim=1) <= quota))


def global_masks(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Masks that remove `round(sparsity * n)` of all n weights together, whichever layers these lie in.

    Raises `UserError` when a layer would be left with nothing: its output would be constant and the model broken.
    """
    flat = torch.cat([score.reshape(-1).float() for score in scores.values()]).unsqueeze(0)  # (1, n)
    keep = ~smallest(flat, round(sparsity * flat.shape[1])).squeeze(0)  # (n,)
    pieces = keep.split([score.numel() for score in scores.values()])
    masks = {name: piece.reshape(scores[name].shape) for name, piece in zip(scores, pieces, strict=True)}
    for name, mask in masks.items():
        if not mask.any():
            raise UserError(
                f"global sparsity {sparsity:g} leaves nothing of {name}; ask for less, or for scope 'layer'"
            )
    return masks

"""Refinement of a mask: another choice of the weights that stay, as many as before, for less error of the outputs."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from models.registry import Registry

REFINEMENTS = Registry("refinement", example="{kind: swaps, steps: 25}")


class Refinement(ABC):
    """Base class of the registered refinements, each a frozen dataclass of its options."""

    kind: ClassVar[str]

    @abstractmethod
    def refine(
        self, dense: Tensor, pruned: Tensor, mask: Tensor, hessian: Tensor, span: int | None, refit: bool
    ) -> tuple[Tensor, Tensor]:
        """Pruned weight and mask of which no row has a larger error (w - v) H (w - v)' than before.

        Args:
            dense: W (N, K) fp32.
            pruned: V (N, K) fp32, zero where `mask` is False.
            mask: (N, K) bool, True = kept.
            hessian: E[x x'] (K, K) fp32 of the inputs.
            span: consecutive inputs of which as many stay as before; None: all of a row.
            refit: whether weights that stay may take other values than the dense ones.
        """

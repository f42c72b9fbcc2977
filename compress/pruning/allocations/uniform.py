"""Uniform allocation: every layer gives up the same share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from compress.calibration.sequential import Batch
from compress.pruning.allocations.allocation import LAYER_SPARSITIES, SparsityAllocation


@LAYER_SPARSITIES.register("uniform")
@dataclass(frozen=True)
class UniformSparsity(SparsityAllocation):
    """The same sparsity in every layer."""

    def sparsities(
        self, model: nn.Module, shapes: Mapping[str, tuple[int, int]], sparsity: float, batches: Sequence[Batch] | None
    ) -> dict[str, float]:
        return dict.fromkeys(shapes, sparsity)

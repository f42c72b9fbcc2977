"""Erdos-Renyi allocation: the wider a layer, the sparser (SET, arXiv 1707.04780; ERK, arXiv 1911.11134)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from compress.calibration.sequential import Batch
from compress.pruning.allocations.allocation import LAYER_SPARSITIES, SparsityAllocation


@LAYER_SPARSITIES.register("erk")
@dataclass(frozen=True)
class ErdosRenyi(SparsityAllocation):
    """Density of a matrix (N, K) proportional to (N + K) / (N K); where that passes 1 the layer stays dense.

    For matrices ERK, which counts the sides of a kernel too, is this very rule.
    """

    def sparsities(
        self, model: nn.Module, shapes: Mapping[str, tuple[int, int]], sparsity: float, batches: Sequence[Batch] | None
    ) -> dict[str, float]:
        sizes, sides = {n: a * b for n, (a, b) in shapes.items()}, {n: a + b for n, (a, b) in shapes.items()}
        kept, free = (1 - sparsity) * sum(sizes.values()), dict(shapes)
        while True:
            factor = kept / sum(sides[name] for name in free)  # weights kept for each unit of width
            full = [name for name in free if factor * sides[name] >= sizes[name]]
            if not full or len(full) == len(free):
                break
            for name in full:
                kept -= sizes[name]
                del free[name]
        return {n: max(0.0, 1 - factor * sides[n] / size) if n in free else 0.0 for n, size in sizes.items()}

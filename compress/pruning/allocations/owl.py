"""OWL: blocks with more outliers keep more (outlier-weighed layerwise sparsity, arXiv 2310.05175)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from compress.calibration.records import LayerRecord
from compress.calibration.sequential import Batch, BlockStep, Method, calibrate_sequentially
from compress.calibration.statistics import InputNorm, StatisticType
from compress.pruning.allocations.allocation import LAYER_SPARSITIES, SparsityAllocation
from models.errors import UserError


@LAYER_SPARSITIES.register("owl")
@dataclass(frozen=True)
class Owl(SparsityAllocation):
    """By the share D of outliers in a block: Wanda scores of the dense model above `threshold` times their mean.

    What a block keeps lies `spread` above or below 1 - sparsity at most and rises with D (section 4). Where all D are
    equal, all blocks keep as much. Embedding and head, where included, have the sparsity of the whole.

    Args:
        threshold: times the mean of its block from which a score counts as an outlier.
        spread: most by which the sparsity of a block may differ from the one asked for, before they are centred.
    """

    calibrated: ClassVar[bool] = True

    threshold: float = 5.0
    spread: float = 0.08

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise UserError(f"threshold is {self.threshold:g}; it is a multiple of the mean score and must be above 0")
        if not 0 <= self.spread < 0.5:
            raise UserError(f"spread is {self.spread:g}; it is a share of the weights and must lie in [0, 0.5)")

    def sparsities(
        self, model: nn.Module, shapes: Mapping[str, tuple[int, int]], sparsity: float, batches: Sequence[Batch] | None
    ) -> dict[str, float]:
        counting = _Outliers(shapes, self.threshold)
        calibrate_sequentially(model, counting, batches)
        found = {}
        for block, own in zip(self.shared(counting.counts, sparsity), counting.names, strict=True):
            if not 0 <= block < 1:
                raise UserError(
                    f"allocation owl with spread {self.spread:g} asks {own[0]} for a sparsity of {block:.3g}; lower "
                    "spread, or choose a sparsity farther from 0 and 1"
                )
            found |= dict.fromkeys(own, block)
        return dict.fromkeys(shapes, sparsity) | found

    def shared(self, counts: Sequence[tuple[int, int]], sparsity: float) -> list[float]:
        """The sparsity of each block, from its outliers and its weights."""
        shares = [outliers / weights for outliers, weights in counts]
        low, high = min(shares, default=0.0), max(shares, default=0.0)
        if low == high:
            return [sparsity] * len(shares)
        kept = [(share - low) / (high - low) * 2 * self.spread for share in shares]
        mean = sum(k * weights for k, (_, weights) in zip(kept, counts, strict=True)) / sum(w for _, w in counts)
        return [sparsity - (k - mean) for k in kept]


class _Outliers(Method):
    """Counts the outliers of each block and changes nothing."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], threshold: float) -> None:
        self.shapes, self.threshold = shapes, threshold
        self.names: list[list[str]] = []  # of each block
        self.counts: list[tuple[int, int]] = []  # outliers and weights of each block

    def statistic(self, name: str, module: nn.Module) -> StatisticType | None:
        return InputNorm if name in self.shapes and name.startswith("blocks.") else None

    def compress_block(self, step: BlockStep) -> list[LayerRecord]:
        own = [name for name, module in step.linears.items() if self.statistic(name, module)]
        if own:
            scores = torch.cat([self._scores(step, name).flatten() for name in own])
            self.names.append(own)
            self.counts.append((int((scores > self.threshold * scores.mean()).sum()), len(scores)))
        return []

    @staticmethod
    def _scores(step: BlockStep, name: str) -> torch.Tensor:
        """|W| times the norm of its inputs (out, in); zeros where no token came by."""
        weight = step.linears[name].weight.detach().float().abs()
        return weight * step.statistics[name].norm() if name in step.statistics else torch.zeros_like(weight)

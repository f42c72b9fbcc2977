"""Magnitude pruning: the score of a weight is its absolute value (Han et al., arXiv 1506.02626)."""

from dataclasses import dataclass

from torch import Tensor

from compress.pruning.criterion import CRITERIA
from compress.statistics import Statistic


@CRITERIA.register("magnitude")
@dataclass(frozen=True)
class Magnitude:
    """|W|; needs no data."""

    comparable = True
    calibrated = False

    def statistic(self) -> None:
        return None

    def scores(self, weight: Tensor, statistic: Statistic | None = None) -> Tensor:
        return weight.detach().float().abs()

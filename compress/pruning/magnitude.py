"""Magnitude pruning: the score of a weight is its absolute value (Han et al., arXiv 1506.02626)."""

from dataclasses import dataclass

from torch import Tensor

from compress.pruning.criterion import CRITERIA, Criterion
from compress.statistics import Statistic


@CRITERIA.register("magnitude")
@dataclass(frozen=True)
class Magnitude(Criterion):
    """|W|; needs no data."""

    comparable = True

    def scores(self, weight: Tensor, statistic: Statistic | None = None) -> Tensor:
        return weight.detach().float().abs()

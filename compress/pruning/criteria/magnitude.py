"""Magnitude pruning: the score of a weight is its absolute value (Han et al., arXiv 1506.02626)."""

from dataclasses import dataclass

from torch import Tensor

from compress.calibration.statistics import Statistic
from compress.pruning.method import METHODS
from compress.pruning.sparsify import Criterion


@METHODS.register("magnitude")
@dataclass(frozen=True)
class Magnitude(Criterion):
    """|W|; needs no data."""

    comparable = True

    def scores(self, weight: Tensor, statistic: Statistic | None = None) -> Tensor:
        return weight.detach().float().abs()

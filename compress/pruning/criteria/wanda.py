"""Wanda: weights times the norm of the activations that they meet (Sun et al., arXiv 2306.11695)."""

from dataclasses import dataclass

from torch import Tensor

from compress.calibration.statistics import InputNorm, StatisticType
from compress.pruning.method import METHODS
from compress.pruning.sparsify import Criterion


@METHODS.register("wanda")
@dataclass(frozen=True)
class Wanda(Criterion):
    """|W_ij| * ||x_j||_2 over all calibration tokens (eq. 1), compared within each output row by default.

    The root mean square stands for the norm: it differs by a factor common to all channels, and counts tokens, not
    samples. An input channel that never fires has the score 0, so its weights go first.
    """

    def statistic(self) -> StatisticType:
        return InputNorm

    def scores(self, weight: Tensor, statistic: InputNorm) -> Tensor:
        return weight.detach().float().abs() * statistic.norm()  # (out, in) * (in,)

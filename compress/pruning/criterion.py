"""What a criterion of unstructured pruning is: a score for every weight, the smallest of which go."""

from typing import Protocol

from torch import Tensor

from compress.statistics import Statistic, StatisticType
from models.registry import Registry

CRITERIA = Registry("pruning criterion")


class Criterion(Protocol):
    """Scores for the weights of one linear map.

    Attributes:
        kind: its name.
        comparable: whether scores of different layers stand on one scale, which a global pattern needs.
        calibrated: whether it looks at calibration data.
    """

    kind: str
    comparable: bool
    calibrated: bool

    def statistic(self) -> StatisticType | None:
        """What to gather at the input of a linear map, or None."""

    def scores(self, weight: Tensor, statistic: Statistic | None) -> Tensor:
        """Scores (out, in) fp32, at least 0, of the weight (out, in)."""

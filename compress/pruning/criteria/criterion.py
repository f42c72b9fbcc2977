"""Criterion of unstructured pruning: a score for every weight; the weights of the smallest are pruned."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from compress.calibration.statistics import Statistic, StatisticType
from models.registry import Registry

CRITERIA = Registry("pruning criterion")


class Criterion(ABC):
    """Base class of the registered criteria, each a frozen dataclass of its options.

    Attributes:
        comparable: whether scores of different layers are on one scale, which a global pattern needs.
    """

    comparable: ClassVar[bool] = False

    def statistic(self) -> StatisticType | None:
        """Statistic of the inputs of a linear layer; None: the criterion needs no data."""
        return None

    @property
    def calibrated(self) -> bool:
        """Whether it looks at calibration data."""
        return self.statistic() is not None

    @abstractmethod
    def scores(self, weight: Tensor, statistic: Statistic | None) -> Tensor:
        """Scores (out, in) fp32, at least 0, of the weight (out, in)."""

"""Metrics of a confusion matrix, by torchmetrics: macro F1 and the Matthews correlation (Gorodkin 2004).

They are no means over predictions, so their intervals are percentiles of a bootstrap over the predictions (Efron and
Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13), paired for a change: both models are resampled alike.

N predictions, U different pairs of target and prediction.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from app.evaluation import formatting
from app.evaluation.intervals import LEVEL, Interval
from app.evaluation.metrics.base import METRICS, Metric
from app.evaluation.rows import Rows

BASE = 2**14  # a target t and a prediction p are one number, BASE t + p
DRAWS = 1000


class ConfusionMetric(Metric):
    """Base class: a figure of the pairs of target and likeliest prediction."""

    better, quantity, gathered = "higher", "confusion", True
    intervals = f"percentile bootstrap over predictions, {DRAWS:,} draws, paired for a change"

    def units(self, log: Tensor, targets: Tensor) -> Tensor:
        return targets * BASE + log.argmax(1)

    def score(self, predictions: Tensor, targets: Tensor, classes: int) -> Tensor:
        """The figure for predictions and targets (N,) int64."""
        raise NotImplementedError

    def figure(self, units: Tensor) -> float:
        units = units.long()
        known, numbers = torch.cat([units // BASE, units % BASE]).unique(return_inverse=True)
        targets, predictions = numbers.chunk(2)
        return float(self.score(predictions, targets, max(2, len(known))))

    def value(self, rows: Rows) -> Interval:
        pairs = rows.sums[self.quantity].astype(np.int64)
        return _bootstrap(pairs, self._figure_of)

    def difference(self, before: Rows, after: Rows) -> Interval:
        pairs = [rows.sums[self.quantity].astype(np.int64) for rows in (before, after)]
        both = pairs[0] * BASE**2 + pairs[1]

        def moved(kept: np.ndarray) -> float:
            return self._figure_of(kept % BASE**2) - self._figure_of(kept // BASE**2)

        return _bootstrap(both, moved)

    def change(self, before: Rows, after: Rows) -> Interval:
        return self.difference(before, after)

    def _figure_of(self, pairs: np.ndarray) -> float:
        return self.figure(torch.from_numpy(pairs))

    def show(self, value: float | None) -> str:
        return formatting.number(value, 3)


def _bootstrap(units: np.ndarray, figure: Callable[[np.ndarray], float]) -> Interval:
    """The figure of units (N,), with the percentiles of those of N units drawn from them with replacement."""
    kinds, counts = np.unique(units, return_counts=True)  # (U,)
    draws = np.random.default_rng(0).multinomial(len(units), counts / len(units), size=DRAWS)  # (DRAWS, U)
    drawn = [figure(np.repeat(kinds, many)) for many in draws]
    low, high = np.percentile(drawn, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(figure(units), float(low), float(high))


@METRICS.register("macro_f1")
@dataclass(frozen=True)
class MacroF1(ConfusionMetric):
    """F1 of each class, averaged over the classes."""

    label = "macro F1"
    definition = "mean over the classes of 2 tp / (2 tp + fp + fn)"

    def score(self, predictions: Tensor, targets: Tensor, classes: int) -> Tensor:
        from torchmetrics.functional.classification import multiclass_f1_score  # takes seconds to import

        return multiclass_f1_score(predictions, targets, classes, average="macro", validate_args=False)


@METRICS.register("matthews_correlation")
@dataclass(frozen=True)
class MatthewsCorrelation(ConfusionMetric):
    """Correlation of target and prediction: 0 for chance, or where either is always the same, 1 for no error."""

    label = "Matthews correlation"
    definition = "correlation of target and likeliest prediction over the classes"

    def score(self, predictions: Tensor, targets: Tensor, classes: int) -> Tensor:
        from torchmetrics.functional.classification import multiclass_matthews_corrcoef  # takes seconds to import

        if min(predictions.unique().numel(), targets.unique().numel()) < 2:
            return torch.zeros(())  # 0 / 0, of which torchmetrics makes a number near 0.03
        return multiclass_matthews_corrcoef(predictions, targets, classes, validate_args=False)

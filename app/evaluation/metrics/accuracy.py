"""Accuracy: the share of the predictions that rank the target first."""

from dataclasses import dataclass

from torch import Tensor

from app.evaluation import formatting
from app.evaluation.metrics.base import METRICS, Metric


@METRICS.register("accuracy")
@dataclass(frozen=True)
class Accuracy(Metric):
    """Top-1 accuracy."""

    label, better, quantity = "accuracy", "higher", "correct"
    quantity_unit = "share"
    definition = "share of the predictions that rank the target first"

    def units(self, log: Tensor, targets: Tensor) -> Tensor:
        return log.argmax(1) == targets

    def of(self, mean: float, bytes_per_token: float | None = None) -> float:
        return min(1.0, max(0.0, mean))  # a bound of an interval may lie beyond

    def moved(self, mean: float, difference: float, bytes_per_token: float | None = None) -> float:
        return difference

    def show(self, value: float | None) -> str:
        return formatting.percent(value)

    def show_change(self, value: float | None) -> str:
        text = formatting.plus(100 * value) if formatting.known(value) else formatting.MISSING
        return text if text == formatting.MISSING else f"{text} points"

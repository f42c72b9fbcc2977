"""A metric: a figure of quality with its interval, how it is shown, and which direction is better."""

from collections.abc import Callable, Iterable
from typing import ClassVar

from torch import Tensor

from app.evaluation import formatting
from app.evaluation.intervals import Interval
from app.evaluation.rows import Rows
from models.registry import Registry

METRICS = Registry("metric", example="loss")


class Metric:
    """Base class of the registered metrics, each a frozen dataclass of its options.

    By default a metric is the mean of one quantity per predicted token, or an increasing function `of` that mean.

    Attributes:
        kind: its name in a recipe and in report.json.
        label: its name in a sentence.
        unit: what it is counted in, behind the label in a table.
        definition: how it is computed, in a few words.
        better: `lower` or `higher`.
        quantity: the name of what `units` gives; metrics of one quantity share its sums.
        quantity_unit: what its mean is counted in, in which trainings of several seeds are compared.
        relative: whether a change is told as a ratio, `KIND_ratio` in report.json.
        gathered: whether its `figure` needs the quantity of every prediction, and not its mean alone; for tasks of one
            prediction a row.
        intervals: method of its interval; empty: that of a mean (app/evaluation/intervals.py).
    """

    kind: ClassVar[str]
    label: ClassVar[str]
    unit: ClassVar[str] = ""
    definition: ClassVar[str] = "mean per predicted token"
    better: ClassVar[str] = "lower"
    quantity: ClassVar[str] = "nll"
    quantity_unit: ClassVar[str] = "nats"
    relative: ClassVar[bool] = False
    gathered: ClassVar[bool] = False
    intervals: ClassVar[str] = ""

    def units(self, log: Tensor, targets: Tensor) -> Tensor:
        """Its quantity of each predicted token (N,), from log-probabilities (N, V) and targets (N,) int64."""
        return -log.gather(1, targets[:, None]).squeeze(1)

    @property
    def title(self) -> str:
        """The label as it begins a sentence or heads a column."""
        return self.label[:1].upper() + self.label[1:]

    def of(self, mean: float, bytes_per_token: float | None = None) -> float | None:
        """The figure for a mean of its quantity; None where it needs the bytes of a token and they are not known."""
        return mean

    def figure(self, units: Tensor) -> float:
        """The figure for its quantity of every prediction (N,), where it is gathered."""
        raise NotImplementedError

    def moved(self, mean: float, difference: float, bytes_per_token: float | None = None) -> float | None:
        """The change of the figure when the mean of its quantity moves by `difference`; linear by default."""
        return self.of(difference, bytes_per_token)

    def value(self, rows: Rows) -> Interval | None:
        """The figure over a split, with its interval."""
        mean = rows.mean(self.quantity)
        if self.of(mean.value, rows.bytes_per_token) is None:
            return None
        return mean.map(lambda value: self.of(value, rows.bytes_per_token))

    def change(self, before: Rows, after: Rows) -> Interval | None:
        """The paired difference after - before with its interval, both on the same segments."""
        mean, difference = before.mean(self.quantity).value, self.difference(before, after)
        if self.of(mean, before.bytes_per_token) is None:
            return None
        return difference.map(lambda value: self.moved(mean, value, before.bytes_per_token))

    def difference(self, before: Rows, after: Rows) -> Interval:
        """The paired difference of the means of its quantity."""
        return before.segments.mean(after.sums[self.quantity] - before.sums[self.quantity])

    def show(self, value: float | None) -> str:
        """The figure as text."""
        return formatting.number(value)

    def show_change(self, value: float | None) -> str:
        """A difference of two figures as text, with its sign."""
        return formatting.plus(value)

    def got_better(self, difference: float) -> bool:
        """Whether a difference after - before is an improvement."""
        return difference < 0 if self.better == "lower" else difference > 0


def quantities(metrics: Iterable[Metric]) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Quantity -> its `units`, of the negative log-likelihood first, which is always there, and of the metrics."""
    return {"nll": Metric().units, **{one.quantity: one.units for one in metrics if one.quantity != "nll"}}

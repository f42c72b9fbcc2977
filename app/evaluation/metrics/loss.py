"""Cross-entropy in nats per prediction."""

from dataclasses import dataclass

from app.evaluation.metrics.base import METRICS, Metric


@METRICS.register("loss")
@dataclass(frozen=True)
class Loss(Metric):
    """Mean negative log-likelihood.

    Args:
        per: what is predicted, in a word.
    """

    per: str = "token"

    label = "loss"

    @property
    def unit(self) -> str:
        return f"nats per {self.per}"

    @property
    def definition(self) -> str:
        return f"total NLL / predicted {self.per}s"

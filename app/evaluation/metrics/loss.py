"""Cross-entropy in nats per predicted token."""

from dataclasses import dataclass

from app.evaluation.metrics.base import METRICS, Metric


@METRICS.register("loss")
@dataclass(frozen=True)
class Loss(Metric):
    """Mean negative log-likelihood."""

    label, unit = "loss", "nats per token"
    definition = "total NLL / predicted tokens"

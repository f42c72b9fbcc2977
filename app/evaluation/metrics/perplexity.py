"""Perplexity: exp(total NLL / predicted tokens)."""

import math
from dataclasses import dataclass

from app.evaluation.metrics.base import METRICS, Metric


@METRICS.register("perplexity")
@dataclass(frozen=True)
class Perplexity(Metric):
    """Perplexity per token; the interval of a change holds the perplexity before at its measured value."""

    label, relative = "perplexity", True
    definition = "exp(total NLL / predicted tokens)"

    def of(self, mean: float, bytes_per_token: float | None = None) -> float:
        return exp(mean)

    def moved(self, mean: float, difference: float, bytes_per_token: float | None = None) -> float:
        return exp(mean) * (exp(difference) - 1)


def exp(nats: float) -> float:
    """`math.exp`, infinite where that would overflow."""
    return math.exp(nats) if nats < 700 else math.inf

"""Metrics of quality, one a file; importing this package fills the registry `METRICS`."""

from app.evaluation.metrics.accuracy import Accuracy
from app.evaluation.metrics.base import METRICS, Metric, quantities
from app.evaluation.metrics.bits_per_byte import BitsPerByte
from app.evaluation.metrics.confusion import MacroF1, MatthewsCorrelation
from app.evaluation.metrics.loss import Loss
from app.evaluation.metrics.perplexity import Perplexity

__all__ = [
    "METRICS",
    "Accuracy",
    "BitsPerByte",
    "Loss",
    "MacroF1",
    "MatthewsCorrelation",
    "Metric",
    "Perplexity",
    "quantities",
]

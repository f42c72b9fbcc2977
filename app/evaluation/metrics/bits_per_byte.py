"""Bits per byte: the loss divided by ln 2 and by the UTF-8 bytes of a token, comparable across tokenizers."""

import math
from dataclasses import dataclass

from app.evaluation.metrics.base import METRICS, Metric


@METRICS.register("bits_per_byte")
@dataclass(frozen=True)
class BitsPerByte(Metric):
    """Bits per UTF-8 byte of the text."""

    label = "bits per byte"

    def of(self, mean: float, bytes_per_token: float | None = None) -> float | None:
        return mean / math.log(2) / bytes_per_token if bytes_per_token else None

"""Confidence intervals for a mean over tokens that are not independent.

Tokens of one document share topic, style and context, so an interval that counts tokens is several times too narrow.
Every interval here is taken over *clusters* (documents, or blocks where there are too few documents):

    m = sum_c s_c / sum_c n_c                                        s_c: summed value of cluster c, n_c: its tokens
    var(m) = C / (C - 1) * sum_c (s_c - m n_c)^2 / (sum_c n_c)^2     (linearised ratio estimator, Cochran,
                                                                     Sampling Techniques, 1977, section 6.4)
    m +- t(0.975, C - 1) * sqrt(var(m))

It says how far the figure would move on other text of the same kind. A paired interval is the same formula on the
differences s_c(after) - s_c(before): whatever makes a document easy or hard for both models cancels.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % confidence interval; `low` and `high` are NaN where too little is left to see a spread."""

    value: float
    low: float
    high: float

    def map(self, function) -> "Interval":
        """The interval of an increasing function of the figure, for example `math.exp` for a perplexity."""
        return Interval(function(self.value), function(self.low), function(self.high))

    @property
    def beyond_noise(self) -> bool:
        """Whether zero lies outside the interval. False where there is no interval."""
        return self.low > 0 or self.high < 0


def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution, within 0.2 % from four degrees of freedom on.

    Exact for one and two degrees of freedom; otherwise the Cornish-Fisher expansion (Abramowitz and Stegun, 26.7.5).
    """
    if freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom == 2:
        return (2 * probability - 1) * math.sqrt(2 / (4 * probability * (1 - probability)))
    z, v = NormalDist().inv_cdf(probability), freedom
    series = (
        (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )
    return z + series


def cluster_mean(sums: np.ndarray, counts: np.ndarray, level: float = LEVEL) -> Interval:
    """Mean per token and its interval, from the summed values (C,) and the token counts (C,) of C clusters."""
    sums, counts = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    total, clusters = counts.sum(), len(counts)
    mean = float(sums.sum() / total)
    if clusters < 2:
        return Interval(mean, math.nan, math.nan)
    variance = clusters / (clusters - 1) * float(np.square(sums - mean * counts).sum()) / total**2
    half = t_quantile(0.5 + level / 2, clusters - 1) * math.sqrt(variance)
    return Interval(mean, mean - half, mean + half)


def ratio_of_rounds(before: Sequence[float], after: Sequence[float], level: float = LEVEL) -> Interval:
    """Median of after/before over interleaved rounds, with a distribution-free interval between two order statistics.

    Round i of both was measured back to back, so that a machine that slows down or speeds up takes both along; a round
    that was disturbed moves neither the median nor, from nine rounds on, the interval. The interval from the k-th
    smallest to the k-th largest of n ratios covers the median with probability 1 - 2 P(Binomial(n, 1/2) < k): k is the
    largest that keeps it at `level` or above. Fewer than six rounds cannot reach 95 %: no interval.
    """
    ratios = sorted(b / a for a, b in zip(before, after, strict=True))
    middle, count = statistics.median(ratios), len(ratios)
    best = 0
    while 1 - 2 * sum(math.comb(count, i) for i in range(best + 1)) / 2**count >= level:
        best += 1
    return Interval(middle, ratios[best - 1], ratios[-best]) if best else Interval(middle, math.nan, math.nan)

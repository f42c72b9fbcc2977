"""Intervals: against tables, against brute force, and by how often they cover the truth."""

import math

import numpy as np
import pytest

from app.evaluation.intervals import cluster_mean, ratio_of_rounds, t_quantile


@pytest.mark.parametrize(
    ("freedom", "table"),
    [
        (1, 12.7062),
        (2, 4.30265),
        (4, 2.77645),
        (5, 2.57058),
        (9, 2.26216),
        (19, 2.09302),
        (99, 1.98422),
        (10**6, 1.95997),
    ],
)
def test_t_quantile_equals_the_tables(freedom, table):
    assert t_quantile(0.975, freedom) == pytest.approx(table, rel=2e-3)


def test_one_token_clusters_give_the_textbook_interval():
    values = np.array([1.0, 2.0, 4.0, 7.0, 11.0])
    interval = cluster_mean(values, np.ones(5))
    half = 2.77645 * values.std(ddof=1) / math.sqrt(5)
    assert interval.value == 5.0
    assert interval.high - interval.value == pytest.approx(half, rel=2e-3)


def test_a_single_cluster_has_a_mean_and_no_interval():
    interval = cluster_mean(np.array([6.0]), np.array([3]))
    assert interval.value == 2.0
    assert math.isnan(interval.low)
    assert not interval.beyond_noise


def documents(random, count, effect):
    """Paired NLL sums of documents: a shared difficulty, an own effect of the change on each, and noise per token."""
    sizes = random.integers(20, 200, count)
    difficulty = random.normal(4.0, 0.6, count)
    before, after = np.empty(count), np.empty(count)
    for i, size in enumerate(sizes):
        tokens = random.gamma(2.0, 0.5, size) + difficulty[i]
        before[i] = tokens.sum()
        after[i] = (tokens + random.normal(effect + random.normal(0, 0.05), 0.3, size)).sum()
    return before, after, sizes


def test_the_paired_interval_covers_the_truth_about_95_times_in_100():
    random = np.random.default_rng(3)
    covered, width, unpaired = 0, 0.0, 0.0
    for _ in range(1000):
        before, after, sizes = documents(random, 30, effect=0.02)
        interval = cluster_mean(after - before, sizes)
        covered += interval.low <= 0.02 <= interval.high
        width += interval.high - interval.low
        own = cluster_mean(after, sizes)
        unpaired += own.high - own.low
    assert 0.925 <= covered / 1000 <= 0.975
    assert width < unpaired / 5  # the shared difficulty cancels


def test_an_interval_over_tokens_would_be_far_too_narrow():
    """Why clusters: the same simulation, counting every token as independent, misses the truth most of the time."""
    random = np.random.default_rng(4)
    covered = {"clusters": 0, "tokens": 0}
    for _ in range(300):
        sizes = random.integers(20, 200, 30)
        difficulty = random.normal(4.0, 0.6, 30)
        tokens = [random.normal(mean, 0.5, size) for mean, size in zip(difficulty, sizes, strict=True)]
        by_cluster = cluster_mean(np.array([part.sum() for part in tokens]), sizes)
        flat = np.concatenate(tokens)
        by_token = cluster_mean(flat, np.ones_like(flat))
        for name, interval in (("clusters", by_cluster), ("tokens", by_token)):
            covered[name] += interval.low <= 4.0 <= interval.high
    assert covered["clusters"] > 270
    assert covered["tokens"] < 150


def test_the_ratio_of_rounds_survives_a_disturbed_round_and_a_drift():
    drift = np.linspace(1.0, 0.5, 10)  # the machine gets slower by half
    random = np.random.default_rng(0)
    before = 100 * drift * random.normal(1, 0.01, 10)
    after = 130 * drift * random.normal(1, 0.01, 10)
    after[4] /= 20  # somebody else took the machine for a round
    ratio = ratio_of_rounds(before, after)
    assert ratio.value == pytest.approx(1.3, rel=0.02)
    assert 1.25 < ratio.low < ratio.high < 1.36


def test_order_statistics_interval_of_ten_rounds_covers_the_median():
    random = np.random.default_rng(5)
    covered = 0
    for _ in range(2000):
        interval = ratio_of_rounds(np.ones(10), np.exp(random.standard_cauchy(10) * 0.05))
        covered += interval.low <= 1.0 <= interval.high
    assert covered / 2000 >= 0.95


@pytest.mark.parametrize("rounds", [1, 3, 5])
def test_too_few_rounds_give_no_interval(rounds):
    ratio = ratio_of_rounds([1.0] * rounds, [2.0] * rounds)
    assert ratio.value == 2.0
    assert math.isnan(ratio.low)

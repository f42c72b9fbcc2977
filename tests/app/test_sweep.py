"""The statistics of a sweep, and blocks that overlap."""

import math

import pytest
import torch

from app.evaluation.metrics import Perplexity
from app.evaluation.quality import IGNORED, evaluate_quality
from app.evaluation.sweep import Sliding, differences, extrapolation, mean_over_seeds, outcome, table
from models.config import ModelConfig
from models.transformer import Transformer


def run(loss, parameters=10):
    sizes = {"parameters": parameters, "active_parameters": parameters // 2, "flops_per_token": 99}
    figures = {"losses": {"8": {"blocks": loss, "sliding": loss - 0.1}}, "tokens_per_second": 1234.0}
    return figures | sizes


def halves(count=5, half=4):
    tokens = torch.arange(count * half + 1)
    return [
        {
            "tokens": tokens[i * half : i * half + half],
            "targets": tokens[i * half + 1 : i * half + half + 1],
            "documents": torch.full((half,), int(i > 2)),
            "ids": torch.zeros(2),
        }
        for i in range(count)
    ]


def test_overlapping_blocks_predict_every_token_once():
    blocks = list(Sliding(halves()))
    targets = torch.cat([block["targets"] for block in blocks])
    assert targets[targets != IGNORED].tolist() == list(range(1, 21))
    assert all(len(block["tokens"]) == 8 for block in blocks)
    assert blocks[1]["tokens"].tolist() == list(range(8))
    assert blocks[0]["documents"].tolist() == [-1] * 4 + [0] * 4


def test_overlap_is_context_that_helps_to_predict():
    torch.manual_seed(0)
    spec = {"vocab_size": 40, "width": 16, "depth": 1, "attention": {"kind": "full", "heads": 2}}
    model = Transformer(ModelConfig.from_dict(spec | {"feedforward": {"kind": "mlp", "width": 16}})).eval()
    parts = halves()
    whole = {name: torch.cat([part[name] for part in parts[:2]]) for name in ("tokens", "targets", "documents")}
    together, first = evaluate_quality(model, [whole]), evaluate_quality(model, [parts[0]])
    sliding = evaluate_quality(model, Sliding(parts[:2]))
    assert sliding.tokens == 8
    # the second half is predicted behind the first, as in one block; the first half stands alone, as in the other
    assert sliding.sums["nll"].sum() == pytest.approx(together.sums["nll"].sum(), rel=1e-5)
    assert sliding.sums["nll"][0] == pytest.approx(first.sums["nll"][0], rel=1e-5)


def test_the_interval_is_students():
    found = mean_over_seeds([1.0, 2.0, 3.0])
    assert found.value == 2.0
    assert found.high - 2.0 == pytest.approx(4.303 / math.sqrt(3), rel=1e-3)
    assert math.isnan(mean_over_seeds([1.0]).low)


def test_a_variant_is_compared_seed_by_seed():
    baseline = [run(3.0), run(4.0), run(5.0)]
    better = outcome("order", "other", [run(2.9), run(3.91), run(4.89)], baseline, Perplexity())
    assert better.difference.value == pytest.approx(-0.1)
    assert better.difference.beyond_noise  # though the seeds differ ten times as much
    text = table([better], outcome("", "base", baseline, baseline, Perplexity()))
    assert "| order | other | 10 (5 active) | 99 FLOP | 1,234 | 49.4" in text
    assert "[\u22120.125, \u22120.075]" in text
    assert "8 tokens" in extrapolation([better])
    drawn = differences([better], outcome("", "base", baseline, baseline, Perplexity())).svg()
    assert "other" in drawn

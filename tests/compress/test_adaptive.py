"""Compression of models that spend less on some tokens: mixture-of-depths and early exits."""

import copy

import pytest
import torch

from compress.calibration.records import LayerRecord
from compress.calibration.sequential import LayerMethod, calibrate_sequentially
from compress.pruning.structured.sequential import prune_structured
from compress.quantization.affine import IntFormat
from compress.quantization.methods.gptq import Gptq
from compress.quantization.methods.rtn import Rtn
from compress.quantization.plan import quantize_model
from models.checkpoint import load, save_model, writing
from models.config import ModelConfig
from models.transformer import Transformer

ADAPTIVE = {"depths": [None, {"kind": "mixture_of_depths", "capacity": 0.5}], "exits": {"layers": [1], "weight": 0.3}}


def build(**changes):
    torch.manual_seed(0)
    values = {
        "width": 64,
        "depth": 2,
        "vocab_size": 96,
        "context": 64,
        "attention": {"kind": "full", "heads": 4, "kv_heads": 2},
        "feedforward": {"kind": "swiglu", "width": 112},
    }
    return Transformer(ModelConfig.from_dict(values | ADAPTIVE | changes)).eval()


def batches(count=3, rows=4, length=40):
    generator = torch.Generator().manual_seed(7)
    return [{"tokens": torch.randint(0, 96, (rows, length), generator=generator)} for _ in range(count)]


def logits(model, data):
    with torch.no_grad():
        return torch.cat([model(batch["tokens"]).logits for batch in data])


class Counted:
    """A statistic that keeps the vectors that it gets."""

    def __init__(self, width, device):
        self.rows = []

    def update(self, x):
        self.rows.append(x.clone())

    def finite(self):
        return True


class Watching(LayerMethod):
    """Changes nothing, and keeps what every map read."""

    def __init__(self):
        self.read = {}

    def statistic(self, name, module):
        return Counted if isinstance(module, torch.nn.Linear) else None

    def compress(self, name, module, statistic):
        self.read[name] = None if statistic is None else torch.cat(statistic.rows)
        return None, LayerRecord.skip(name, tuple(module.weight.shape), "watched", {})


def test_calibration_sees_the_tokens_that_take_part_and_no_others():
    model, data, method = build(), batches(), Watching()
    data[0]["documents"] = torch.zeros_like(data[0]["tokens"])
    data[0]["documents"][:2, 25:] = -1
    calibrate_sequentially(model, method, data)
    block, read = model.blocks[1], {"attention.q": [], "feedforward.down": []}
    for batch in data:
        documents = batch.get("documents", torch.zeros_like(batch["tokens"]))
        with torch.no_grad():
            x = model(batch["tokens"], documents=batch.get("documents"), taps=["blocks.0"]).taps["blocks.0"]
        chosen = (block.depth.logits(x) > block.depth.threshold) & (documents >= 0)
        read["attention.q"].append(block.attention_norm(x[chosen]))
    expected = torch.cat(read["attention.q"])
    assert 0 < len(expected) < sum(batch["tokens"].numel() for batch in data)
    torch.testing.assert_close(method.read["blocks.1.attention.q"], expected)
    assert len(method.read["blocks.1.feedforward.down"]) == len(expected)
    assert len(method.read["blocks.0.attention.q"]) == sum(batch["tokens"].numel() for batch in data) - 2 * 15


@pytest.mark.parametrize("method", [Rtn(IntFormat(8, "channel")), Gptq(IntFormat(8, "channel"))], ids=["rtn", "gptq"])
def test_a_quantized_model_is_near_the_dense_one_and_survives_the_disk(tmp_path, method):
    model, data = build(), batches()
    before = logits(model, data)
    records = quantize_model(model, method, data if isinstance(method, Gptq) else None)
    assert {record.name for record in records} >= {"blocks.1.attention.q", "blocks.1.feedforward.down"}
    (router,) = (record for record in records if "depth" in record.name)
    assert router.skipped  # it is no matrix, and the reason stands there
    after = logits(model, data)
    assert 0 < (after - before).abs().mean() < 0.1 * before.abs().mean()
    with writing(tmp_path / "model") as target:
        save_model(model, target)
    torch.testing.assert_close(logits(load(tmp_path / "model"), data), after)


@pytest.mark.parametrize("targets", [["neurons"], ["heads"], ["neurons", "groups"]], ids=str)
def test_a_pruned_model_is_smaller_and_routes_as_before(tmp_path, targets):
    model, data = build(), batches()
    dense = copy.deepcopy(model)
    prune_structured(model, targets, 0.5, "variance", data)
    assert model.count_parameters()["total"] < dense.count_parameters()["total"]
    assert model.config.layers[1].depth == dense.config.layers[1].depth
    assert model.config.exits == dense.config.exits
    for name in ("weight", "threshold"):
        assert torch.equal(getattr(model.blocks[1].depth, name), getattr(dense.blocks[1].depth, name))
    after = logits(model, data)
    assert model.blocks[1].depth.kept.any()
    with writing(tmp_path / "model") as target:
        save_model(model, target)
    torch.testing.assert_close(logits(load(tmp_path / "model"), data), after)

"""A model with experts through the stages: quantize, prune, distill in both directions, inspect, export."""

import json

import pytest
import torch
import yaml

import models.checkpoint
from models.config import ModelConfig
from models.transformer import Transformer
from tests.recipes.conftest import ARCHITECTURE, QUICK

MIXTURE = {"kind": "experts", "count": 4, "top_k": 2, "expert": {"kind": "swiglu", "width": 64}}


@pytest.fixture(scope="module")
def mixture(tokenizer, tmp_path_factory):
    """A folder of a model with experts and random weights."""
    torch.manual_seed(0)
    config = ARCHITECTURE | {"depth": 2, "vocab_size": tokenizer.vocab_size, "feedforward": MIXTURE}
    path = tmp_path_factory.mktemp("mixture") / "mixture"
    with models.checkpoint.writing(path) as target:
        models.checkpoint.save_model(Transformer(ModelConfig.from_dict(config)), target)
        tokenizer.save(target)
    return path


def layers_of(out):
    report = json.loads((out / "report.json").read_text())
    assert report["after"]["quality"]["perplexity"] < 1e4
    return {layer["name"]: layer for layer in report["layers"]}


def test_experts_are_quantized_inspected_and_exported(mixture, espalier, tmp_path):
    out = tmp_path / "gptq"
    how = ["--method", "gptq", "--bits", 4, "--group_size", 32, "--samples", 2, "--minimum_tokens", 96]
    status, output = espalier("quantize", mixture, "--out", out, *QUICK, *how)
    assert status == 0, output.err
    layers = layers_of(out)
    for expert in range(4):
        assert layers[f"blocks.1.feedforward.experts.{expert}.up"]["achieved"]["tokens"] >= 96
    assert layers["blocks.0.feedforward.router.projection"]["skipped"]
    assert "router that chooses the experts" in layers["blocks.0.feedforward.router.projection"]["note"]
    status, output = espalier("inspect", out)
    assert status == 0, output.err
    assert "blocks.1.feedforward.experts.3.down" in output.out
    status, output = espalier("export", out, "--out", tmp_path / "hf")
    assert status == 0, output.err
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "mixtral"


def test_experts_are_pruned_and_stay_one_stack(mixture, espalier, tmp_path):
    out = tmp_path / "pruned"
    how = ["--method", "structured", "--targets", "experts,neurons", "--ratio", 0.25, "--samples", 2]
    status, output = espalier("prune", mixture, "--out", out, *QUICK, *how)
    assert status == 0, output.err
    feedforward = models.checkpoint.read_config(out).layers[0].feedforward
    assert (feedforward.count, feedforward.expert.width, feedforward.layout) == (3, 48, "stacked")
    assert layers_of(out)["blocks.0.feedforward.experts.0.up"]["achieved"]["experts"] == [4, 3]


@pytest.mark.slow
def test_a_dense_teacher_is_distilled_into_experts_and_back(mixture, teacher, espalier, tmp_path):
    architecture = tmp_path / "student.yaml"
    architecture.write_text(yaml.safe_dump(ARCHITECTURE | {"depth": 2, "feedforward": MIXTURE}))
    short = ["--max_steps", 2, "--train_batch_size", 4, "--warmup_steps", 0, "--losses", "logit,feature"]
    out = tmp_path / "student"
    how = ["--teacher", teacher, "--student", architecture, "--initialization", "upcycled"]
    status, output = espalier("distill", *how, "--out", out, *QUICK, *short)
    assert status == 0, output.err
    assert models.checkpoint.read_config(out).layers[0].feedforward.kind == "experts"
    architecture.write_text(yaml.safe_dump(ARCHITECTURE | {"depth": 2}))
    how = ["--teacher", out, "--student", architecture]
    status, output = espalier("distill", *how, "--out", tmp_path / "dense", *QUICK, *short)
    assert status == 0, output.err
    assert models.checkpoint.read_config(tmp_path / "dense").layers[0].feedforward.kind == "swiglu"

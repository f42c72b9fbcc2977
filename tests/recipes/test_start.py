"""Training that starts from a model: other options, a longer context, a pruned model, and stages in a row."""

import pytest
import yaml

import models
from app.loading import Loaded, load_model
from app.tasks.causal_lm import CausalLM
from app.tasks.start import starting_architecture
from compress.pruning.masks import count_violations, masks_of
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer
from recipes.commands.pipeline import read_pipeline
from tests.recipes.conftest import QUICK

RECIPE = {
    "data": {"source": "synthetic", "sequence_length": 64, "batch_size": 8},
    "trainer": {"max_steps": 4, "accelerator": "cpu", "enable_progress_bar": False, "limit_val_batches": 0},
    "checkpoint": {"monitor": None},
}
WINDOWED = {
    "vocab_size": 40,
    "width": 16,
    "depth": 4,
    "context": 32,
    "position": {"kind": "rope", "base": 500.0},
    "attention": {"near": {"kind": "window", "heads": 2, "window": 8}, "far": {"kind": "full", "heads": 2}},
    "layers": ["near", "far"],
    "feedforward": {"kind": "swiglu", "width": 24},
}


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path / "recipe.yaml"


def started(changes):
    start = Loaded(Transformer(ModelConfig.from_dict(WINDOWED)), None, None)
    return ModelConfig.from_dict(starting_architecture(changes, start, CausalLM()))


def test_options_without_a_kind_change_the_layers_that_have_them():
    config = started({"context": 64, "attention": {"window": 16}})
    assert [getattr(layer.attention, "window", None) for layer in config.layers] == [16, None, 16, None]
    assert config.context == 64
    yarn = {"kind": "yarn", "factor": 2.0, "original_context": 32}
    position = started({"position": {"scaling": yarn}}).position
    assert (position.base, position.scaling.factor) == (500.0, 2.0)
    assert started({"position": {"kind": "rope"}}).position.base == 10000.0
    assert {layer.feedforward.bias for layer in started({"feedforward": {"bias": True}}).layers} == {True}
    assert len(started({}).layers) == 4
    with pytest.raises(UserError, match=r"model\.architecture\.attention: no layer of model\.from has window, heeds"):
        started({"attention": {"window": 16, "heeds": 2}})
    with pytest.raises(UserError, match="cannot stand beside a full list"):
        started({"attention": {"kind": "full", "heads": 2}})


def test_an_imported_model_goes_on_with_a_longer_context(teacher, recipe, espalier, tmp_path):
    status, output = espalier("export", teacher, "--out", tmp_path / "hf")
    assert status == 0, output.err
    scaling = ("--model.architecture.position.scaling", "{kind: yarn, factor: 2.0, original_context: 64}")
    longer = ("--model.architecture.context", 128, "--data.sequence_length", 128, *scaling)
    status, output = espalier("fit", "-c", recipe, "--model.from", tmp_path / "hf", *longer, "--out", tmp_path / "out")
    assert status == 0, output.err
    config = models.load(tmp_path / "out").config
    assert (config.context, config.position.scaling.kind) == (128, "yarn")
    assert config.layers == models.load(teacher).config.layers


@pytest.mark.parametrize("optimizer", ["AdamW", "Muon"])
def test_zeros_of_a_pruned_start_stay_zero(optimizer, teacher, recipe, espalier, tmp_path):
    argv = ("prune", teacher, "--method", "magnitude", "--pattern", "2:4", "--out", tmp_path / "sparse", *QUICK)
    assert espalier(*argv)[0] == 0
    masks = masks_of(models.load(tmp_path / "sparse"))
    fit = ("fit", "-c", recipe, "--model.from", tmp_path / "sparse", "--model.optimizer.class_path", optimizer)
    status, output = espalier(*fit, "--out", tmp_path / "held")
    assert status == 0, output.err
    assert f"the zeros of {len(masks)} matrices" in output.err
    held = load_model(str(tmp_path / "held")).model
    assert masks
    assert count_violations(held, masks) == 0
    assert any((held.get_parameter(n) != models.load(tmp_path / "sparse").get_parameter(n)).any() for n in masks)
    assert espalier(*fit, "--model.zeros", "free", "--out", tmp_path / "free")[0] == 0
    assert count_violations(models.load(tmp_path / "free"), masks) > 0


def test_a_pipeline_goes_on_from_the_stage_before(teacher, recipe, espalier, tmp_path):
    more = {"stage": "pretrain", "config": str(recipe)}
    longer = {"model.architecture.context": 128, "data.sequence_length": 128}
    stages = [more | {"name": "first"}, more | longer | {"name": "second"}]
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump({"common": {"data": "synthetic"}, "stages": stages}))
    first, second = read_pipeline(tmp_path / "pipeline.yaml", tmp_path / "out", teacher, "cpu")
    assert f"--model.from={teacher}" in first.options
    assert f"--model.from={tmp_path / 'out' / '01-first'}" in second.options
    assert str(teacher) in " ".join(map(str, first.inputs))
    assert [str(one) for one in second.inputs] == ["the text synthetic"]
    argv = ("run", tmp_path / "pipeline.yaml", "--model", teacher, "--out", tmp_path / "out", "--device", "cpu")
    status, output = espalier(*argv)
    assert status == 0, output.err
    assert models.load(tmp_path / "out" / "model").config.context == 128

"""The recipes that come with Espalier: every key is known and explained, and the pipelines can be read."""

import re
from pathlib import Path

import pytest
import torch
import yaml

import models
from models.config import ModelConfig
from models.transformer import Transformer
from recipes.cli import main
from recipes.commands import options
from recipes.commands.parser import parse_arguments
from recipes.commands.pipeline import read_pipeline

ROOT = Path(__file__).parents[2] / "recipes"
OPTIONS = {"quantize": options.Quantize, "prune": options.Prune, "distill": options.Distill}
RECIPES = [path for verb in OPTIONS for path in sorted((ROOT / verb).glob("*.yaml"))]
PIPELINES = sorted((ROOT / "pipeline").glob("*.yaml"))
EVERY = sorted(ROOT.glob("*/*.yaml"))


def named(path):
    return f"{path.parent.name}/{path.name}"


def arguments(verb, tmp_path):
    model = ["--teacher", "t", "--student_layers", "2"] if verb == "distill" else ["m"]
    return [*model, "--out", str(tmp_path / "o")]


@pytest.mark.parametrize("path", RECIPES, ids=named)
def test_recipe_is_accepted(path, tmp_path):
    verb = path.parent.name
    parse_arguments(verb, OPTIONS[verb], ["-c", str(path), *arguments(verb, tmp_path)])


@pytest.mark.parametrize("path", EVERY, ids=named)
def test_every_key_has_a_comment(path):
    keys = [line for line in path.read_text().splitlines() if re.match(r"\s*(- )?[a-z_]+:", line)]
    assert keys
    assert [line for line in keys if not re.search(r"\s#\s*\S", line)] == []


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.name)
def test_pipeline_can_be_read(path, tmp_path):
    steps = read_pipeline(path, tmp_path, None, "cpu")
    assert len(steps) > 1


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("moe-quickstart", 10_163_456, 5_408_000),
        ("mixtral-8x150m", 690_973_440, 223_832_832),
        ("glam-64e", 1_907_612_928, 152_296_704),
    ],
)
def test_recipes_with_experts_are_as_large_as_they_say_and_train(name, total, active, tmp_path):
    recipe = yaml.safe_load((ROOT / "pretrain" / f"{name}.yaml").read_text())
    architecture = recipe["model"]["architecture"]
    sizes = {"vocab_size": recipe["data"]["vocab_size"], "context": recipe["data"]["sequence_length"]}
    with torch.device("meta"):
        counts = Transformer(ModelConfig.from_dict(sizes | architecture)).count_parameters()
    assert (counts["total"], counts["active"]) == (total, active)
    tiny = shrunk(architecture) | {"width": 48, "depth": 2, "context": 32}
    recipe["model"] |= {"architecture": tiny, "compile": None}
    recipe["data"] |= {"source": "synthetic", "sequence_length": 32, "batch_size": 4, "vocab_size": 300, "workers": 0}
    recipe["trainer"] |= {"accelerator": "cpu", "max_steps": 2, "val_check_interval": 2, "limit_val_batches": 1}
    recipe["trainer"]["accumulate_grad_batches"] = 1
    recipe["model"]["schedule"]["init_args"]["warmup_steps"] = 1
    recipe["samples"] = {"prompts": [""], "max_new_tokens": 4}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["fit", "-c", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "model")]) == 0
    assert models.load(tmp_path / "model").count_parameters()["active"] < 10**5


def shrunk(values):
    """The same architecture with feed-forwards of 16 neurons."""
    if isinstance(values, dict):
        return {key: 16 if (key, type(value)) == ("width", int) else shrunk(value) for key, value in values.items()}
    return [shrunk(value) for value in values] if isinstance(values, list) else values


def test_there_are_recipes():
    assert len(RECIPES) >= 8
    assert len(EVERY) >= len(RECIPES) + 6
    assert PIPELINES

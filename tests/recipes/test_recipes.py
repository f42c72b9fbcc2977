"""The recipes that come with Espalier: every key is known and explained, and the pipelines can be read."""

import re
from pathlib import Path

import pytest

from recipes.stages import options
from recipes.stages.parser import parse_arguments
from recipes.stages.pipeline import read_pipeline

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
    steps = read_pipeline(path, tmp_path, tmp_path / "model" if path.name != "quickstart.yaml" else None, "cpu")
    assert len(steps) > 1


def test_there_are_recipes():
    assert len(RECIPES) >= 8
    assert len(EVERY) >= len(RECIPES) + 6
    assert PIPELINES

"""Values of options, in a recipe as in a pipeline, are of their type, finite and in their range before any work."""

import dataclasses
import json
import math

import pytest

from models.errors import UserError
from recipes import cli
from recipes.commands.parser import parse_arguments, parse_sources
from recipes.commands.pipeline import read_pipeline

VERBS = {verb.target.partition(":")[0].rpartition(".")[2]: verb.options for verb in cli.VERBS.values() if verb.options}
FIELDS = {  # what verbs share is tried once
    (field.name, str(field.type)): (verb, field)
    for verb, kind in VERBS.items()
    for field in dataclasses.fields(kind)
    if not field.metadata.get("nargs")  # these stand on the command line alone
}.values()
NAMES = [f"{verb}-{field.name}" for verb, field in FIELDS]


def given(kind):
    """The options that must be given."""
    missing = dataclasses.MISSING
    must = [field for field in dataclasses.fields(kind) if field.default is field.default_factory is missing]
    return {field.name: ["x"] if field.type == list[str] else "x" for field in must}


def read(verb, name, value):
    kind = VERBS[verb]
    return parse_sources(verb, kind, [(given(kind) | {name: value}, "here")])


@pytest.mark.parametrize(("verb", "field"), FIELDS, ids=NAMES)
def test_any_value_is_taken_or_refused(verb, field, tmp_path):
    for value in (None, [], -1, math.nan, 10**40, {"x": math.inf}):
        try:
            chosen = read(verb, field.name, value)
        except UserError as error:
            assert field.name in str(error)  # noqa: PT017
            continue
        if value is None:
            assert getattr(chosen, field.name) is None
            assert field.default is None  # what may be nothing is nothing by itself
        assert not isinstance(value, float | dict)
        assert value != 10**40 or isinstance(getattr(chosen, field.name), str | float)
        least = field.metadata.get("least")
        if least is not None and isinstance(value, int | float):
            assert value >= least


@pytest.mark.parametrize(
    ("verb", "name"),
    [
        ("quantize", "speed_rounds"),
        ("evaluate", "batch_size"),
        ("distill", "train_batch_size"),
        ("distill", "max_steps"),
        ("sweep", "parallel"),
        ("generate", "max_new_tokens"),
    ],
)
def test_what_would_never_end_or_fit_is_refused(verb, name):
    with pytest.raises(UserError, match=f"{name} is 1000000000; it must be at most"):
        read(verb, name, 10**9)


@pytest.mark.parametrize("verb", ["quantize", "prune", "distill"])
def test_null_in_a_recipe_is_refused(verb, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: null\n")
    model = ["--teacher", "x"] if verb == "distill" else ["x"]
    with pytest.raises(UserError, match=r"recipe\.yaml: seed must be a whole number, not null"):
        parse_arguments(verb, VERBS[verb], [*model, "--out", "y", "-c", str(recipe)])
    recipe.write_text("a: &a [*a]\n")
    with pytest.raises(UserError, match="contains itself"):
        parse_arguments(verb, VERBS[verb], [*model, "--out", "y", "-c", str(recipe)])


@pytest.mark.parametrize("key", ["common", "stages", "stage", "name", "config", "bits", "seed", "layers", "skip"])
def test_a_pipeline_of_any_values_is_read_or_refused(key, tmp_path):
    for value in (
        None,
        [],
        {},
        "",
        "x",
        0,
        -1,
        1.5,
        math.nan,
        [None],
        {"x": None},
        {1: 2},
        [[]],
        "../x",
        "a/b",
        ".",
        "..",
    ):
        values = {"common": {"data": "python"}, "stages": [{"stage": "quantize", "model": "x"}]}
        if key in values:
            values[key] = value
        else:
            values["stages"][0][key] = value
        path = tmp_path / "pipeline.yaml"
        path.write_text(json.dumps(values))
        try:
            steps = read_pipeline(path, tmp_path / "out", None, "cpu")
        except UserError:
            continue
        assert all(step.out.parent == tmp_path / "out" and step.out.name[:3] == "01-" for step in steps)

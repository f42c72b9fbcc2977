"""The arguments of fit before the parser: recipes, architecture on the command line, aliases, unknown keys."""

import json

import pytest
import yaml

from models.errors import UserError
from recipes.fit_arguments import changed, check_keys, prepare, trusting

KEYS = {
    *(
        "seed_everything",
        "out",
        "overwrite",
        "ckpt_path",
        "model.architecture",
        "model.optimizer",
        "model.compute_dtype",
    ),
    *("data.source", "data.seed", "data.sequence_length", "trainer.max_steps", "trainer.accelerator"),
}


@pytest.fixture
def recipe(tmp_path):
    def write(**values):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    return write


def architecture(arguments):
    (found,) = [argument for argument in arguments if argument.startswith("--model.architecture=")]
    return json.loads(found.partition("=")[2])


def test_sub_keys_of_the_architecture_win_over_the_recipe(recipe):
    path = recipe(model={"architecture": {"width": 256, "attention": {"kind": "full", "heads": 4}, "position": "rope"}})
    arguments = prepare(
        "fit",
        ["--model.architecture.width", "512", "-c", path, "--model.architecture.attention.heads=8",
         "--model.architecture.position.base", "5e5", "--model.architecture.layers", "[a/b, c/d]"],
        KEYS,
    )  # fmt: skip
    assert arguments[0] == f"--config={path}"
    assert architecture(arguments) == {
        "width": 512,
        "attention": {"kind": "full", "heads": 8},
        "position": {"kind": "rope", "base": 500000.0},
        "layers": ["a/b", "c/d"],
    }


def test_a_preset_can_be_changed_in_part():
    arguments = prepare("fit", ["--model.architecture", "gpt2-small", "--model.architecture.depth", "2"], KEYS)
    found = architecture(arguments)
    assert (found["depth"], found["width"]) == (2, 768)


def test_a_preset_alone_stays_a_name():
    assert prepare("fit", ["--model.architecture", "gpt2-small"], KEYS) == ["--model.architecture=gpt2-small"]


def test_the_last_recipe_gives_the_architecture(recipe, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("model: {architecture: {width: 1}}")
    first = recipe(model={"architecture": {"width": 256}})
    assert architecture(prepare("fit", ["-c", first, "-c", str(other)], KEYS)) == {"width": 1}


def test_flags_mean_the_same_as_in_every_verb():
    arguments = prepare(
        "fit",
        ["--data", "text.txt", "--seed", "7", "--device", "cpu", "--dtype", "float32", "--sequence_length", "64",
         "--overwrite"],
        KEYS,
    )  # fmt: skip
    assert arguments == [
        *("--data.source=text.txt", "--seed_everything=7", "--data.seed=7", "--trainer.accelerator=cpu"),
        *("--model.compute_dtype=float32", "--data.sequence_length=64", "--overwrite=true"),
    ]


def test_negative_numbers_are_values():
    assert prepare("fit", ["--trainer.max_steps", "-1"], KEYS) == ["--trainer.max_steps=-1"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--trainer.max_stps", "3"], r"unknown option --trainer\.max_stps \(did you mean max_steps\?\)"),
        (["--max_steps", "3"], r"did you mean trainer\.max_steps"),
        (["--modle.optimizer", "AdamW"], r"unknown option --modle\.optimizer"),
        (["recipe.yaml"], "-c recipe.yaml"),
        (["-c"], "needs the path"),
        (["-c", "/nowhere.yaml"], "no recipe /nowhere.yaml"),
    ],
)
def test_wrong_flags_are_named(argv, message):
    with pytest.raises(UserError, match=message):
        prepare("fit", argv, KEYS)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ckpt_pth": "last"}, r"unknown key 'ckpt_pth' \(did you mean 'ckpt_path'\?\)"),
        ({"model": {"optimzer": {"class_path": "AdamW"}}}, r"'model\.optimzer' \(did you mean 'optimizer'\?\)"),
        ({"max_steps": 3}, r"'max_steps' \(did you mean 'trainer\.max_steps'\?\)"),
        ({"data": {"sorce": "python"}}, r"'data\.sorce' \(did you mean 'source'\?\)"),
    ],
)
def test_wrong_keys_are_named(values, message):
    with pytest.raises(UserError, match=message):
        check_keys(values, KEYS, "recipe.yaml")


def test_below_an_object_everything_is_left_to_the_parser():
    check_keys({"model": {"optimizer": {"class_path": "X", "init_args": {"anything": 1}}}}, KEYS, "recipe.yaml")


def test_changing_leaves_the_original_alone():
    original = {"attention": {"heads": 4}}
    assert changed(original, {"attention.heads": 8}) == {"attention": {"heads": 8}}
    assert original == {"attention": {"heads": 4}}
    with pytest.raises(UserError, match="width is 3 and has no keys"):
        changed({"width": 3}, {"width.x": 1})


def test_only_the_flag_allows_other_classes(monkeypatch):
    monkeypatch.setenv("ESPALIER_TRUST", "1")
    assert not trusting(["-c", "recipe.yaml"])
    assert trusting(["-c", "recipe.yaml", "--trust"])

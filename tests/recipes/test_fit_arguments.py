"""The arguments of fit as one mapping: recipes that merge, architecture on the command line, aliases, unknown keys."""

import pytest
import yaml

from models.errors import UserError
from recipes.cli import main
from recipes.command_line import check_keys, merged
from recipes.fit_arguments import prepare, trusting

KEYS = dict.fromkeys(
    (
        *("seed_everything", "overwrite", "ckpt_path", "model.architecture", "model.optimizer", "model.task"),
        *("model.compute_dtype", "data.seed", "data.sequence_length", "trainer.max_steps", "trainer.accelerator"),
        "trainer.callbacks",
    )
) | {"out": str | None, "data.source": str}


@pytest.fixture
def recipe(tmp_path):
    def write(**values):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)

    return write


def test_sub_keys_of_the_architecture_win_over_the_recipe(recipe):
    path = recipe(model={"architecture": {"width": 256, "attention": {"kind": "full", "heads": 4}, "position": "rope"}})
    values = prepare(
        "fit",
        ["--model.architecture.width", "512", "-c", path, "--model.architecture.attention.heads=8",
         "--model.architecture.position.base", "5e5", "--model.architecture.layers", "[a/b, c/d]"],
        KEYS,
    )  # fmt: skip
    assert values["model"]["architecture"] == {
        "width": 512,
        "attention": {"kind": "full", "heads": 8},
        "position": {"kind": "rope", "base": 500000.0},
        "layers": ["a/b", "c/d"],
    }


def test_a_preset_can_be_changed_in_part():
    values = prepare("fit", ["--model.architecture", "gpt2-small", "--model.architecture.depth", "2"], KEYS)
    found = values["model"]["architecture"]
    assert (found["depth"], found["width"]) == (2, 768)


def test_a_preset_alone_stays_a_name():
    assert prepare("fit", ["--model.architecture", "gpt2-small"], KEYS) == {"model": {"architecture": "gpt2-small"}}


def test_a_second_recipe_merges_into_the_first(recipe, tmp_path):
    """Mappings merge, lists and values are replaced, and another kind or class replaces its mapping."""
    other = tmp_path / "other.yaml"
    first = recipe(
        model={
            "architecture": {
                "width": 256,
                "attention": {"kind": "full", "heads": 4},
                "position": "rope",
                "feedforward": {"kind": "swiglu", "width": 688},
                "layers": ["a", "b"],
            },
            "optimizer": {"class_path": "app.optim.Muon", "init_args": {"lr": 1, "momentum": 2}},
        }
    )
    second = {
        "architecture": {
            "attention": {"heads": 8},
            "position": {"base": 5},
            "feedforward": {"kind": "mlp"},
            "layers": ["c"],
        },
        "optimizer": {"class_path": "Muon", "init_args": {"lr": 3}},
    }
    other.write_text(yaml.safe_dump({"model": second}))
    found = prepare("fit", ["-c", first, "-c", str(other), "--model.optimizer.momentum", "4"], KEYS)["model"]
    assert found["architecture"] == {
        "width": 256,
        "attention": {"kind": "full", "heads": 8},
        "position": {"kind": "rope", "base": 5},
        "feedforward": {"kind": "mlp"},
        "layers": ["c"],
    }
    assert found["optimizer"]["init_args"] == {"lr": 3, "momentum": 4}
    other.write_text("model: {optimizer: {class_path: AdamW}}")
    assert prepare("fit", ["-c", first, "-c", str(other)], KEYS)["model"]["optimizer"] == {"class_path": "AdamW"}


def test_a_second_recipe_changes_a_preset_in_part(recipe, tmp_path):
    other = tmp_path / "other.yaml"
    other.write_text("model: {architecture: {depth: 2}}")
    arguments = ["-c", recipe(model={"architecture": "gpt2-small"}), "-c", str(other)]
    found = prepare("fit", arguments, KEYS)["model"]["architecture"]
    assert (found["depth"], found["width"]) == (2, 768)


def test_a_part_of_a_recipe_in_a_file_of_its_own(tmp_path):
    (tmp_path / "data.yaml").write_text("source: text.txt\n")
    arguments = ["--data.seed", "3", "--data", str(tmp_path / "data.yaml")]
    assert prepare("fit", arguments, KEYS) == {"data": {"seed": "3", "source": "text.txt"}}
    (tmp_path / "data.yaml").write_text("sorce: text.txt\n")
    with pytest.raises(UserError, match=r"data\.yaml: unknown key 'data\.sorce' \(did you mean 'source'"):
        prepare("fit", arguments, KEYS)


def test_flags_mean_the_same_as_in_every_verb():
    values = prepare(
        "fit",
        ["--data", "text.txt", "--seed", "7", "--device", "cpu", "--dtype", "float32", "--sequence_length", "64",
         "--overwrite"],
        KEYS,
    )  # fmt: skip
    assert values == {
        "data": {"source": "text.txt", "seed": "7", "sequence_length": "64"},  # text that the parser reads by its type
        "seed_everything": "7",
        "trainer": {"accelerator": "cpu"},
        "model": {"compute_dtype": "float32"},
        "overwrite": "true",
    }


def test_negative_numbers_are_values():
    assert prepare("fit", ["--trainer.max_steps", "-1"], KEYS) == {"trainer": {"max_steps": "-1"}}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--trainer.max_stps", "3"], r"unknown option --trainer\.max_stps \(did you mean '--trainer\.max_steps'\?\)"),
        (["--max_steps", "3"], r"did you mean '--trainer\.max_steps'"),
        (["--modle.optimizer", "AdamW"], r"unknown option --modle\.optimizer"),
        (["recipe.yaml"], "-c recipe.yaml"),
        (["-c"], "needs the path"),
        (["--out", "--overwrite"], "--out needs a value"),
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


def test_merging_leaves_the_originals_alone():
    before, now = {"attention": {"heads": 4}}, {"attention": {"heads": 8}}
    assert merged(before, now) == now
    assert before == {"attention": {"heads": 4}}


def test_a_name_alone_keeps_the_options_of_the_same_kind():
    chosen = {"kind": "wanda", "pattern": "2:4"}
    assert merged({"method": chosen}, {"method": "wanda"}) == {"method": chosen}
    assert merged({"method": chosen}, {"method": "magnitude"}) == {"method": "magnitude"}


def test_only_the_flag_allows_other_classes(monkeypatch):
    monkeypatch.setenv("ESPALIER_TRUST", "1")
    assert not trusting(["-c", "recipe.yaml"])
    assert trusting(["-c", "recipe.yaml", "--trust"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--help"], "--data.source"),
        (["--model.optimizer.help", "AdamW"], "--model.optimizer.lr"),
        (["-c", "recipes/classify/scratch.yaml", "--print_config"], "validation: null"),
        (["-c", "recipes/classify/finetune.yaml", "--help"], "--data.label"),
    ],
    ids=["help", "help of a class", "the whole recipe", "help of a task's data"],
)
def test_what_is_asked_for_in_place_of_a_run_is_shown(argv, words, capsys):
    assert main(["fit", *argv]) == 0
    assert words in capsys.readouterr().out

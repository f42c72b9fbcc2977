"""`espalier fit|validate|test|predict` as a person runs them."""

import json
import re

import pytest
import yaml

import models
from models.checkpoint import hash_weights

RECIPE = {
    "seed_everything": 1,
    "ckpt_path": "last",
    "model": {
        "architecture": {
            "width": 32,
            "depth": 2,
            "attention": {"kind": "full", "heads": 4, "kv_heads": 2},
            "feedforward": {"kind": "swiglu", "width": 64},
            "dropout": 0.1,
        },
        "optimizer": {"class_path": "Muon", "init_args": {"lr": 0.003}},
        "schedule": {"class_path": "WarmupStableDecay", "init_args": {"warmup_steps": 2}},
        "compute_dtype": "bfloat16",
    },
    "data": {"source": "synthetic", "sequence_length": 32, "batch_size": 8, "vocab_size": 300},
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 6,
        "val_check_interval": 3,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 1,
        "limit_test_batches": 2,
        "limit_predict_batches": 1,
    },
    "checkpoint": {"every_n_steps": 2},
    "samples": {"max_new_tokens": 4},
}


def write(path, **changes):
    """Write the recipe with dotted keys changed (given with __ for the dots)."""
    values = json.loads(json.dumps(RECIPE))
    for dotted, value in changes.items():
        *parents, last = dotted.split("__")
        place = values
        for parent in parents:
            place = place[parent]
        place[last] = value
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def recipe(tmp_path):
    return write(tmp_path / "recipe.yaml")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its recipe and its model folder."""
    from recipes import cli

    folder = tmp_path_factory.mktemp("finished")
    path = write(folder / "recipe.yaml")
    assert cli.main(["fit", "-c", str(path), "--out", str(folder / "model")]) == 0
    return path, folder / "model"


def test_fit_writes_a_model_folder(finished):
    _, out = finished
    assert {path.name for path in out.iterdir()} >= {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "history.json", "README.md")
    }
    assert models.load(out).config.width == 32
    (entry,) = json.loads((out / "history.json").read_text())["stages"]
    assert entry["steps"] == 6
    assert entry["recipe"]["model"]["optimizer"]["init_args"]["momentum"] == 0.95  # resolved: defaults are written down
    assert entry["weights"] == hash_weights(out)
    assert re.fullmatch("[0-9a-f]{64}", entry["data"]["fingerprint"])


def test_the_same_command_again_has_nothing_to_do(finished, espalier):
    path, out = finished
    before = hash_weights(out)
    status, output = espalier("fit", "-c", path, "--out", out)
    assert status == 0
    assert "is complete: 6 steps" in output.err
    assert hash_weights(out) == before


def test_the_same_recipe_elsewhere_gives_the_same_weights(finished, espalier, tmp_path):
    path, out = finished
    assert espalier("fit", "-c", path, "--out", tmp_path / "model")[0] == 0
    assert hash_weights(tmp_path / "model") == hash_weights(out)


def test_more_steps_continue_and_the_difference_is_printed(recipe, espalier, tmp_path):
    out = tmp_path / "model"
    assert espalier("fit", "-c", recipe, "--out", out, "--trainer.max_steps", 4)[0] == 0
    status, output = espalier("fit", "-c", recipe, "--out", out, "--model.optimizer.lr", 0.001, "--overwrite")
    assert status == 0
    status, output = espalier(
        "fit", "-c", recipe, "--out", out, "--model.optimizer.lr", 0.001, "--trainer.max_steps", 8
    )
    assert status == 0
    assert "continuing from" in output.err
    assert "step-00000006.ckpt" in output.err
    assert "trainer.max_steps: 6 -> 8" in output.err
    (entry,) = json.loads((out / "history.json").read_text())["stages"]
    assert entry["steps"] == 8


def test_the_command_line_wins_over_the_checkpoint(finished, espalier, tmp_path):
    """Lightning by itself would run with the checkpoint's values, silently."""
    path, out = finished
    checkpoint = next((out.parent / "model.run" / "checkpoints").glob("step-*.ckpt"))
    status, output = espalier(
        "fit", "-c", path, "--out", tmp_path / "model", "--ckpt_path", checkpoint, "--model.optimizer.lr", 0.02,
        "--trainer.max_steps", 7,
    )  # fmt: skip
    assert status == 0
    assert "model.optimizer.init_args.lr: 0.003 -> 0.02" in output.err
    (entry,) = json.loads((tmp_path / "model" / "history.json").read_text())["stages"]
    assert entry["recipe"]["model"]["optimizer"]["init_args"]["lr"] == 0.02
    from app.loading import read_checkpoint

    saved = read_checkpoint(next((tmp_path / "model.run" / "checkpoints").glob("step-*.ckpt")))
    assert saved["optimizer_states"][0]["param_groups"][0]["initial_lr"] == 0.02


def test_the_architecture_can_be_changed_key_by_key(recipe, espalier, tmp_path):
    out = tmp_path / "model"
    status, _ = espalier(
        "fit", "-c", recipe, "--out", out, "--trainer.max_steps", 2, "--model.architecture.width", 48,
        "--model.architecture.attention.heads=6", "--model.architecture.norm", "layer",
    )  # fmt: skip
    assert status == 0
    config = models.load(out).config
    assert (config.width, config.layers[0].attention.heads, config.norm.kind) == (48, 6, "layer")
    assert config.layers[0].feedforward.width == 64


def test_validate_test_and_predict_read_the_run(finished, espalier):
    path, out = finished
    for verb in ("validate", "test"):
        status, output = espalier(verb, "-c", path, "--out", out)
        assert status == 0
        assert "perplexity" in output.out
    status, output = espalier("predict", "-c", path, "--out", out, "--ckpt_path", "best")
    rows = [json.loads(line) for line in output.out.splitlines() if line.startswith("{")]
    assert status == 0
    assert len(rows) == 8
    assert all(row["tokens"] == 32 and row["nll"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.optimizer.lrr", "1"], ["Muon has no option 'lrr'", "did you mean 'lr'"]),
        (["--model.optimizer", "Muonn"], ["no 'Muonn'", "did you mean 'Muon'"]),
        (["--model.schedule.decay", "x"], ["decay of WarmupStableDecay must be a number, not x"]),
        (["--model.schedule.decay", "7"], ["decay must lie between 0 and 1"]),
        (["--model.compute_dtype", "bf16"], ["must be one of 'float32', 'bfloat16'"]),
        (["--model.architecture.widht", "1"], ["unknown key 'widht'", "did you mean 'width'"]),
        (["--model.architecture", "llama-2b"], ["unknown preset", "did you mean 'llama-1b'"]),
        (["--trainer.max_steps", "ten"], ["trainer.max_steps must be a whole number, not ten"]),
        (["--trainer.max_stps", "1"], ["unknown option --trainer.max_stps"]),
        (["--trainer.strategy", "fsdp3"], ["strategy"]),
        (["--data", "/nowhere/at.txt"], ["/nowhere/at.txt"]),
        (["--data.batch_size", "1000000"], ["training split"]),
        (["--ckpt_path", "/nowhere.ckpt"], ["no checkpoint /nowhere.ckpt"]),
        (["--checkpoint.every_n_steps", "0"], ["at least 1"]),
        (["--model.schedule.warmup_steps", "100"], ["warmup_steps is 100"]),
        (["--model.optimizer.lr", "-1"], ["lr of Muon must be a number of at least 0, not -1"]),
        (["--trainer.gradient_clip_val", "-1"], ["gradient_clip_val must be at least 0"]),
        (["--trainer.max_epochs", "x"], ["trainer.max_epochs must be a whole number or null, not x"]),
        (["--trainer.accumulate_grad_batches", "0"], ["accumulate_grad_batches is 0; it must be at least 1"]),
        (["--trainer.check_val_every_n_epoch", "1", "--trainer.val_check_interval", "9999"], ["an epoch has"]),
        (["--trainer.limit_train_batches", "0"], ["limit_train_batches is 0; it must be above 0"]),
        (["--model.optimizer.lr", "null"], ["lr of Muon is null"]),
        (["--model.z_loss", ".nan"], ["model.z_loss is nan; it must be a finite number"]),
        (["--seed", "-1"], ["-1 is not in bounds", "0 to 4294967295"]),
        (["--early_stopping.patience", "0"], ["early_stopping.patience must be at least 1"]),
        (["--early_stopping.patience", "1", "--early_stopping.monitor", "x"], ["early_stopping.monitor is 'x'"]),
    ],
)
def test_wrong_options_are_one_sentence(recipe, refused, tmp_path, arguments, words):
    refused("fit", "-c", recipe, "--out", tmp_path / "model", *arguments, words=words)
    assert not (tmp_path / "model").exists()


IMPOSSIBLE = ["--model.architecture.attention.heads", "3"]  # of 32 channels


def test_an_impossible_architecture_is_refused_before_anything_is_written(recipe, refused, tmp_path):
    refused("fit", "-c", recipe, "--out", tmp_path / "model", *IMPOSSIBLE, words=["heads"])
    refused(
        "fit", "-c", recipe, "--out", tmp_path / "model", "--model.architecture.context", 8,
        words=["data.sequence_length"],
    )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_overwriting_with_a_wrong_option_leaves_the_earlier_run(recipe, espalier, refused, tmp_path):
    out, run = tmp_path / "model", tmp_path / "model.run"
    assert espalier("fit", "-c", recipe, "--out", out, "--trainer.max_steps", 2)[0] == 0
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    before = (hash_weights(out), checkpoint.read_bytes(), (run / "recipe.json").read_text())
    for wrong in (IMPOSSIBLE, ["--model.schedule.warmup_steps", 100], ["--ckpt_path", checkpoint]):
        refused("fit", "-c", recipe, "--out", out, "--overwrite", *wrong)
        assert (hash_weights(out), checkpoint.read_bytes(), (run / "recipe.json").read_text()) == before
        assert (run / "complete").exists()
    assert espalier("fit", "-c", recipe, "--out", out, "--trainer.max_steps", 3, "--overwrite")[0] == 0
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-00000003.ckpt"]
    assert len(list(run.glob("events.*"))) == 1


def test_fit_without_a_place_to_write_is_refused(recipe, refused):
    refused("fit", "-c", recipe, words=["--out"])


def test_fit_without_an_architecture_is_refused(refused, tmp_path):
    refused("fit", "--out", tmp_path / "model", words=["model.architecture must be given"])


def test_cuda_where_there_is_none(recipe, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused("fit", "-c", recipe, "--out", tmp_path / "model", "--device", "cuda", words=["--device cpu"])


def test_unknown_keys_in_a_recipe(tmp_path, refused):
    path = write(tmp_path / "recipe.yaml", model__optimzer="AdamW")
    refused("fit", "-c", path, "--out", tmp_path / "model", words=["model.optimzer", "did you mean 'optimizer'"])


def test_a_recipe_may_not_name_any_class(tmp_path, refused, monkeypatch):
    """The module is not even imported."""
    (tmp_path / "planted.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Muon: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    for value in ({"class_path": "planted.Muon"}, "planted.Muon"):
        path = write(tmp_path / "recipe.yaml", model__optimizer=value)
        refused("fit", "-c", path, "--out", tmp_path / "model", words=["planted.Muon", "--trust"])
    assert not (tmp_path / "ran").exists()


def test_an_output_that_holds_something_is_refused_before_any_work(recipe, refused, tmp_path):
    out = tmp_path / "model"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused("fit", "-c", recipe, "--out", out, words=["already holds something", "--overwrite"])
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    assert not (tmp_path / "model.run").exists()


def test_a_corrupt_or_older_checkpoint_is_refused(finished, refused, tmp_path):
    import torch

    path, out = finished
    checkpoint = next((out.parent / "model.run" / "checkpoints").glob("step-*.ckpt"))
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(checkpoint.read_bytes()[:5000])
    arguments = ["fit", "-c", path, "--out", tmp_path / "model", "--ckpt_path"]
    refused(*arguments, cut, words=["cut.ckpt"])
    content = torch.load(checkpoint, weights_only=True)
    content["espalier"]["format_version"] = 99
    torch.save(content, tmp_path / "newer.ckpt")
    refused(*arguments, tmp_path / "newer.ckpt", words=["version 99"])
    assert not (tmp_path / "model").exists()


def test_another_width_than_the_checkpoints_is_refused(finished, refused, tmp_path):
    path, out = finished
    checkpoint = next((out.parent / "model.run" / "checkpoints").glob("step-*.ckpt"))
    refused(
        "fit", "-c", path, "--out", tmp_path / "model", "--ckpt_path", checkpoint, "--model.architecture.width", 64,
        words=["another architecture", "embedding.weight"],
    )  # fmt: skip


def test_what_cannot_go_on_from_a_checkpoint_is_refused(finished, refused, tmp_path):
    path, out = finished
    checkpoint = next((out.parent / "model.run" / "checkpoints").glob("step-*.ckpt"))
    fit = ["fit", "-c", path, "--out", tmp_path / "model", "--ckpt_path", checkpoint]
    refused(*fit, "--model.optimizer", "AdamW", words=[str(checkpoint), "Muon, and model.optimizer is AdamW"])
    refused(*fit, "--trainer.accumulate_grad_batches", 4, words=["after 6 batches", "with 3 it can go on"])
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_no_number_is_a_fault(recipe, espalier, tmp_path):
    status, output = espalier(
        "fit", "-c", recipe, "--out", tmp_path / "model", "--model.optimizer.lr", "1e30", "--model.optimizer.adamw_lr",
        "1e30", "--model.schedule", "Constant",
    )  # fmt: skip
    assert status == 1
    assert "espalier: error: the " in output.err
    assert "Traceback" not in output.err
    assert not (tmp_path / "model").exists()


def test_early_stopping_ends_a_run_and_the_best_weights_can_be_kept(recipe, espalier, tmp_path):
    options = {"monitor": "validation/loss", "patience": 1, "min_delta": 9.0}
    stopping = json.dumps([{"class_path": "EarlyStopping", "init_args": options}])
    out = tmp_path / "model"
    status, _ = espalier(
        "fit",
        "-c",
        recipe,
        "--out",
        out,
        "--trainer.max_steps",
        30,
        "--trainer.callbacks",
        stopping,
        "--weights",
        "best",
    )
    assert status == 0
    (entry,) = json.loads((out / "history.json").read_text())["stages"]
    assert entry["steps"] == 6
    assert entry["stopped_early"]


def test_a_run_that_stops_early_is_written_and_goes_on_with_more_patience(recipe, espalier, tmp_path):
    """No improvement counts here, so that a run with a patience of 1 ends at the second validation."""
    stopping = ["--early_stopping.patience", 1, "--early_stopping.min_delta", 9.0, "--checkpoint.every_n_steps", 4]
    fit = ["fit", "-c", recipe, "--trainer.max_steps", 12, *stopping]
    out = tmp_path / "model"
    status, output = espalier(*fit, "--out", out)
    assert status == 0
    assert "stopped early after 6 steps: validation/loss has not improved for 1 validations in a row" in output.err
    (entry,) = json.loads((out / "history.json").read_text())["stages"]
    assert (entry["steps"], entry["stopped_early"]) == (6, True)

    stopped = hash_weights(out)
    for path in out.iterdir():  # as if it had been killed before the folder was written
        path.unlink()
    out.rmdir()
    assert espalier(*fit, "--out", out)[0] == 0
    assert hash_weights(out) == stopped
    assert "is complete: 6 steps" in espalier(*fit, "--out", out)[1].err

    assert espalier(*fit, "--out", out, "--early_stopping.patience", 9)[0] == 0
    assert espalier(*fit, "--out", tmp_path / "whole", "--early_stopping.patience", "null")[0] == 0
    assert hash_weights(out) == hash_weights(tmp_path / "whole")


@pytest.mark.parametrize("name", ["quickstart", "gpt2-small", "llama-350m", "llama-1b", "llama-1b-8gpu"])
def test_recipes_parse(name):
    from pathlib import Path

    from recipes.fit import FitCLI

    path = Path(__file__).parents[2] / "recipes" / "pretrain" / f"{name}.yaml"
    parsed = []

    class Parsed(FitCLI):
        def before_instantiate_classes(self) -> None:
            parsed.append(self.config.fit)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Parsed(["fit", "-c", str(path)])
    assert parsed[0].ckpt_path == "last"
    assert parsed[0].trainer.max_steps > 0


@pytest.mark.parametrize("earlier", [False, True], ids=["nothing there", "an earlier run"])
def test_a_run_that_is_refused_before_its_first_step_leaves_nothing(earlier, refused, tmp_path):
    """Positions that end are known to be too few only when the prompts have been read."""
    path = write(tmp_path / "recipe.yaml", model__architecture__position="learned", samples__prompts=["the end " * 40])
    run = tmp_path / "model.run"
    if earlier:
        run.mkdir()
        (run / "events.out.tfevents.1").write_text("mine")
    refused("fit", "-c", path, "--out", tmp_path / "model", words=["samples.prompts", "learned positions end at 32"])
    left = {str(one.relative_to(tmp_path)) for one in tmp_path.rglob("*")} - {"recipe.yaml"}
    assert left == ({"model.run", "model.run/events.out.tfevents.1"} if earlier else set())

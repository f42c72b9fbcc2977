"""Masked language modelling from a recipe: an encoder is trained, and its folder goes through every verb."""

import json

import pytest
import yaml

import models
from app.evaluation.report.overview import read_report
from models.checkpoint import read_task
from tests.recipes.conftest import ARCHITECTURE, QUICK

MEASURED = [*QUICK[:-1], "2", "--evaluation_blocks", "24"]
RECIPE = {
    "seed_everything": 1,
    "model": {
        "architecture": ARCHITECTURE | {"depth": 2, "direction": "bidirectional", "position": "rope"},
        "task": {"kind": "masked_lm", "whole_word": True},
        "optimizer": {"class_path": "AdamW", "init_args": {"lr": 5.0e-3}},
    },
    "data": {"source": "synthetic", "sequence_length": 64, "batch_size": 16, "vocab_size": 320, "seed": 1},
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 60,
        "val_check_interval": 30,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 2,
        "enable_progress_bar": False,
    },
    "samples": {"prompts": ["ba de"]},
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The folder of a tiny encoder that was trained by the command."""
    from recipes import cli

    place = tmp_path_factory.mktemp("encoder")
    recipe, out = place / "recipe.yaml", place / "encoder"
    recipe.write_text(yaml.safe_dump(RECIPE | {"out": str(out)}))
    assert cli.main(["fit", "-c", str(recipe)]) == 0
    return out


@pytest.fixture(scope="module")
def quantized(encoder, tmp_path_factory):
    from recipes import cli

    out = tmp_path_factory.mktemp("quantized") / "quantized"
    assert cli.main(["quantize", str(encoder), "--out", str(out), "--bits", "4", "--samples", "8", *MEASURED]) == 0
    return out


def test_the_folder_names_its_task(encoder):
    task = read_task(encoder)
    assert (task["kind"], task["mask"], task["evaluation_mask"], task["whole_word"]) == ("masked_lm", 0.3, 0.15, True)
    assert [metric["kind"] for metric in task["metrics"]] == ["loss", "accuracy"]
    assert models.load(encoder).config.direction == "bidirectional"
    card = (encoder / "README.md").read_text()
    assert "fill-mask" in card
    assert "parameter encoder" in card
    assert "espalier generate" not in card


def test_a_quantized_encoder_has_the_figures_of_its_task(encoder, quantized):
    assert read_task(quantized) == read_task(encoder)
    report = read_report(quantized)
    assert report["task"]["kind"] == "masked_lm"
    for side in ("before", "after"):
        quality, speed = report[side]["quality"], report[side]["speed"]
        assert quality.keys() == {"loss", "accuracy", "tokens", "interval"}
        assert quality["interval"]["accuracy"][0] < quality["accuracy"] < quality["interval"]["accuracy"][1]
        assert speed["forward_tokens_per_second"] > 0
        assert speed["sequences_per_second"] > 0
        assert "decode_tokens_per_second" not in speed
    quality = report["change"]["quality"]
    assert quality["loss"] == pytest.approx(report["after"]["quality"]["loss"] - report["before"]["quality"]["loss"])
    assert report["before"]["quality"]["loss"] < report["baselines"]["unigram"]["loss"]
    assert report["before"]["quality"]["accuracy"] > report["baselines"]["unigram"]["accuracy"]
    assert report["before"]["quality"]["loss"] < report["baselines"]["untrained"]["loss"]
    assert report["measurement"]["mean_context"] > 1
    assert report["change"]["speed"]["forward_tokens_per_second"]["ratio"] > 0
    text = (quantized / "report.md").read_text()
    assert "Accuracy" in text
    assert "erplexity" not in text
    assert "ecoding" not in text
    page = (quantized / "report.html").read_text()
    assert "Accuracy" in page
    assert "erplexity" not in page


@pytest.mark.parametrize(
    "stage",
    [
        ["prune", "--method", "wanda", "--sparsity", "0.5", "--samples", "8"],
        [
            "prune",
            "--method",
            "structured",
            "--targets",
            "neurons,heads",
            "--ratio",
            "0.5",
            "--criterion",
            "taylor",
            "--samples",
            "8",
        ],
        ["quantize", "--method", "squeezellm", "--bits", "4", "--samples", "4"],
        ["quantize", "--method", "awq", "--bits", "4", "--samples", "4"],
    ],
    ids=lambda stage: " ".join(stage[:3]),
)
def test_stages_take_the_task_from_the_folder(stage, encoder, espalier, tmp_path):
    verb, *how = stage
    status, output = espalier(verb, encoder, "--out", tmp_path / "out", *how, *QUICK, "--evaluation_blocks", 24)
    assert status == 0, output.err
    assert read_task(tmp_path / "out") == read_task(encoder)
    assert read_report(tmp_path / "out")["after"]["quality"]["accuracy"] > 0.02


def test_distillation_and_the_page_over_all(encoder, quantized, espalier, tmp_path):
    status, output = espalier(
        "distill", "--teacher", encoder, "--student_layers", 1, "--out", tmp_path / "student", "--max_steps", 10,
        "--losses", "logit,feature", "--train_batch_size", 8, *MEASURED,
    )  # fmt: skip
    assert status == 0, output.err
    assert read_task(tmp_path / "student") == read_task(encoder)
    status, output = espalier("report", quantized, tmp_path / "student", "--out", tmp_path / "all")
    assert status == 0, output.err
    text = (tmp_path / "all" / "report.md").read_text()
    assert "| Model | Loss | Accuracy |" in text
    assert "erplexity" not in text
    assert "loss" in output.out
    assert "perplexity" not in output.out


def test_evaluate_compare_and_inspect(encoder, quantized, espalier, tmp_path):
    status, output = espalier("evaluate", encoder, quantized, "--out", tmp_path / "figures.json", *MEASURED)
    assert status == 0, output.err
    assert "accuracy" in output.out
    assert "perplexity" not in output.out
    figures = json.loads((tmp_path / "figures.json").read_text())["models"]
    assert figures[str(encoder)]["quality"] == read_report(quantized)["before"]["quality"]  # on the same masks
    status, output = espalier("compare", encoder, quantized, *QUICK, "--evaluation_blocks", 24)
    assert status == 0, output.err
    assert "Accuracy" in output.err
    status, output = espalier("inspect", quantized)
    assert status == 0, output.err
    assert "blocks.1.feedforward.down" in output.out


def test_what_an_encoder_does_not_do_is_refused(encoder, teacher, refused):
    refused("generate", encoder, "--prompt", "ba", words=["was trained for masked_lm", "causal_lm"])
    refused("compare", encoder, teacher, *QUICK, words=["different tasks (masked_lm and causal_lm)"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": "masked"}, ["model.task", "unknown task 'masked'", "masked_lm"]),
        ({"task": {"kind": "masked_lm", "mask": 1.5}}, ["mask is 1.5", "below 1"]),
        ({"task": {"kind": "masked_lm", "share": 0.5}}, ["unknown key 'share'"]),
        ({"task": {"kind": "masked_lm", "metrics": ["recall"]}}, ["unknown metric 'recall'"]),
        ({"task": "causal_lm"}, ["the architecture is bidirectional", "direction: causal"]),
        ({"architecture": ARCHITECTURE}, ["the architecture is causal", "bidirectional"]),
    ],
)
def test_a_recipe_of_another_task_is_refused_in_one_sentence(change, words, refused, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE | {"model": RECIPE["model"] | change, "out": str(tmp_path / "out")}))
    refused("fit", "-c", recipe, words=words)
    assert not (tmp_path / "out").exists()

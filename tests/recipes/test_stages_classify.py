"""Classification from recipes: trained from scratch and from a decoder, and its folder goes through every verb."""

import json
import random

import pytest
import yaml

import models
from app.evaluation.report.overview import read_report
from models.checkpoint import read_task
from recipes import cli
from tests.recipes.conftest import ARCHITECTURE

GOOD, BAD = ("good", "great", "fine"), ("bad", "awful", "dull")
OTHER = ("the", "film", "plot", "cast", "was", "with", "and", "a", "very")
SHORT = {
    "model": {"architecture": {**ARCHITECTURE, "depth": 2, "direction": "bidirectional"}},
    "data": {"sequence_length": 48, "batch_size": 16, "vocab_size": 300},
    "trainer": {"max_steps": 60, "val_check_interval": 30, "accelerator": "cpu", "enable_progress_bar": False},
}
CPU = ("--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu")
QUICK = ["--device", "cpu", "--speed_rounds", "0"]


def rows(count, seed):
    draw = random.Random(seed)
    for _ in range(count):
        good = draw.random() < 0.6
        words = [draw.choice(OTHER) for _ in range(draw.randint(3, 6))]
        words.insert(draw.randrange(len(words)), draw.choice(GOOD if good else BAD))
        yield " ".join(words), good


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with single sentences and pairs, and a recipe that makes the ones of recipes/classify short."""
    folder = tmp_path_factory.mktemp("classify")
    for name, count, seed in (("train", 320, 0), ("dev", 60, 1)):
        one, two = list(rows(count, seed)), list(rows(count, seed + 10))
        single = "".join(f"{text}\t{'fine' if good else 'poor'}\n" for text, good in one)
        (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + single)
        (folder / f"{name}-plain.tsv").write_text(single)
        pairs = zip(one, two, strict=True)
        objects = [{"a": a, "b": b, "same": x == y} for (a, x), (b, y) in pairs]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in objects))
    (folder / "short.yaml").write_text(yaml.safe_dump(SHORT))
    return folder


def fit(place, out, *more, recipe="scratch", data="{}.tsv"):
    train, dev = (place / data.format(name) for name in ("train", "dev"))
    argv = ["fit", "-c", f"recipes/classify/{recipe}.yaml", "--data", train, "--data.validation", dev]
    return [str(one) for one in (*argv, "--out", out, *more)]


def short(*more):
    return ("--model.schedule.warmup_steps", 5, "--model.optimizer.lr", "5e-3", *more)


@pytest.fixture(scope="module")
def trained(place):
    out = place / "scratch"
    assert cli.main(fit(place, out, "-c", place / "short.yaml", *short())) == 0
    return out


@pytest.fixture(scope="module")
def decoder(place, teacher):
    """The language model `teacher`, fine-tuned on pairs by the command of the guide."""
    out = place / "decoder"
    how = ("--data.text", "a,b", "--data.label", "same", "--data.sequence_length", 64, "--trainer.max_steps", 40)
    how += (
        "--trainer.val_check_interval",
        20,
        "--trainer.enable_progress_bar",
        "false",
        "--trainer.accelerator",
        "cpu",
    )
    argv = fit(place, out, "--model.from", teacher, *how, *short(), recipe="finetune", data="{}.jsonl")
    assert cli.main(argv) == 0
    return out


def test_the_folder_remembers_columns_and_classes(trained):
    task = read_task(trained)
    assert (task["kind"], task["text"], task["label"]) == ("classify", ["sentence"], "label")
    assert (task["labels"], task["sequence_length"]) == (["fine", "poor"], 48)
    assert models.load(trained).config.head.pool == "mean"
    card = (trained / "README.md").read_text()
    assert "text-classification" in card
    assert "parameter classifier" in card
    assert "espalier generate" not in card


def test_evaluate_needs_the_rows_alone(trained, place, espalier, tmp_path):
    out = tmp_path / "e.json"
    status, output = espalier("evaluate", trained, "--evaluation_data", place / "dev.tsv", "--out", out)
    assert status == 0, output.err
    found = json.loads(out.read_text())
    (block,) = found["models"].values()
    quality = block["quality"]
    assert quality["accuracy"] > 0.9
    assert quality["macro_f1"] > 0.9
    assert quality["matthews_correlation"] > 0.8
    assert quality["tokens"] == 60
    assert quality["interval"]["macro_f1"][0] <= quality["macro_f1"] <= quality["interval"]["macro_f1"][1]
    assert 0.4 < found["baselines"]["majority"]["accuracy"] < 0.8
    assert block["speed"]["sequences_per_second"] > 0
    assert "Matthews" in output.out


def test_a_decoder_learns_pairs_from_its_own_weights(decoder, teacher):
    config, before = models.load(decoder).config, models.load(teacher)
    assert (config.head.kind, config.head.pool, config.direction) == ("classifier", "last", "causal")
    assert config.layers == before.config.layers
    assert read_task(decoder)["text"] == ["a", "b"]
    assert read_task(decoder)["labels"] == ["false", "true"]
    assert (decoder / "tokenizer.json").read_bytes() == (teacher / "tokenizer.json").read_bytes()
    history = json.loads((decoder / "history.json").read_text())["stages"]
    assert "from" in history[-1]["parents"]
    assert history[-1]["recipe"]["model"]["from_"] == str(teacher)


def test_training_begins_with_the_weights_of_the_start(place, teacher, tmp_path):
    out = tmp_path / "out"
    how = ("--data.text", "a,b", "--data.label", "same", "--data.sequence_length", 64, "--trainer.max_steps", 1)
    how += ("--model.optimizer.lr", "1e-9", "--model.schedule.warmup_steps", 0, "--trainer.limit_val_batches", 0)
    how += ("--weights", "last", *CPU)
    argv = fit(place, out, "--model.from", teacher, *how, recipe="finetune", data="{}.jsonl")
    assert cli.main(argv) == 0
    ours, theirs = models.load(out).state_dict(), models.load(teacher).state_dict()
    assert set(ours) - set(theirs) == {"head.weight", "head.bias"}
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() < 1e-6, name


@pytest.mark.parametrize(
    "stage",
    [
        ("quantize", "--method", "gptq", "--bits", 4, "--samples", 16),
        ("quantize", "--method", "squeezellm", "--bits", 4, "--samples", 8),
        ("quantize", "--method", "rtn", "--bits", 8, "--head_bits", 8),
        ("prune", "--method", "wanda", "--sparsity", 0.5, "--samples", 16),
        ("prune", "--method", "structured", "--targets", "neurons,heads", "--ratio", 0.5, "--samples", 8),
    ],
    ids=lambda stage: " ".join(map(str, stage[:3])),
)
def test_stages_take_the_task_from_the_folder(stage, trained, place, espalier, tmp_path):
    verb, *how = stage
    data = ("--data", place / "train.tsv", "--evaluation_data", place / "dev.tsv")
    status, output = espalier(verb, trained, "--out", tmp_path / "out", *how, *data, *QUICK)
    assert status == 0, output.err
    assert read_task(tmp_path / "out") == read_task(trained)
    report = read_report(tmp_path / "out")
    assert report["after"]["quality"]["accuracy"] > report["baselines"]["majority"]["accuracy"]
    assert report["change"]["quality"].keys() >= {"accuracy", "macro_f1", "matthews_correlation", "agreement"}
    text = (tmp_path / "out" / "report.md").read_text()
    assert "Matthews correlation" in text
    assert "nats per row" in text
    for word in ("erplexity", "same token", "nats per token", "unigram"):
        assert word not in text


def test_a_student_learns_the_classes(trained, place, espalier, tmp_path):
    data = ("--data", place / "train.tsv", "--evaluation_data", place / "dev.tsv")
    how = ("--student_layers", 1, "--max_steps", 20, "--losses", "logit,feature", "--train_batch_size", 16)
    status, output = espalier("distill", "--teacher", trained, "--out", tmp_path / "out", *how, *data, *QUICK)
    assert status == 0, output.err
    assert read_report(tmp_path / "out")["after"]["quality"]["accuracy"] > 0.7
    status, output = espalier("compare", trained, tmp_path / "out", "--evaluation_data", place / "dev.tsv", *QUICK)
    assert status == 0, output.err
    assert "Macro F1" in output.err
    assert espalier("inspect", tmp_path / "out")[0] == 0
    status, output = espalier("report", tmp_path / "out", "--out", tmp_path / "page")
    assert status == 0, output.err


def test_predict_prints_the_class_of_each_row(trained, place, espalier):
    how = fit(place, trained, "-c", place / "short.yaml", *short(), "--ckpt_path", "best")
    status, output = espalier("predict", *how[1:])
    assert status == 0, output.err
    found = [json.loads(line) for line in output.out.splitlines()]
    labels = [line.split("\t")[1] for line in (place / "dev.tsv").read_text().splitlines()[1:]]
    assert [row["row"] for row in found] == list(range(len(labels)))
    assert sum(row["label"] == label for row, label in zip(found, labels, strict=True)) > 0.9 * len(labels)
    assert all(0.5 <= row["probability"] <= 1 for row in found)


def test_a_language_model_goes_on_from_its_weights(teacher, espalier, tmp_path):
    recipe = {
        "model": {"task": "causal_lm", "from": str(teacher)},
        "data": {"source": "synthetic", "sequence_length": 64, "batch_size": 8},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False, "limit_val_batches": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    status, output = espalier("fit", "-c", tmp_path / "recipe.yaml", "--out", tmp_path / "out")
    assert status == 0, output.err
    measured = ("--data", "synthetic", "--sequence_length", 64, "--evaluation_blocks", 8, *QUICK)
    assert espalier("evaluate", teacher, tmp_path / "out", *measured, "--out", tmp_path / "e.json")[0] == 0
    found = json.loads((tmp_path / "e.json").read_text())["models"].values()
    before, after = (block["quality"]["loss"] for block in found)
    assert after == pytest.approx(before, abs=0.3)


def test_a_file_without_header_has_numbers(place, espalier, tmp_path):
    how = ("-c", place / "short.yaml", "--data.text", 1, "--data.label", 2, "--trainer.max_steps", 6)
    argv = fit(place, tmp_path / "out", *how, *short("--trainer.val_check_interval", 3), data="{}-plain.tsv")
    assert espalier(*argv)[0] == 0
    assert read_task(tmp_path / "out")["text"] == ["1"]
    status, output = espalier("evaluate", tmp_path / "out", "--evaluation_data", place / "dev-plain.tsv", *QUICK)
    assert status == 0, output.err


def test_the_same_command_goes_on_after_it_was_broken_off(place, espalier, trained, tmp_path):
    how = ("-c", place / "short.yaml", "--checkpoint.every_n_steps", 10)
    first = fit(place, tmp_path / "out", *how, *short("--trainer.max_steps", 30))
    assert espalier(*first)[0] == 0
    assert espalier(*fit(place, tmp_path / "out", *how, *short()))[0] == 0  # ckpt_path: last
    assert read_task(tmp_path / "out") == read_task(trained)


def test_what_cannot_work_is_a_sentence(trained, place, refused, tmp_path):
    out = tmp_path / "out"
    refused(*fit(place, out, "--data.text", "words"), words=["no column 'words'", "sentence"])
    refused("fit", "-c", "recipes/classify/scratch.yaml", "--out", out, words=["classify needs --data FILE"])
    refused(*fit(place, out, recipe="finetune"), words=["model.from"])
    (place / "odd.tsv").write_text("sentence\tlabel\nthe film\tmiddling\n")
    refused(*fit(place, out, "--data.validation", place / "odd.tsv"), words=["row 2", "'middling'", "fine, poor"])
    refused("evaluate", trained, "--evaluation_data", place / "odd.tsv", words=["'middling'"])
    refused("quantize", trained, "--out", out, words=["give --data"])
    refused("evaluate", trained, "--data", place / "dev.tsv", "--column", "x", words=["leave --column out"])
    refused("generate", trained, "--prompt", "a", words=["does not continue a text"])
    refused("export", trained, "--out", out, words=["bidirectional"])


def test_export_refuses_a_classifier_that_is_a_decoder(decoder, refused, tmp_path):
    refused("export", decoder, "--out", tmp_path / "out", words=["head"])

"""`espalier prune`, from the command to the folder."""

import json

import pytest
import torch

import models.checkpoint
from app.data.corpus import synthetic
from models.config import ModelConfig
from models.transformer import Transformer
from tests.recipes.conftest import ARCHITECTURE, QUICK


def report_of(out):
    return json.loads((out / "report.json").read_text())


def test_wanda_writes_a_whole_folder(teacher, espalier, tmp_path):
    out = tmp_path / "pruned"
    status, output = espalier("prune", teacher, "--out", out, *QUICK, "--samples", 16, "--debug")
    assert status == 0, output.err
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "report.json", "report.md", "report.html"}
    assert names >= {"plots", "history.json", "README.md"}
    assert not (tmp_path / "pruned.partial").exists()
    model = models.checkpoint.load(out)
    assert float((model.blocks[0].feedforward.up.weight == 0).float().mean()) == 0.5
    report = report_of(out)
    assert report["change"]["quality"]["loss"] > 0
    assert report["after"]["size"]["nonzero_parameters"] < report["before"]["size"]["nonzero_parameters"]
    history = json.loads((out / "history.json").read_text())["stages"]
    assert [entry["stage"] for entry in history] == ["prune"]
    assert history[0]["parents"]["model"] == models.checkpoint.hash_weights(teacher)
    assert history[0]["weights"] == models.checkpoint.hash_weights(out)


def test_sparsegpt_from_a_recipe_and_flags(teacher, espalier, tmp_path):
    argv = ["-c", "recipes/prune/sparsegpt.yaml", "--samples", 8, "--sparsity", 0.6, "--refine", "swaps"]
    argv += ["--refine.steps", 2, "--allocation", "owl", "--allocation.threshold", 3, "--debug"]
    status, output = espalier("prune", teacher, "--out", tmp_path / "a", *QUICK, *argv)
    assert status == 0, output.err
    report = report_of(tmp_path / "a")
    assert report["title"] == "SparseGPT, 60%, allocation owl, refined by swaps"
    done = [layer for layer in report["layers"] if not layer["skipped"]]
    assert all(layer["note"].startswith("swaps: error of the outputs") for layer in done)
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in done)
    assert abs(sum(layer["achieved"]["zeros"] for layer in done) - 0.6 * weights) <= len(done)
    recipe = json.loads((tmp_path / "a" / "history.json").read_text())["stages"][0]["recipe"]
    assert recipe["method"]["allocation"] == {"kind": "owl", "threshold": 3.0, "spread": 0.08}
    assert recipe["method"]["refine"] == {"kind": "swaps", "steps": 2}
    argv = ["--method", "sparsegpt", "--pattern", "2:4", "--samples", 8]
    status, output = espalier("prune", teacher, "--out", tmp_path / "b", *QUICK, *argv)
    assert status == 0, output.err
    model = models.checkpoint.load(tmp_path / "b")
    assert ((model.blocks[0].feedforward.up.weight.view(-1, 4) == 0).sum(1) == 2).all()


def test_history_names_the_defaults_of_the_method(teacher, espalier, tmp_path):
    assert espalier("prune", teacher, "--out", tmp_path / "a", *QUICK, "--method", "magnitude")[0] == 0
    recipe = json.loads((tmp_path / "a" / "history.json").read_text())["stages"][0]["recipe"]
    assert recipe["method"]["pattern"] == {"kind": "unstructured", "sparsity": 0.5, "scope": "row"}


def test_calibration_text_is_recorded_beside_the_text_that_is_measured_on(teacher, espalier, tmp_path):
    """One field of two in a file of rows, and another text to measure on."""
    documents = [document.text for document in synthetic().texts[:60]]
    rows = tmp_path / "rows.jsonl"
    argv = ["prune", teacher, *QUICK, "--data", rows, "--column", "body", "--evaluation_data", tmp_path / "held.jsonl"]
    (tmp_path / "held.jsonl").write_text(
        "".join(json.dumps({"id": "x", "body": text}) + "\n" for text in documents[:9])
    )
    recorded = []
    for number in (60, 50):
        rows.write_text("".join(json.dumps({"id": "x", "body": text}) + "\n" for text in documents[:number]))
        status, output = espalier(*argv, "--samples", 8, "--out", tmp_path / str(number))
        assert status == 0, output.err
        recorded.append(json.loads((tmp_path / str(number) / "history.json").read_text())["stages"][0])
    assert recorded[0]["data"]["fingerprint"] == recorded[1]["data"]["fingerprint"]
    assert recorded[0]["data"]["training_fingerprint"] != recorded[1]["data"]["training_fingerprint"]
    assert recorded[0]["fingerprint"] != recorded[1]["fingerprint"]


def test_structured_pruning_shrinks_the_files(teacher, espalier, tmp_path):
    out = tmp_path / "pruned"
    argv = ["--method", "structured", "--targets", "neurons,groups", "--ratio", 0.5, "--samples", 16, "--round_to", 8]
    status, output = espalier("prune", teacher, "--out", out, *QUICK, *argv)
    assert status == 0, output.err
    report = report_of(out)
    assert report["change"]["size"]["stored_bytes"]["ratio"] < 0.85
    assert models.checkpoint.load(out).blocks[0].feedforward.up.weight.shape == (32, 32)
    status, output = espalier("prune", out, "--out", tmp_path / "again", *QUICK, "--method", "magnitude")
    assert status == 0, output.err
    history = json.loads((tmp_path / "again" / "history.json").read_text())["stages"]
    assert len(history) == 2
    assert history[1]["parents"]["model"] == history[0]["weights"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--sparsity", "1.5"], ["1.5"]),
        (["--pattern", "4:2"], ["4:2"]),
        (["--pattern", "2of4"], ["2of4", "N:M"]),
        (
            ["--method", "structured", "--sparsity", "0.5"],
            ["sparsity", "magnitude or sparsegpt or wanda", "structured"],
        ),
        (["--damping", "0.1"], ["damping is an option of method sparsegpt, not of wanda"]),
        (["--refine", "swap"], ["did you mean 'swaps'"]),
        (["--allocation", "owl", "--pattern", "2:4"], ["owl", "2:4 leaves it no choice"]),
        (["--method", "sparsegpt", "--scope", "global"], ["global", "scope 'row' or 'layer'"]),
        (["--method", "sparsegpt", "--among", "all"], ["rest, block"]),
        (["--ratio", "0.3"], ["ratio is an option of method structured, not of wanda"]),
        (["--targets", "heads", "--method", "magnitude"], ["targets", "structured, not of magnitude"]),
        (["--pattern", "2:4", "--scope", "layer"], ["scope is an option of pattern unstructured, not of 2:4"]),
        (["--method", "structured", "--ratio", "1"], ["ratio", "1"]),
        (["--method", "structured", "--targets", "neuron"], ["neuron", "neurons"]),
        (["--method", "context", "--budget_ratio", "0.5"], ["attention selective", "this model has none"]),
        (["--method", "context"], ["attention selective", "this model has none"]),
        (["--method", "context", "--tolerance", "0.1", "--ratio", "0.5"], ["ratio", "structured, not of context"]),
        (["--tolerance", "0.1"], ["tolerance is an option of method context, not of wanda"]),
        (["--samples", "0"], ["samples"]),
        (["--sequence_length", "1"], ["sequence_length"]),
        (["--data", "no/such/text.txt"], ["no/such/text.txt"]),
    ],
)
def test_impossible_wishes(argv, words, teacher, refused, tmp_path):
    out = tmp_path / "deep" / "pruned"
    refused("prune", teacher, "--out", out, *QUICK, *argv, words=words)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def selective(tokenizer, tmp_path):
    """A folder of a model, as it begins, of which two layers in four have selective attention."""
    layers = {"selects": {"kind": "selective", "heads": 4}, "sees": {"kind": "full", "heads": 4}}
    architecture = ARCHITECTURE | {
        "attention": layers,
        "layers": ["selects", "sees"],
        "vocab_size": tokenizer.vocab_size,
    }
    torch.manual_seed(0)
    with models.checkpoint.writing(tmp_path / "selective") as target:
        models.checkpoint.save_model(Transformer(ModelConfig.from_dict(architecture)), target)
        tokenizer.save(target)
    return tmp_path / "selective"


def test_context_pruning_gives_layers_a_budget(selective, espalier, tmp_path):
    out = tmp_path / "pruned"
    argv = ["--method", "context", "--budget_ratio", 0.5, "--step", 24, "--samples", 4]
    status, output = espalier("prune", selective, "--out", out, *QUICK, *argv, "--debug")
    assert status == 0, output.err
    before, after = models.checkpoint.load(selective), models.checkpoint.load(out)
    budgets = [getattr(layer.attention, "budget", None) for layer in after.config.layers]
    assert budgets[1] is budgets[3] is None
    assert sum(budget or 64 for budget in (budgets[0], budgets[2])) <= 64
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    report = report_of(out)
    assert report["after"]["size"]["cache_bytes"] == after.cache_bytes(64) < 0.8 * before.cache_bytes(64)
    assert "Cache of a full context" in (out / "report.md").read_text()
    assert any("The cache of a full context is" in sentence["text"] for sentence in report["verdict"])
    assert [layer["name"] for layer in report["layers"]] == ["blocks.0.attention", "blocks.2.attention"]
    assert "tokens before 64, tokens after" in (out / "report.md").read_text()
    assert "at most 50%" in report["title"]
    assert report["layers"][0]["shape"] == []  # tokens are no side of a matrix
    steps = json.loads((out / "budgets.json").read_text())["steps"]
    assert steps[0]["memory"] == 1.0
    assert steps[-1]["memory"] <= 0.5


def test_a_model_without_selective_layers_is_told_first(teacher, refused, tmp_path):
    refused("prune", teacher, "--out", tmp_path / "out", *QUICK, "--method", "context", words=["attention selective"])
    assert list(tmp_path.iterdir()) == []


def test_same_seed_same_weights(teacher, espalier, tmp_path):
    hashes = set()
    for name in "ab":
        torch.manual_seed(hash(name))
        status, output = espalier("prune", teacher, "--out", tmp_path / name, *QUICK, "--samples", 8)
        assert status == 0, output.err
        hashes.add(models.checkpoint.hash_weights(tmp_path / name))
    assert len(hashes) == 1

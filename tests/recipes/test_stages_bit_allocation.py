"""`espalier quantize` under a budget, from the command to the report."""

import json
from types import SimpleNamespace

import pytest

import models.checkpoint
from models.weight_formats import described
from recipes.commands.bit_allocation import Budget, Mixed
from tests.recipes.conftest import QUICK
from tests.recipes.test_stages_resume import STORE, kill

SMALL = [*QUICK, "--samples", "8", "--group_size", "16", "--symmetric", "false", "--sensitivity_samples", "8"]


def report_of(out):
    return json.loads((out / "report.json").read_text())


def test_a_budget_of_bits(teacher, espalier, tmp_path):
    out = tmp_path / "mixed"
    argv = ["--budget_bits", 4.5, "--layers", "{blocks.0.attention.o: {bits: 8}, '*.up': {group_size: 32}}"]
    status, output = espalier("quantize", teacher, "--out", out, *SMALL, *argv, "--debug")
    assert status == 0, output.err
    forms, report = described(models.checkpoint.load(out)), report_of(out)
    found = report["sensitivity"]
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert forms["blocks.0.attention.o"]["bits"] == 8
    assert "blocks.0.attention.o" not in layers
    assert forms["blocks.1.feedforward.up"]["group_size"] == 32
    assert {name: layer["bits"] for name, layer in layers.items()} == {name: forms[name]["bits"] for name in layers}
    assert len({form["bits"] for form in forms.values()}) > 1
    records = {layer["name"]: layer for layer in report["layers"]}
    average = sum(records[name]["achieved"]["bits"] * layer["weights"] for name, layer in layers.items())
    average /= sum(layer["weights"] for layer in layers.values())
    assert found["budget"]["asked"] == 4.5
    assert found["budget"]["achieved"] == pytest.approx(average)
    assert 4.3 < average <= 4.5
    assert found["uniform"]["mixed_bytes"] <= found["uniform"]["stored_bytes"]
    assert report["title"] == "GPTQ, at most 4.5 bits a weight, groups of 16"
    assert report["recipe"]["bits"] is None
    said = " ".join(sentence["text"] for sentence in report["verdict"])
    assert "At most 4.5 bits a weight on average were asked for" in said
    assert "bits everywhere on held-out text" in said
    assert (out / "plots" / "sensitivity.png").stat().st_size > 1000
    assert "## Each layer alone" in (out / "report.md").read_text()
    assert "<h2>Each layer alone</h2>" in (out / "report.html").read_text()


def test_a_budget_of_bytes_of_the_file(teacher, espalier, tmp_path):
    out = tmp_path / "mixed"
    argv = ["--budget_bytes", "60kB", "--embedding_bits", 8, "--method", "squeezellm"]
    argv = [*QUICK, "--samples", "8", "--sensitivity_samples", "8", *argv]
    status, output = espalier("quantize", teacher, "--out", out, *argv, "--debug")
    assert status == 0, output.err
    stored = (out / "model.safetensors").stat().st_size
    assert 58_500 < stored <= 60_000
    budget = report_of(out)["sensitivity"]["budget"]
    assert budget["achieved"] == stored
    assert budget["smallest"] < 60_000 < budget["largest"]


def test_layers_are_measured_without_a_budget(teacher, espalier, tmp_path):
    out = tmp_path / "plain"
    status, output = espalier("quantize", teacher, "--out", out, *SMALL, "--bits", 3, "--method", "rtn", "--debug")
    assert status == 0, output.err
    found = report_of(out)["sensitivity"]
    assert {layer["bits"] for layer in found["layers"]} == {3}
    assert "budget" not in found
    assert (out / "plots" / "sensitivity.png").exists()


@pytest.mark.slow
def test_killed_between_two_layers(teacher, espalier, tmp_path):
    argv = ["quantize", teacher, *SMALL, "--budget_bits", "4", "--method", "rtn"]
    assert espalier(*argv, "--out", tmp_path / "undisturbed")[0] == 0
    kill(STORE, 11, [*argv, "--out", tmp_path / "out"])
    assert len(list((tmp_path / "out.partial" / "sensitivity").glob("unit-*.safetensors"))) == 11
    status, output = espalier(*argv, "--out", tmp_path / "out")
    assert status == 0, output.err
    assert "going on" in output.err
    assert models.checkpoint.hash_weights(tmp_path / "out") == models.checkpoint.hash_weights(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--budget_bits", "3", "--bits", "4"], ["bits and budget_bits", "keep one"]),
        (["--budget_bits", "3", "--budget_bytes", "1MB"], ["budget_bits and budget_bytes", "keep one"]),
        (["--budget_bits", "2"], ["budget_bits is 2 bits a weight", "the least", "the most"]),
        (["--budget_bits", "nan"], ["budget_bits", "nan"]),
        (["--budget_bytes", "10kB"], ["budget_bytes is 10", "the least", "the most"]),
        (["--budget_bytes", "20 apples"], ["20 apples", "20MB"]),
        (["--budget_bits", "3", "--skip", "blocks.*"], ["no layer is left"]),
        (["--budget_bits", "3", "--skip", "blocks.9.*"], ["no layer is called 'blocks.9.*'"]),
        (["--budget_bits", "3", "--sensitivity_samples", "0"], ["sensitivity_samples is 0"]),
    ],
)
def test_impossible_budgets(argv, words, teacher, refused, tmp_path):
    refused("quantize", teacher, "--out", tmp_path / "mixed", *SMALL, *argv, words=words)
    assert list(tmp_path.iterdir()) == []


def test_a_method_without_a_choice_of_bits(teacher, refused, tmp_path):
    argv = ["--budget_bits", "3", "--method", "int8", *QUICK]
    refused("quantize", teacher, "--out", tmp_path / "mixed", *argv, words=["budget_bits", "int8", "gptq"])


def test_uniform_bits_are_the_next_below_that_a_layer_has():
    sizes = [{2: 20, 3: 30, 4: 40, 8: 80}, {4: 40, 8: 80}, {2: 20, 8: 80}]
    mixed = Mixed(Budget("bits", 4.0, 1), None, [], 0, sizes)
    assert [mixed.at(bits) for bits in (2, 3, 4, 8)] == [[2, 4, 2], [3, 4, 2], [4, 4, 2], [8, 8, 8]]
    mixed.bits = [3, 4, 2]
    assert mixed.uniform is None  # it is that of 3 bits
    mixed.bits = [2, 4, 2]
    assert mixed.uniform is None
    mixed.bits = [8, 4, 2]
    assert mixed.uniform == 8
    mixed.bits = [2, 8, 2]
    assert mixed.uniform == 8


def test_the_room_of_a_budget():
    unit = SimpleNamespace(weights=1001)
    assert Mixed(Budget("bits", 3.2, 1), None, [unit], 7, []).room() == 400  # bits of 1001 weights, in whole bytes
    assert Mixed(Budget("bytes", 500, 1), None, [unit], 7, []).room() == 493
    assert Mixed(Budget("bits", 3.2, 1), None, [unit], 7, []).in_units(1001) == 8
    assert Mixed(Budget("bytes", 500, 1), None, [unit], 7, []).in_units(400) == 407

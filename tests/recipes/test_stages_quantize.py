"""`espalier quantize`, from the command to the folder."""

import json

import pytest

import models.checkpoint
from models.errors import UserError
from models.weight_formats import described
from recipes.commands import options
from recipes.commands.parser import parse_arguments
from recipes.commands.quantize import Quantize
from tests.recipes.conftest import QUICK

SMALL = [*QUICK, "--samples", "8", "--group_size", "16"]


def report_of(out):
    return json.loads((out / "report.json").read_text())


def test_gptq_writes_packed_weights(teacher, espalier, tmp_path):
    out = tmp_path / "quantized"
    argv = ["--bits", 4, "--embedding_bits", 8, "--skip", "blocks.0.attention.*", "--layers", "{'*.down': {bits: 8}}"]
    status, output = espalier("quantize", teacher, "--out", out, *SMALL, *argv, "--debug")
    assert status == 0, output.err
    forms = described(models.checkpoint.load(out))
    assert forms["blocks.1.attention.q"]["bits"] == 4
    assert forms["blocks.1.feedforward.down"]["bits"] == 8
    assert forms["embedding"]["bits"] == 8
    assert "blocks.0.attention.q" not in forms
    report = report_of(out)
    stored = report["after"]["size"]["stored_bytes"]
    assert stored == (out / "model.safetensors").stat().st_size
    assert stored < 0.5 * report["before"]["size"]["stored_bytes"]
    skipped = [layer for layer in report["layers"] if layer["skipped"]]
    assert {layer["name"] for layer in skipped} == {f"blocks.0.attention.{letter}" for letter in "qkvo"}
    assert all(layer["note"] for layer in skipped)


def test_a_method_with_options_of_its_own_and_another_for_some_layers(teacher, espalier, tmp_path):
    out = tmp_path / "quantized"
    argv = ["--method", "{kind: awq, solve: gptq}", "--layers", "{'*.o': {method: rtn, bits: 8}}", "--bits", 3]
    status, output = espalier("quantize", teacher, "--out", out, *SMALL, *argv, "--debug")
    assert status == 0, output.err
    report = report_of(out)
    assert report["title"] == "AWQ, 3 bits, groups of 16, solve gptq"
    layers = {layer["name"]: layer for layer in report["layers"]}
    query, output = (layers[f"blocks.0.attention.{letter}"] for letter in "qo")
    assert query["requested"] | {"method": "awq", "bits": 3, "symmetric": False, "solve": "gptq"} == query["requested"]
    assert output["requested"] | {"method": "rtn", "bits": 8, "symmetric": False} == output["requested"]
    assert query["achieved"]["scales_in"] == "attention_norm"


def test_pruned_and_quantized_in_one_pass(teacher, espalier, tmp_path):
    argv = ["--method.prune", "2:4", "--method.act_order", "false", "--bits", 4]
    status, output = espalier("quantize", teacher, "--out", tmp_path / "both", *SMALL, *argv, "--debug")
    assert status == 0, output.err
    report = report_of(tmp_path / "both")
    assert report["title"] == "GPTQ, 4 bits, groups of 16, act_order false, prune N:M (n 2, m 4)"
    model = models.checkpoint.load(tmp_path / "both")
    weight = model.blocks[1].feedforward.up.dequantize()
    assert ((weight.view(-1, 4) == 0).sum(1) >= 2).all()
    assert report["layers"][0]["achieved"]["sparsity"] >= 0.5


def test_inspect_and_evaluate_and_generate_a_quantized_model(teacher, espalier, tmp_path):
    out = tmp_path / "quantized"
    assert espalier("quantize", teacher, "--out", out, *SMALL, "--method", "rtn", "--bits", 3)[0] == 0
    status, output = espalier("inspect", out, "--out", tmp_path / "layers.json")
    assert status == 0, output.err
    assert "blocks.3.feedforward.down" in output.out
    layers = json.loads((tmp_path / "layers.json").read_text())["layers"]
    assert next(layer for layer in layers if layer["name"] == "blocks.0.attention.q")["bits"] < 6
    status, output = espalier("evaluate", teacher, out, *QUICK, "--out", tmp_path / "figures.json")
    assert status == 0, output.err
    figures = json.loads((tmp_path / "figures.json").read_text())
    losses = [figures["models"][str(path)]["quality"]["loss"] for path in (teacher, out)]
    assert losses[0] < losses[1] < figures["baselines"]["untrained"]["loss"]
    prompt = ["--prompt", "ba", "--max_new_tokens", 8, "--temperature", 0]
    first, second = (espalier("generate", out, *prompt)[1].out for _ in range(2))
    assert first == second
    assert first.startswith("ba")


def test_an_output_that_holds_something(teacher, espalier, refused, tmp_path):
    out = tmp_path / "quantized"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    refused("quantize", teacher, "--out", out, *SMALL, words=["already holds something", "--overwrite"])
    assert [path.name for path in out.iterdir()] == ["precious.txt"]
    status, output = espalier("quantize", teacher, "--out", out, *SMALL, "--method", "rtn", "--overwrite")
    assert status == 0, output.err
    assert not (out / "precious.txt").exists()
    assert (out / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--group_size", "0"], ["group_size", "0"]),
        (["--group_size", "row"], ["group_size", "row"]),
        (["--skip", "blocks.0.atention.q"], ["blocks.0.atention.q", "blocks.0.attention.q"]),
        (["--layers", "{'*.down': {bitz: 8}}"], ["bitz", "did you mean 'bits'"]),
        (["--layers", "{'*.down': {bits: 5}}"], ["layers, *.down", "bits of method gptq must be 2, 3, 4 or 8, not 5"]),
        (["--layers", "{'*.down': {bits: 16, method: rtn}}"], ["layers, *.down", "16 bits leave a layer as it is"]),
        (["--layers", "{'*.down': {method: rnt}}"], ["layers, *.down, method", "did you mean 'rtn'"]),
        (["--method", "{kind: gptq, damping: 2}"], ["damping"]),
        (["--method", "{kind: rtn, act_order: false}"], ["method: act_order is an option of method gptq, not of rtn"]),
        (["--method", "{kind: rtn, bits: 3}", "--bits", "4"], ["bits stands both in method and beside it"]),
        (["--method", "{kind: nf4, bits: 4}"], ["method: bits means nothing to method nf4"]),
        (["--method", "{kind: gptq, clip: {kind: mse, smallest: 2}}"], ["method.clip", "smallest"]),
        (["--bits", "5"], ["bits of method gptq must be 2, 3, 4 or 8, not 5"]),
        (["--head_bits", "4"], ["head_bits is 4", "embedding_bits"]),
        (["--samples", "-3"], ["samples"]),
        (["--device", "cuda"], ["cuda", "--device cpu"]),
    ],
)
def test_impossible_wishes(argv, words, teacher, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    refused("quantize", teacher, "--out", tmp_path / "quantized", *SMALL, *argv, words=words)
    assert list(tmp_path.iterdir()) == []


def test_a_group_size_of_minus_one_is_the_whole_row_wherever_it_stands(tmp_path):
    """As other tools write it: on the command line, in a recipe, and for single layers."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "group_size: -1\nlayers: {'*.down': {bits: 8, group_size: -1}, '*.up': {method: gptq, group_size: 16}}"
    )
    whole = ["quantize", options.Quantize, ["model", "--out", str(tmp_path / "out")]]
    for arguments in (["--group_size", "-1"], ["--group_size=-1"], ["-c", str(recipe)]):
        stage = Quantize(parse_arguments(*whole[:2], whole[2] + arguments))
        assert stage.method.format.group_size == "channel"
        assert "a scale a row" in stage.title()
    assert [method.format.group_size for method in stage.overrides().values()] == ["channel", 16]
    with pytest.raises(UserError, match="group_size must be at least 2, or channel"):
        Quantize(parse_arguments(*whole[:2], [*whole[2], "--group_size", "-2"]))

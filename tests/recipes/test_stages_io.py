"""`espalier import`, `export`, `compare`, `report`: models in from and out to other software, and side by side."""

import json
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import models
import models.checkpoint
from app.data.tokenizer import load_tokenizer
from tests.recipes.conftest import QUICK


@pytest.fixture
def llama(teacher, tmp_path):
    """A random Llama as `save_pretrained` writes it, with a tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=models.checkpoint.read_config(teacher).vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    path = tmp_path / "llama"
    LlamaForCausalLM(config).save_pretrained(path)
    AutoTokenizer.from_pretrained(teacher).save_pretrained(path)
    return path


def test_import_gives_the_same_logits_and_export_the_same_tensors(llama, espalier, tmp_path):
    status, output = espalier("import", llama, "--out", tmp_path / "imported")
    assert status == 0, output.err
    reference = AutoModelForCausalLM.from_pretrained(llama).eval()
    tokens = torch.randint(reference.config.vocab_size, (2, 16))
    with torch.no_grad():
        expected = reference(tokens).logits
        torch.testing.assert_close(models.load(tmp_path / "imported")(tokens).logits, expected, atol=1e-5, rtol=0)
    assert espalier("export", tmp_path / "imported", "--out", tmp_path / "exported")[0] == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    for name, tensor in reference.state_dict().items():
        assert torch.equal(exported.state_dict()[name], tensor), name
    history = json.loads((tmp_path / "imported" / "history.json").read_text())["stages"]
    assert [entry["stage"] for entry in history] == ["import"]


def test_a_hugging_face_folder_stands_for_a_model(llama, espalier, tmp_path):
    out = tmp_path / "pruned"
    status, output = espalier("prune", llama, "--out", out, *QUICK, "--method", "magnitude")
    assert status == 0, output.err
    assert (models.load(out).blocks[0].attention.q.weight == 0).any()


def test_compressed_tensors_export_holds_our_weights(teacher, espalier, tmp_path):
    quantized, exported = tmp_path / "quantized", tmp_path / "exported"
    argv = ["--method", "rtn", "--bits", 4, "--group_size", 32]
    assert espalier("quantize", teacher, "--out", quantized, *QUICK, *argv)[0] == 0
    status, output = espalier("export", quantized, "--out", exported, "--format", "compressed-tensors")
    assert status == 0, output.err
    loaded = AutoModelForCausalLM.from_pretrained(exported)
    loaded(torch.zeros(1, 2, dtype=torch.int64))  # the first forward unpacks
    ours = models.load(quantized).blocks[1].feedforward.up.dequantize()
    theirs = loaded.model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(theirs.detach().float(), ours, atol=0, rtol=0)


def test_a_checkpoint_is_exported_with_its_tokenizer(teacher, espalier, tmp_path):
    checkpoint, model = tmp_path / "step.ckpt", models.load(teacher)
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"hyper_parameters": {"architecture": model.config.to_dict()}, "state_dict": state}, checkpoint)
    status, output = espalier("export", checkpoint, "--out", tmp_path / "bare")
    assert status == 0, output.err
    assert "no tokenizer is written" in output.err
    load_tokenizer(teacher).save(tmp_path)  # where a run has its own
    status, output = espalier("export", checkpoint, "--out", tmp_path / "exported")
    assert status == 0, output.err
    assert "no tokenizer" not in output.err
    assert load_tokenizer(tmp_path / "exported").sha256 == load_tokenizer(teacher).sha256


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--bits", "3"], ["3-bit"]),
        (["--symmetric", "false"], ["asymmetric"]),
    ],
)
def test_exports_that_compressed_tensors_cannot_hold(argv, words, teacher, espalier, refused, tmp_path):
    quantized, out = tmp_path / "quantized", tmp_path / "exported"
    status, output = espalier(
        "quantize", teacher, "--out", quantized, *QUICK, "--method", "rtn", "--group_size", 32, *argv
    )
    assert status == 0, output.err
    refused("export", quantized, "--out", out, "--format", "compressed-tensors", words=words)
    assert not out.exists()


def test_compare_and_report(teacher, espalier, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert espalier("prune", teacher, "--out", first, *QUICK, "--method", "magnitude")[0] == 0
    assert espalier("quantize", first, "--out", second, *QUICK, "--method", "rtn", "--bits", 8)[0] == 0
    status, output = espalier("compare", teacher, second, *QUICK, "--out", tmp_path / "compared")
    assert status == 0, output.err
    compared = json.loads((tmp_path / "compared" / "report.json").read_text())
    assert compared["before"]["weights_sha256"] == models.checkpoint.hash_weights(teacher)
    assert compared["change"]["quality"]["loss"] > 0
    status, output = espalier("report", teacher, first, second, "--out", tmp_path / "page")
    assert status == 0, output.err
    page = json.loads((tmp_path / "page" / "report.json").read_text())
    assert [model["name"] for model in page["models"]] == ["teacher", "first", "second"]
    assert "http" not in (tmp_path / "page" / "report.html").read_text().replace("http://www.w3.org", "")
    status, output = espalier("compare", teacher, second, *QUICK)
    assert status == 0, output.err


def test_a_prompt_begins_with_the_token_that_documents_begin_with(teacher, espalier, monkeypatch, tmp_path):
    imported = shutil.copytree(teacher, tmp_path / "imported")
    config = json.loads((imported / "tokenizer_config.json").read_text())
    (imported / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "z", "add_bos_token": True}))
    tokenizer = load_tokenizer(imported)
    seen = []
    monkeypatch.setattr(
        "recipes.commands.generate.stream", lambda model, prompts, **options: seen.append(prompts) or []
    )
    for folder in (teacher, imported):
        status, output = espalier("generate", folder, "--prompt", "ba")
        assert status == 0, output.err
    text = tokenizer.encode("ba")
    assert seen == [[[tokenizer.eot, *text]], [[tokenizer.tokenizer.token_to_id("z"), *text]]]


def test_generate_needs_no_lightning(teacher, espalier, monkeypatch):
    """A folder is read without it: text comes seconds sooner."""
    for name in [name for name in sys.modules if name.split(".")[0] == "app"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    status, output = espalier("generate", teacher, "--prompt", "ba", "--max_new_tokens", 2)
    assert status == 0, output.err

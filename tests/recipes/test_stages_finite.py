"""Numbers that are not finite: one sentence that names the tensor or the layer, status 2, and nothing written."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from models import checkpoint, families
from models.config import ModelConfig
from models.transformer import Transformer
from tests.recipes.conftest import ARCHITECTURE, QUICK

TENSOR = "blocks.1.feedforward.up.weight"


def changed(source, target, change, tensor=TENSOR):
    """A copy of a model folder with one tensor changed in place."""
    target.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(target / "model.safetensors")
    change(tensors[tensor])
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def one(value):
    return lambda tensor: tensor.view(-1)[3:4].fill_(value)


@pytest.fixture(scope="module")
def plain(tokenizer, tmp_path_factory):
    """An untrained model with its tokenizer, as a model folder."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_dict(ARCHITECTURE | {"depth": 2, "vocab_size": tokenizer.vocab_size}))
    path = tmp_path_factory.mktemp("finite") / "plain"
    with checkpoint.writing(path) as target:
        checkpoint.save_model(model, target)
        tokenizer.save(target)
    return path


@pytest.fixture(scope="module")
def llama(plain, tmp_path_factory):
    """The same as a Hugging Face folder."""
    path = tmp_path_factory.mktemp("finite") / "llama"
    families.export_folder(models.load(plain), path, plain)
    return path


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_every_verb_names_the_tensor_that_is_not_finite(value, plain, refused, tmp_path):
    broken, out = changed(plain, tmp_path / "broken", one(value)), tmp_path / "out"
    for argv in (
        ["generate", broken, "--prompt", "ba"],
        ["generate", broken, "--prompt", "ba", "--temperature", 0],
        ["evaluate", broken, *QUICK],
        ["inspect", broken],
        ["export", broken, "--out", out],
        ["compare", plain, broken, *QUICK, "--out", out],
        ["quantize", broken, "--method", "rtn", "--out", out, *QUICK],
        ["prune", broken, "--method", "magnitude", "--out", out, *QUICK],
        ["distill", "--teacher", broken, "--out", out, *QUICK],
        ["distill", "--teacher", plain, "--student", broken, "--out", out, *QUICK],
    ):
        refused(*argv, words=[TENSOR, "NaN or infinity"])
        assert not out.exists()
        assert not (tmp_path / "out.partial").exists()


def test_a_checkpoint_and_an_import_name_it_too(llama, plain, refused, tmp_path):
    model = models.load(changed(plain, tmp_path / "broken", one(float("nan"))))
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"hyper_parameters": {"architecture": model.config.to_dict()}, "state_dict": state}, tmp_path / "a.ckpt")
    refused("inspect", tmp_path / "a.ckpt", words=[TENSOR])
    broken = changed(llama, tmp_path / "hf", one(float("nan")), "model.layers.1.mlp.up_proj.weight")
    refused("import", broken, "--out", tmp_path / "out", words=[TENSOR])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("dtype", "value"), [("float16", 1e5), ("bfloat16", 3.4e38)])
def test_a_dtype_that_is_too_narrow_is_refused(dtype, value, llama, refused, espalier, tmp_path):
    large = changed(llama, tmp_path / "large", one(value), "model.layers.1.mlp.up_proj.weight")
    words = [TENSOR, f"{value:g}", dtype]
    refused("import", large, "--out", tmp_path / "out", "--dtype", dtype, words=words)
    assert espalier("import", large, "--out", tmp_path / "imported")[0] == 0
    refused("export", tmp_path / "imported", "--out", tmp_path / "out", "--dtype", dtype, words=words)
    refused("generate", tmp_path / "imported", "--prompt", "ba", "--dtype", dtype, words=words)
    assert not (tmp_path / "out").exists()


def test_weights_that_stand_for_more_than_the_dtype_holds_are_not_exported(llama, refused, espalier, tmp_path):
    """A packed layer is finite in its file, and its dense weight overflows."""
    large = changed(llama, tmp_path / "large", one(1e5), "model.layers.1.mlp.up_proj.weight")
    quantized = tmp_path / "quantized"
    status, output = espalier("quantize", large, "--out", quantized, "--method", "rtn", "--bits", 8, *QUICK)
    assert status == 0, output.err
    words = ["model.layers.1.mlp.up_proj.weight"]
    refused("export", quantized, "--out", tmp_path / "out", "--dtype", "float16", words=words)
    assert not (tmp_path / "out").exists()


def test_a_model_whose_activations_overflow_names_the_layer(plain, refused, tmp_path):
    broken = changed(plain, tmp_path / "broken", lambda tensor: tensor.fill_(1e38))
    for argv in (
        ["generate", broken, "--prompt", "ba", "--temperature", 0],
        ["generate", broken, "--prompt", "ba"],
        ["evaluate", broken, *QUICK],
        ["compare", plain, broken, *QUICK],
        ["quantize", broken, "--method", "gptq", "--samples", 2, "--out", tmp_path / "out", *QUICK],
        ["prune", broken, "--method", "magnitude", "--out", tmp_path / "out", *QUICK],
    ):
        refused(*argv, words=["blocks.1.feedforward", "NaN or infinity"])
    assert not (tmp_path / "out").exists()


def test_tiny_temperatures_are_greedy(plain, espalier):
    texts = set()
    for temperature in (0, 1e-40, 1e-320, 1e-4):
        argv = ["--prompt", "ba", "--max_new_tokens", 8, "--temperature", temperature]
        for more in ([], ["--top_p", 0.9], ["--top_k", 5]):
            status, output = espalier("generate", plain, *argv, *more)
            assert status == 0, output.err
            texts.add(output.out)
    assert len(texts) == 1

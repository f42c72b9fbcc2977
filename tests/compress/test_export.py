"""compressed-tensors export: words against those of the library, weights against a fresh `transformers`."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from torch import nn

from compress.quantization.affine import IntFormat, quantize
from compress.quantization.export.compressed_tensors import export_compressed_tensors, words
from compress.quantization.formats.linear import PackedIntEmbedding, PackedIntLinear
from models.checkpoint import load, save_model, writing
from models.config import ModelConfig
from models.errors import UserError
from models.families import export_folder
from models.io import WEIGHTS
from models.transformer import Transformer

ARCHITECTURE = {
    "vocab_size": 90,
    "width": 64,
    "depth": 2,
    "context": 64,
    "attention": {"kind": "full", "heads": 4, "kv_heads": 2, "bias": True, "out_bias": True},
    "feedforward": {"kind": "swiglu", "width": 96},
}


def build(format, dtype=torch.float32, skip=(), **changes):
    """A random model whose linear layers, except those in `skip`, are packed."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_dict(ARCHITECTURE | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_((1 if "norm" in name else 0) + 0.2 * torch.randn(parameter.shape))
    model = model.to(dtype)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name not in skip:
            kind = format(name) if callable(format) else format
            model.set_submodule(name, PackedIntLinear.of(module, quantize(module.weight.detach(), kind)))
    return model


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("width", [64, 37])
def test_words_are_those_of_the_library(bits, width):
    codes = torch.randint(2**bits, (5, width), dtype=torch.uint8)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(words(codes, bits), pack_to_int32(signed, bits))


FRESH = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(folder / "out", dtype="auto")
    expected = load_file(folder / "expected")
    tokens = expected.pop("tokens")
    with torch.no_grad():  # the first forward unpacks the weights
        logits = (model(tokens).logits - expected.pop("logits")).abs().max().item()
    state = model.state_dict()
    weights = max((state[name].double() - weight.double()).abs().max().item() for name, weight in expected.items())
    print(json.dumps({"folder": folder.name, "weights": weights, "logits": logits}))
"""
VARIANTS = {
    "w4 g32": (IntFormat(4, 32), torch.float32, {}),
    "w4 bf16 untied": (IntFormat(4, 16), torch.bfloat16, {"head": "untied"}),
    "w4 tensor": (IntFormat(4, "tensor"), torch.float32, {}),
    "w8 channel untied": (IntFormat(8, "channel"), torch.float32, {"head": "untied"}),
    "w8 channel bf16": (IntFormat(8, "channel"), torch.bfloat16, {}),
    "w8 fp32 scales": (IntFormat(8, 32, scale_dtype="float32"), torch.float32, {}),
    "w2 fp16": (IntFormat(2, 8, scale_dtype="float16"), torch.float16, {}),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """What one fresh process of `transformers` finds in every variant's export, by the variant's name."""
    root = tmp_path_factory.mktemp("exports")
    tokens = torch.randint(90, (2, 17))
    for name, (format, dtype, changes) in VARIANTS.items():
        model = build(format, dtype, **changes)
        notes = export_compressed_tensors(model, root / name / "out")
        assert len(notes) == (format.dtype != dtype)
        assert all("the scales are stored as torch.float32" in note for note in notes)
        export_folder(model, root / name / "dense")  # the weights that we run, under the names of the family
        weights = load_file(root / name / "dense" / WEIGHTS)
        with torch.no_grad():
            save_file(weights | {"tokens": tokens, "logits": model(tokens).logits}, root / name / "expected")
    done = subprocess.run([sys.executable, "-c", FRESH, root], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return root, {item["folder"]: item for item in found}


@pytest.mark.parametrize("name", VARIANTS)
def test_transformers_loads_the_very_weights_that_we_run(loaded, name):
    root, found = loaded
    assert found[name]["weights"] == 0.0
    spread = load_file(root / name / "expected")["logits"].float().std()
    assert found[name]["logits"] < (1e-4 if VARIANTS[name][1] == torch.float32 else 0.3 * spread)
    assert (root / name / "out" / WEIGHTS).stat().st_size < (root / name / "dense" / WEIGHTS).stat().st_size


def test_layers_left_dense_are_named_to_the_reader(tmp_path):
    model = build(IntFormat(4, 32), skip=("blocks.1.attention.o", "head"), head="untied")
    export_compressed_tensors(model, tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["quantization_config"]["ignore"] == ["model.layers.1.self_attn.o_proj", "lm_head"]
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert torch.equal(tensors["lm_head.weight"], model.head.weight)


def test_a_packed_embedding_is_written_dense_and_said_so(tmp_path):
    model = build(IntFormat(4, 32))
    embedding = PackedIntEmbedding.of(model.embedding, quantize(model.embedding.weight.detach(), IntFormat(8, 32)))
    model.embedding = embedding
    notes = export_compressed_tensors(model, tmp_path / "out")
    assert notes[0] == "the embedding is stored dense: compressed-tensors packs linear layers only"
    assert torch.equal(load_file(tmp_path / "out" / WEIGHTS)["model.embed_tokens.weight"], embedding.dequantize())


@pytest.mark.parametrize(
    ("format", "dtype", "message"),
    [
        (IntFormat(4, 32, symmetric=False), torch.float32, "asymmetric weights cannot be exported"),
        (IntFormat(3, 32), torch.float32, "3-bit weights cannot be exported"),
        (IntFormat(4, 48), torch.float32, "blocks.0.attention.q has 64 inputs, no multiple of the group size 48"),
        (lambda name: IntFormat(8 if "down" in name else 4, 32), torch.float32, "same format in all packed layers"),
        (
            IntFormat(4, 32, scale_dtype="float16"),
            torch.bfloat16,
            "scales in float16 do not fit a model in torch.bfloat16",
        ),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, format, dtype, message):
    with pytest.raises(UserError, match=message):
        export_compressed_tensors(build(format, dtype), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dense_model_and_a_foreign_architecture_are_refused(tmp_path):
    dense = Transformer(ModelConfig.from_dict(ARCHITECTURE))
    with pytest.raises(UserError, match="no linear layer of packed integers"):
        export_compressed_tensors(dense, tmp_path / "out")
    with pytest.raises(UserError, match="no Hugging Face family can hold this model .*post"):
        export_compressed_tensors(build(IntFormat(4, 32), norm={"kind": "rms", "position": "post"}), tmp_path / "out")
    with pytest.raises(UserError, match="not layer pre"):
        export_compressed_tensors(build(IntFormat(4, 32), norm="layer"), tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_model_folder_comes_back_and_runs_alike(tmp_path, dtype):
    model = build(IntFormat(4, 32, symmetric=False), dtype, head="untied")
    model.embedding = PackedIntEmbedding.of(
        model.embedding, quantize(model.embedding.weight.detach(), IntFormat(3, 16))
    )
    model.config = replace(model.config, compression={})  # what is saved describes the modules as they are
    tokens = torch.randint(90, (2, 9))
    with torch.no_grad():
        expected = model(tokens).logits
    with writing(tmp_path / "m") as directory:
        save_model(model, directory)
    loaded = load(tmp_path / "m")
    assert loaded.config.compression["blocks.0.attention.q"]["bits"] == 4
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, expected)
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    half = load(tmp_path / "m", dtype=torch.bfloat16)
    with torch.no_grad():
        assert half(tokens).logits.dtype == torch.bfloat16

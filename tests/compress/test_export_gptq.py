"""GPTQ export: what an independent reader of the files makes of them in a fresh process, and GPTQModel where it is."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.data.tokenizer import train_tokenizer
from compress.quantization.affine import IntFormat, quantize
from compress.quantization.export.gptq import export_gptq
from compress.quantization.formats.linear import PackedIntEmbedding
from models.errors import UserError
from models.families import export_folder
from models.io import WEIGHTS
from tests.compress.test_export import build

# Reads the files by their description alone: of a stream of 32 values of b bits in b words, value i has the bits
# b i .. b i + b - 1, counted from the lowest of the first word. What it makes of them goes through transformers.
READER = """
import json, sys
from pathlib import Path
import numpy, torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

def unpack(words, bits):  # (words, columns) int32 -> (values, columns)
    values = []
    for first in range(0, len(words), bits):
        block = words[first : first + bits].astype(numpy.uint32).T.tolist()
        column = [sum(word << 32 * j for j, word in enumerate(words_of)) for words_of in block]
        values += [[(word >> bits * i) % 2**bits for word in column] for i in range(32)]
    return torch.tensor(values, dtype=torch.float64)

for folder in sorted(Path(sys.argv[1]).iterdir()):
    settings = json.loads((folder / "out" / "quantize_config.json").read_text())
    assert settings == json.loads((folder / "out" / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == "gptq" and settings["checkpoint_format"] == "gptq_v2"
    assert settings["desc_act"] is False
    tensors, bits = load_file(folder / "out" / "model.safetensors"), settings["bits"]
    for name in [name for name in tensors if name.endswith(".qweight")]:
        layer = name.removesuffix(".qweight")
        codes = unpack(tensors.pop(name).numpy(), bits)  # (K, N)
        zeros = unpack(tensors.pop(layer + ".qzeros").numpy().T, bits).T  # (G, N)
        index = tensors.pop(layer + ".g_idx").long()
        size = settings["group_size"]
        assert torch.equal(index, torch.arange(len(codes)) // (len(codes) if size == -1 else size))
        assert not settings["sym"] or bool((zeros == 2 ** (bits - 1)).all())
        scales = tensors.pop(layer + ".scales")
        assert scales.dtype == torch.float16
        tensors[layer + ".weight"] = ((codes - zeros[index]) * scales.double()[index]).T
    expected = load_file(folder / "expected")
    tokens, logits = expected.pop("tokens"), expected.pop("logits")
    assert tensors.keys() == expected.keys()
    weights = max((tensors[name].double() - expected[name].double()).abs().max().item() for name in expected)
    config = AutoConfig.from_pretrained(folder / "out")
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    model.tie_weights()
    with torch.no_grad():
        found = (model(tokens).logits - logits).abs().max().item()
    print(json.dumps({"folder": folder.name, "weights": weights, "logits": found}))
"""
VARIANTS = {
    "w2 g16": (IntFormat(2, 16, symmetric=False), {}),
    "w3 g32": (IntFormat(3, 32, symmetric=False), {"head": "untied"}),
    "w3 symmetric channel": (IntFormat(3, "channel"), {}),
    "w4 g32": (IntFormat(4, 32, symmetric=False), {}),
    "w4 symmetric g32": (IntFormat(4, 32, scale_dtype="float16"), {}),
    "w4 tensor": (IntFormat(4, "tensor", symmetric=False), {}),
    "w8 symmetric channel": (IntFormat(8, "channel"), {"head": "untied"}),
    "w8 g64": (IntFormat(8, 32, symmetric=False), {}),
}
SIZES = {"vocab_size": 96}  # the head of an untied model is packed too, in whole words


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder a variant: the export, and beside it the dense weights that we run and their logits."""
    place, source = tmp_path_factory.mktemp("exports"), tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["a text"], 300).save(source)
    tokens = torch.randint(90, (2, 17))
    for name, (format, changes) in VARIANTS.items():
        model = build(format, **SIZES, **changes)
        assert export_gptq(model, place / name / "out", source) == []
        export_folder(model, place / name / "dense")
        weights = load_file(place / name / "dense" / WEIGHTS)
        with torch.no_grad():
            save_file(weights | {"tokens": tokens, "logits": model(tokens).logits}, place / name / "expected")
    return place


@pytest.fixture(scope="module")
def loaded(root):
    """What the reader finds in every export, by the variant's name."""
    done = subprocess.run([sys.executable, "-c", READER, root], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {item["folder"]: item for item in found}


@pytest.mark.parametrize("name", VARIANTS)
def test_an_independent_reader_finds_the_very_weights_that_we_run(root, loaded, name):
    assert loaded[name]["weights"] == 0.0
    assert loaded[name]["logits"] < 1e-4
    assert (root / name / "out" / WEIGHTS).stat().st_size < (root / name / "dense" / WEIGHTS).stat().st_size


GPTQMODEL = """
import json, sys, torch
from pathlib import Path
from gptqmodel import BACKEND, GPTQModel
from safetensors.torch import load_file
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = GPTQModel.load(str(folder / "out"), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model
    expected = load_file(folder / "expected")
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            weight = module.dequantize_weight().T.double()  # rounded once, to fp16
            found[name] = (weight - expected[name + ".weight"].half().double()).abs().max().item()
    print(json.dumps({"folder": folder.name, "layers": len(found), "weights": max(found.values())}))
"""


@pytest.mark.skipif(importlib.util.find_spec("gptqmodel") is None, reason="GPTQModel is not installed")
def test_gptqmodel_loads_the_very_weights_that_we_run(root):
    done = subprocess.run([sys.executable, "-c", GPTQMODEL, root], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"folder"')]
    assert {item["folder"]: item["weights"] for item in found} == dict.fromkeys(VARIANTS, 0.0)
    assert all(item["layers"] >= 14 for item in found)


def test_layers_left_dense_are_named_to_the_reader(tmp_path):
    model = build(IntFormat(4, 32), skip=("blocks.1.attention.o", "head"), head="untied", **SIZES)
    export_gptq(model, tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "quantize_config.json").read_text())
    assert settings["dynamic"] == {r"-:^model\.layers\.1\.self_attn\.o_proj$": {}}
    assert settings["lm_head"] is False
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert torch.equal(tensors["lm_head.weight"], model.head.weight)
    assert "model.layers.1.self_attn.o_proj.weight" in tensors


def test_a_packed_embedding_is_written_dense_and_said_so(tmp_path):
    model = build(IntFormat(4, 32), **SIZES)
    model.embedding = PackedIntEmbedding.of(
        model.embedding, quantize(model.embedding.weight.detach(), IntFormat(8, 32))
    )
    assert export_gptq(model, tmp_path / "out") == ["the embedding is stored dense: GPTQ files pack linear layers only"]
    assert torch.equal(load_file(tmp_path / "out" / WEIGHTS)["model.embed_tokens.weight"], model.embedding.dequantize())


@pytest.mark.parametrize(
    ("format", "changes", "message"),
    [
        (IntFormat(4, 48), {}, "blocks.0.attention.q has 64 inputs, no multiple of the group size 48"),
        (lambda name: IntFormat(8 if "down" in name else 4, 32), {}, "GPTQ export needs the same format"),
        (IntFormat(4, 32, scale_dtype="float32"), {}, "blocks.0.attention.q has scales in float32"),
        (IntFormat(4, "channel"), {"head": "untied", "vocab_size": 90}, "head has 90 outputs; .* a multiple of 32"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(tmp_path, format, changes, message):
    with pytest.raises(UserError, match=message):
        export_gptq(build(format, **changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_group_of_zeros_is_no_obstacle(tmp_path):
    """Its scale is the least number there is, which fp16 has no equal of; its weights are zero all the same."""
    model = build(IntFormat(4, 32), **SIZES)
    layer = model.blocks[0].attention.q
    weight = layer.dequantize()
    weight[:, :32] = 0
    layer.fill(quantize(weight, IntFormat(4, 32)))
    export_gptq(model, tmp_path / "out")
    scales = load_file(tmp_path / "out" / WEIGHTS)["model.layers.0.self_attn.q_proj.scales"]
    assert bool((scales[0] == 0).all())

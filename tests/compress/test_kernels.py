"""The table of kernels over all stored forms: what runs where, said of every layer, saved and loaded."""

import importlib
from importlib.metadata import entry_points

import pytest
import torch
from torch import nn

from app.evaluation.size import kernels, layer_sizes
from compress.quantization.affine import IntFormat
from compress.quantization.kernels.dispatch import TABLE, choose, kernel_for
from compress.quantization.kernels.int8 import Dynamic, Outliers
from compress.quantization.methods.fp8 import Fp8
from compress.quantization.methods.int8 import Int8
from compress.quantization.methods.nf4 import Nf4
from compress.quantization.methods.rtn import Rtn
from compress.quantization.plan import quantize_model
from models.checkpoint import load, save_model, writing
from models.config import ModelConfig
from models.transformer import Transformer
from models.weight_formats import GROUP, form_of

EIGHT = Rtn(IntFormat(8, "channel"))
METHODS = {
    "int4": (Rtn(IntFormat(4, 32)), EIGHT),
    "nf4": (Nf4(), Nf4()),
    "nf4 twice": (Nf4(double_quantization=True), Nf4(double_quantization=True)),
    "llm.int8": (Int8(Outliers()), EIGHT),
    "w8a8": (Int8(Dynamic()), EIGHT),
    "fp8": (Fp8(), EIGHT),
    "fp8 weights": (Fp8("none"), EIGHT),
}


def build(head="untied"):
    torch.manual_seed(0)
    config = {
        "width": 64,
        "depth": 2,
        "vocab_size": 96,
        "context": 64,
        "head": head,
        "position": "rope",
        "attention": {"kind": "full", "heads": 4, "bias": True},
        "feedforward": {"kind": "swiglu", "width": 128},
    }
    return Transformer(ModelConfig.from_dict(config)).eval()


@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_a_model_of_every_form_is_saved_and_loaded_as_it_ran(tmp_path, name, dtype, head):
    method, ends = METHODS[name]
    model, tokens = build(head), torch.randint(0, 96, (2, 16))
    with torch.no_grad():
        dense = model(tokens).logits
    records = quantize_model(model, method, embedding=ends, head=ends)
    assert not any(record.skipped for record in records)
    model.to(dtype)
    with torch.no_grad():
        before = model(tokens).logits
    assert float((before.float() - dense).norm() / dense.norm()) < 0.25
    with writing(tmp_path / "m") as folder:
        save_model(model, folder)
    again = load(tmp_path / "m")
    assert again.config == model.config
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, before)


def test_every_row_names_what_it_runs_and_every_form_a_class():
    assert len({(row.device, row.name, row.format) for row in TABLE}) == len(TABLE)
    for row in TABLE:
        package, _, operator = row.name.partition("::")
        assert package in ("aten", "bitsandbytes")
        if package == "aten":
            assert hasattr(torch.ops.aten, operator)
        else:
            pytest.importorskip("bitsandbytes")
            assert hasattr(torch.ops.bitsandbytes, operator)
        assert row.largest_batch is None or row.largest_batch >= 1
    for point in entry_points(group=GROUP):
        module, _, name = point.value.partition(":")
        assert hasattr(getattr(importlib.import_module(module), name), "choice")


@pytest.mark.parametrize("name", METHODS)
def test_the_choice_is_what_runs(name, monkeypatch):
    """Up to the limit the kernel, above it the dense weights; on a device without one the reason, in one sentence."""
    method, _ = METHODS[name]
    layer = method.compress("layer", nn.Linear(64, 64), None)[0]
    choice = kernel_for(layer)
    assert (choice.kernel is None) == bool(choice.reason)
    unpacked = []
    monkeypatch.setattr(type(layer), "unpacked", lambda self, x: unpacked.append(len(x)) or x)
    with torch.no_grad():
        layer.multiply(torch.randn(1, 64).bfloat16())
        assert unpacked == ([] if choice.kernel else [1])
        if choice.largest_batch is not None:
            over = choice.largest_batch + 1
            layer.multiply(torch.randn(over, 64).bfloat16())
            assert unpacked == [over]
            assert str(choice.largest_batch) in kernel_for(layer, "cpu", over).reason
    assert kernel_for(layer, "mps").reason == "no packed kernel on mps"


def test_inspect_says_of_every_layer_what_runs_it_and_how_far():
    model = build().bfloat16()
    quantize_model(model, METHODS["int4"][0], overrides={"blocks.1.*": Int8(Dynamic())})
    rows = {row.name: row for row in layer_sizes(model)}
    assert rows["blocks.0.attention.q"].kernel == "aten::_weight_int4pack_mm_for_cpu"
    assert rows["blocks.0.attention.q"].largest_batch == choose(IntFormat(4, 32), (64, 64), "cpu", 1).largest_batch
    assert rows["blocks.1.attention.q"].kernel == "aten::_int_mm"
    assert rows["blocks.1.attention.q"].largest_batch is None
    assert rows["head"].kernel == "aten::linear"
    found = kernels(model)
    assert [one["kernel"] for one in found] == ["aten::linear", rows["blocks.0.attention.q"].kernel, "aten::_int_mm"]
    named = {name for one in found for name in one["layers"]}
    assert named == {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) or form_of(module)
    }

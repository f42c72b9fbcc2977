"""A model of retention, convolution and attention is compressed like any other, or says why it is not."""

import pytest
import torch
from torch import nn

from compress.pruning.patterns import Unstructured
from compress.pruning.sparsify import sparsify
from compress.pruning.structured.sequential import prune_structured
from compress.quantization.affine import IntFormat
from compress.quantization.methods.gptq import Gptq
from compress.quantization.methods.rtn import Rtn
from compress.quantization.plan import quantize_model
from models.checkpoint import load, save_model, writing
from models.config import ModelConfig
from models.errors import UserError
from models.generation import generate
from models.transformer import Transformer

MIXERS = {
    "retention": {"kind": "retention", "heads": 4},
    "convolution": {"kind": "convolution"},
    "full": {"kind": "full", "heads": 4, "kv_heads": 2},
}


FEEDFORWARD = {"kind": "swiglu", "width": 48}


def build(*names):
    torch.manual_seed(0)
    config = {"width": 32, "depth": len(names), "vocab_size": 96, "context": 64, "layers": list(names),
              "position": "rope" if {*names} - {"convolution"} else "none",
              "attention": {name: MIXERS[name] for name in names}, "feedforward": FEEDFORWARD}  # fmt: skip
    return Transformer(ModelConfig.from_dict(config)).eval()


def batches():
    return [{"tokens": torch.randint(0, 96, (4, 24), generator=torch.Generator().manual_seed(7))}]


def linears(model):
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("method", [Rtn, Gptq])
def test_every_linear_map_of_every_mixer_is_quantized_and_stored(tmp_path, method):
    model = build("retention", "convolution", "full")
    maps = linears(model)
    records = quantize_model(model, method(IntFormat(4, 16)), batches())
    assert {record.name for record in records if not record.skipped} == maps
    assert {record.name for record in records if record.skipped} == {"embedding"}
    with writing(tmp_path / "m") as folder:
        save_model(model, folder)
    again = load(tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(again(batches()[0]["tokens"]).logits, model(batches()[0]["tokens"]).logits)
    assert generate(again, [[1, 2, 3], [4]], max_new_tokens=4) == generate(model, [[1, 2, 3], [4]], max_new_tokens=4)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "sparsegpt"])
def test_every_linear_map_of_every_mixer_is_thinned(criterion):
    model = build("retention", "convolution", "full")
    sparsify(model, criterion, Unstructured(0.5, "row"), batches())
    for name in linears(model):
        assert float((model.get_submodule(name).weight == 0).float().mean()) == 0.5


def test_neurons_go_from_every_block_and_heads_from_those_that_have_free_ones():
    model = build("retention", "convolution", "full")
    records = prune_structured(model, ["neurons", "groups"], 0.5, "variance", batches())
    assert [layer.feedforward.width for layer in model.config.layers] == [24, 24, 24]
    retention, _, full = (layer.attention for layer in model.config.layers)
    assert (retention.heads, full.heads, full.kv_heads) == (4, 2, 1)
    notes = {record.name: record.note for record in records if record.skipped}
    assert (
        notes["blocks.0.attention.q"]
        == notes["blocks.1.attention.v"]
        == ("no neurons, heads or groups that this method knows")
    )
    assert model(batches()[0]["tokens"]).logits.isfinite().all()


@pytest.mark.parametrize("target", ["heads", "groups"])
@pytest.mark.parametrize(("mixer", "why"), [("retention", "follows from its number"), ("convolution", "it has none")])
def test_heads_that_are_bound_or_not_there_are_not_cut(mixer, why, target):
    with pytest.raises(UserError, match=f"heads of block 0 cannot be cut: .*{why}; cut neurons instead"):
        prune_structured(build(mixer, mixer), [target], 0.5, "magnitude")

"""Mixtral and Qwen3-MoE against `transformers`, through files: logits, byte-equal round trips, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from models.checkpoint import load, save_model, writing
from models.config import ModelConfig
from models.errors import UserError
from models.experts import BALANCES, ROUTERS, Capacity, StackedExperts
from models.experts.layout import separate
from models.families import export_folder, import_folder
from models.feedforward import Swiglu
from models.io import WEIGHTS
from models.transformer import Transformer

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
QWEN = {"moe_intermediate_size": 24, "num_experts": 5, "num_experts_per_tok": 3, "head_dim": 12}
CONFIGS = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4}),
    "mixtral of a window": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4, "sliding_window": 5}),
    "mixtral of one expert a token": (
        MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 1}
    ),
    "qwen3 of one expert a token": (
        Qwen3MoeForCausalLM, Qwen3MoeConfig, QWEN | {"num_experts_per_tok": 1, "norm_topk_prob": True}
    ),
    "mixtral, tied": (
        MixtralForCausalLM,
        MixtralConfig,
        {"num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 12, "tie_word_embeddings": True,
         "router_aux_loss_coef": 0.02, "router_jitter_noise": 0.01},
    ),
    "qwen3": (Qwen3MoeForCausalLM, Qwen3MoeConfig, QWEN),
    "qwen3, renormalised": (
        Qwen3MoeForCausalLM, Qwen3MoeConfig, QWEN | {"norm_topk_prob": True, "attention_bias": True}
    ),
    "qwen3, dense layers": (Qwen3MoeForCausalLM, Qwen3MoeConfig, QWEN | {"mlp_only_layers": [0, 2]}),
    "qwen3, every other layer": (Qwen3MoeForCausalLM, Qwen3MoeConfig, QWEN | {"decoder_sparse_step": 2}),
    "qwen3 of a window": (
        Qwen3MoeForCausalLM, Qwen3MoeConfig, QWEN | {"use_sliding_window": True, "sliding_window": 7}
    ),
}  # fmt: skip
TOKENS = torch.randint(97, (2, 33), generator=torch.Generator().manual_seed(3))


def theirs(name, dtype=torch.float32):
    """A model of theirs with random norms and biases too, and weights large enough to matter."""
    model_class, config_class, changes = CONFIGS[name]
    model = model_class(config_class(**SMALL | changes))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in key else 0.15 * noise)
    return model.eval().to(dtype)


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_import_gives_the_logits_of_transformers(tmp_path, name):
    model = theirs(name)
    ours = import_folder(saved(model, tmp_path / "hf"))
    expected = logits(model)
    assert expected.std() > 0.1
    assert (logits(ours) - expected).abs().max() < 1e-5
    mixtures = [block.feedforward for block in ours.blocks if hasattr(block.feedforward, "experts")]
    assert mixtures
    assert all(isinstance(mixture.experts, StackedExperts) for mixture in mixtures)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_import_then_export_is_byte_equal(tmp_path, name, dtype):
    source = saved(theirs(name, dtype), tmp_path / "hf")
    export_folder(import_folder(source), tmp_path / "out", source)
    before, after = load_file(source / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys()
    for tensor, copy in ((before[key], after[key]) for key in before):
        assert tensor.dtype == copy.dtype == dtype
        assert torch.equal(tensor.view(torch.uint8), copy.view(torch.uint8))
    config_class = CONFIGS[name][1]
    old, new = (config_class.from_pretrained(folder).to_dict() for folder in (source, tmp_path / "out"))
    free = {"_name_or_path", "head_dim", "decoder_sparse_step", "mlp_only_layers", "intermediate_size"}
    assert {key: new[key] for key in old.keys() - free} == {key: old[key] for key in old.keys() - free}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_export_loads_in_transformers(tmp_path, name):
    model = import_folder(saved(theirs(name), tmp_path / "hf"))
    export_folder(model, tmp_path / "out", tmp_path / "hf")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert (logits(loaded) - logits(model)).abs().max() < 1e-5
    assert type(loaded) is CONFIGS[name][0]


def test_either_layout_writes_the_same_file(tmp_path):
    model = import_folder(saved(theirs("mixtral"), tmp_path / "hf"))
    export_folder(model, tmp_path / "stacked")
    separate(model)
    export_folder(model, tmp_path / "separate")
    assert (tmp_path / "stacked" / WEIGHTS).read_bytes() == (tmp_path / "separate" / WEIGHTS).read_bytes()


def test_our_own_folder_keeps_what_was_imported(tmp_path):
    model = import_folder(saved(theirs("qwen3, dense layers"), tmp_path / "hf"))
    with writing(tmp_path / "ours") as folder:
        save_model(model, folder)
    assert torch.equal(logits(load(tmp_path / "ours")), logits(model))


def test_the_coefficient_of_the_auxiliary_loss_becomes_a_balance(tmp_path):
    spec = import_folder(saved(theirs("mixtral, tied"), tmp_path / "hf")).config.layers[0].feedforward
    assert [(balance.kind, balance.per) for balance in spec.balance] == [("auxiliary", "batch")]
    assert spec.balance[0].weight == pytest.approx(0.02 * 3)
    assert spec.router.jitter == 0.01


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mixtral", {"num_local_experts": 3}, "hold model.layers.0.block_sparse_moe"),
        ("mixtral", {"num_experts_per_tok": 5}, "top_k must be from 1 to the 4 experts"),
        ("mixtral", {"hidden_act": "tanh"}, "hidden_act 'tanh' is not supported"),
        ("qwen3", {"mlp_only_layers": [7]}, "mlp_only_layers must be a list of layers from 0 to 2"),
        ("qwen3", {"mlp_only_layers": [0, 1, 2]}, "leave none of 3 layers with experts"),
        ("qwen3", {"decoder_sparse_step": 9}, "leave none of 3 layers with experts"),
    ],
)
def test_what_cannot_be_imported_is_refused_with_the_reason(tmp_path, name, change, message):
    folder = saved(theirs(name), tmp_path / "hf")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=message) as caught:
        import_folder(folder)
    assert str(folder) in str(caught.value)


def ours(first=None, **changes):
    """A model of ours with experts that have these changes; `first` of the first layer alone."""
    moe = {"kind": "experts", "count": 4, "top_k": 2, "expert": {"kind": "swiglu", "width": 16}}
    values = {"vocab_size": 50, "width": 32, "depth": 2, "head": "untied", "attention": {"kind": "full", "heads": 4}}
    config = ModelConfig.from_dict(values | {"feedforward": moe})
    layers = [replace(layer, feedforward=replace(layer.feedforward, **changes)) for layer in config.layers]
    if first is not None:
        layers[0] = replace(layers[0], **first)
    return Transformer(replace(config, layers=tuple(layers)))


AUXILIARY = BALANCES["auxiliary"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shared": Swiglu(width=8)}, "mixtral: it has no shared expert"),
        ({"router": ROUTERS["sigmoid"]()}, "mixtral: its router is softmax, not sigmoid"),
        ({"balance": (BALANCES["bias"](),)}, "mixtral: its balance is auxiliary, not bias"),
        ({"balance": (BALANCES["z_loss"](),)}, "mixtral: its balance is auxiliary, not z_loss"),
        ({"balance": (AUXILIARY(per="sequence"),)}, "mixtral: its auxiliary loss is per batch, not per sequence"),
        ({"balance": (AUXILIARY(choices="first"),)}, "mixtral: its auxiliary loss counts all choices"),
        ({"balance": (AUXILIARY(), AUXILIARY())}, "mixtral: it has one auxiliary loss"),
        ({"capacity": Capacity()}, "mixtral: its experts have no capacity"),
        ({"router": ROUTERS["softmax"](weights="probability")}, "mixtral: its router's weights are renormalised"),
        ({"expert": Swiglu(width=16, bias=True)}, "mixtral: its experts are swiglu without biases"),
        ({}, "qwen3_moe: its attention has a qk_norm"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_refused_with_the_reason(tmp_path, changes, message):
    model = ours(**changes)
    if not changes:  # a Mixtral, so only the other family refuses it
        model = ours(first={"feedforward": Swiglu(width=16)})
    with pytest.raises(UserError, match=message):
        export_folder(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_of_ours_is_exported_as_a_mixtral(tmp_path):
    model = ours(balance=(AUXILIARY(weight=0.02),)).eval()
    export_folder(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded) is MixtralForCausalLM
    assert loaded.config.router_aux_loss_coef == 0.01
    tokens = TOKENS % 50
    with torch.no_grad():
        assert (loaded(tokens).logits - model(tokens).logits).abs().max() < 1e-5

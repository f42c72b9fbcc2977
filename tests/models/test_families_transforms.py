"""Families whose files hold our tensors in another form (fused, transposed, as 1 + w), against `transformers`."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    Phi3Config,
)

from compress.quantization.affine import IntFormat, quantize
from compress.quantization.export.compressed_tensors import export_compressed_tensors
from compress.quantization.export.gptq import export_gptq
from compress.quantization.formats.linear import PackedIntLinear
from models.checkpoint import load, save_model
from models.errors import UserError
from models.families import export_folder, import_folder
from models.io import WEIGHTS
from models.linear import Linear
from tests.models.test_families_llama import logits, ours, randomise, saved

SMALL = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "max_position_embeddings": 64}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
GPT2 = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
CONFIGS = {
    "gpt2": GPT2Config(**GPT2),
    "gpt2 untied relu": GPT2Config(**GPT2, n_inner=48, activation_function="relu", tie_word_embeddings=False),
    "gpt_neox": GPTNeoXConfig(**SMALL),
    "gpt_neox in turn": GPTNeoXConfig(
        **SMALL,
        use_parallel_residual=False,
        attention_bias=False,
        tie_word_embeddings=True,
        hidden_act="gelu_pytorch_tanh",
    ),
    "phi3": Phi3Config(**SMALL, num_key_value_heads=2, rope_parameters=PARTIAL, pad_token_id=0),
    "phi3 window": Phi3Config(**SMALL, rope_parameters=PARTIAL, sliding_window=7, pad_token_id=0),
    "gemma": GemmaConfig(**SMALL, num_key_value_heads=1, head_dim=32),
    "gemma bias": GemmaConfig(**SMALL, num_key_value_heads=4, head_dim=12, attention_bias=True, hidden_act="gelu"),
}


def theirs(name, dtype=torch.float32):
    model = randomise(AutoModelForCausalLM.from_config(CONFIGS[name])).to(dtype)
    if name.startswith("gemma"):
        with torch.no_grad():
            for part, parameter in model.named_parameters():
                if "norm" in part:
                    parameter.sub_(1)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_files_both_ways(tmp_path, name):
    model = theirs(name)
    imported = import_folder(saved(model, tmp_path / "hf"))
    expected = logits(model)
    assert expected.std() > 0.1
    assert (logits(imported) - expected).abs().max() < 1e-5
    (tmp_path / "ours").mkdir()
    save_model(imported, tmp_path / "ours")  # no two of its tensors share memory
    export_folder(load(tmp_path / "ours"), tmp_path / "out", tmp_path / "hf")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert type(loaded) is type(model)
    assert (logits(loaded) - expected).abs().max() < 1e-5
    old, new = (json.loads((tmp_path / part / "config.json").read_text()) for part in ("hf", "out"))
    numbers = type(CONFIGS[name])
    wanted, found = (numbers.from_dict(values).to_dict() for values in (old, new))
    assert wanted == {key: found[key] for key in wanted} | ({"n_inner": None} if name == "gpt2" else {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_import_then_export_is_byte_equal(tmp_path, name, dtype):
    source = saved(theirs(name, dtype), tmp_path / "hf")
    export_folder(import_folder(source), tmp_path / "out", source)
    before, after = load_file(source / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    renamed = {key.replace("embed_out.", "lm_head."): tensor for key, tensor in before.items()}
    assert renamed.keys() == {key.replace("embed_out.", "lm_head.") for key in after}
    for key, tensor in after.items():
        assert tensor.dtype == dtype
        copy = renamed[key.replace("embed_out.", "lm_head.")]
        assert torch.equal(tensor.view(torch.uint8), copy.view(torch.uint8))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_old_files_have_masks_and_no_prefix_or_another_head(tmp_path, name):
    model = theirs(name)
    folder = saved(model, tmp_path / "hf")
    tensors = load_file(folder / WEIGHTS)
    if name == "gpt2":
        tensors = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
        tensors |= {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    else:
        tensors = {key.replace("lm_head.", "embed_out."): tensor for key, tensor in tensors.items()}
        tensors |= {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 64, 64)}
        tensors |= {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2)}
    save_file(tensors, folder / WEIGHTS)
    assert (logits(import_folder(folder)) - logits(model)).abs().max() < 1e-5


def test_the_numbers_of_version_4_are_read(tmp_path):
    model = theirs("gpt_neox")
    folder = saved(model, tmp_path / "hf")
    values = json.loads((folder / "config.json").read_text())
    del values["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(values | {"rotary_pct": 0.25, "rotary_emb_base": 10000}))
    assert (logits(import_folder(folder)) - logits(model)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: true is not supported"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights: false is not supported"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention: true is not supported"),
        ("gpt2", {"embd_pdrop": 0.3}, r"embd_pdrop 0\.3 and resid_pdrop 0\.1 differ"),
        ("gpt2", {"activation_function": "tanh"}, "activation_function 'tanh' is not supported"),
        ("gpt2", {"n_inner": 47}, r"shape \[64, 256\]; config.json calls for \[64, 47\]"),
        ("gpt_neox", {"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' is not supported"),
        ("gpt_neox", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "rope_type 'longrope' is not supported"),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "scales its RoPE in no way .* not by yarn"),
        ("phi3", {"resid_pdrop": 0.1}, r"embd_pdrop 0\.0 and resid_pdrop 0\.1 differ"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention: true is not supported"),
    ],
)
def test_what_cannot_be_imported_is_refused_with_the_reason(tmp_path, name, change, message):
    folder = saved(theirs(name), tmp_path / "hf")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=message):
        import_folder(folder)


MLP = {"kind": "mlp", "width": 80}
LEARNED = {"norm": "layer", "position": "learned", "feedforward": MLP}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (LEARNED, "gpt2: it has as many kv_heads as heads, not 2 of 6"),
        (LEARNED | {"attention": {"kind": "full", "heads": 4, "head_width": 8}}, "48 channels, not 32"),
        (LEARNED | {"attention": {"kind": "full", "heads": 6, "softcap": 3.0}}, "gpt2: its attention has no softcap"),
        (LEARNED | {"position": "sinusoidal"}, "gpt2: it has one learned position in all layers, not sinusoidal"),
        (LEARNED | {"order": "parallel"}, "gpt2: every layer has its attention first, and layer 0 is parallel"),
        ({"norm": {"kind": "rms", "offset": 1.0}}, "gemma: its embedding_scale is sqrt_width, and this model's is 1.0"),
        (
            {
                "norm": {"kind": "rms", "offset": 1.0},
                "embedding_scale": "sqrt_width",
                "feedforward": {"kind": "swiglu", "width": 8, "activation": "gelu"},
            },
            "gemma: its gelu is gelu_tanh",
        ),
        (
            {"position": {"kind": "rope", "fraction": 0.5, "scaling": {"kind": "linear", "factor": 2.0}}},
            "phi3 file scales",
        ),
    ],
)
def test_what_the_format_cannot_hold_is_refused_with_the_reason(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        export_folder(ours(**changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_biases_that_the_format_wants_and_we_lack_are_zeros(tmp_path):
    bare = {"bias": False, "out_bias": False}
    heads = {"kind": "full", "heads": 6}
    model = ours(norm={"kind": "layer", "bias": False}, position="learned", feedforward=MLP | bare, attention=heads)
    export_folder(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(loaded) - logits(model)).abs().max() < 1e-5


def packed(name, folder, format, skip=()):
    """An imported model whose linear layers are packed, except the head and those that `skip` names."""
    model = import_folder(saved(theirs(name), folder))
    for path, module in list(model.named_modules()):
        if isinstance(module, Linear) and path not in ("head", *skip):
            model.set_submodule(path, PackedIntLinear.of(module, quantize(module.weight.detach(), format)))
    return model


@pytest.mark.parametrize("name", ["gpt_neox", "phi3"])
def test_fused_matrices_are_packed_together(tmp_path, name):
    model = packed(name, tmp_path / "hf", IntFormat(4, 32))
    export_compressed_tensors(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(loaded) - logits(model)).abs().max() < 1e-4
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    assert any("qkv_proj.weight_packed" in key or "query_key_value.weight_packed" in key for key in tensors)


@pytest.mark.parametrize("size", [32, "tensor"])
def test_fused_matrices_of_gptq_files_are_ours(tmp_path, size):
    model = packed("phi3", tmp_path / "hf", IntFormat(4, size, symmetric=False))
    export_gptq(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    layer = "model.layers.1.mlp.gate_up_proj"
    shifts = 4 * torch.arange(8)
    codes = (tensors[f"{layer}.qweight"][:, None] >> shifts[:, None] & 15).flatten(0, 1)  # (K, N)
    zeros = (tensors[f"{layer}.qzeros"][:, :, None] >> shifts & 15).flatten(1)  # (G, N)
    groups = tensors[f"{layer}.g_idx"].long()
    weight = ((codes - zeros[groups]) * tensors[f"{layer}.scales"].float()[groups]).T
    mlp = model.blocks[1].feedforward
    assert torch.equal(weight, torch.cat([mlp.gate.dequantize(), mlp.up.dequantize()]))


@pytest.mark.parametrize(
    ("name", "format", "skip", "message"),
    [
        ("gpt2", IntFormat(4, 32), (), r"gpt2 files hold blocks\.0\.attention\.q transposed"),
        ("gpt_neox", IntFormat(4, 32), ("blocks.1.attention.k",), "of which some are packed and some not: pack all"),
        ("phi3", IntFormat(4, "tensor"), (), "holds 3 matrices with a scale each"),
    ],
)
def test_packed_layers_that_the_files_cannot_hold_are_refused(tmp_path, name, format, skip, message):
    model = packed(name, tmp_path / "hf", format, skip)
    with pytest.raises(UserError, match=message):
        export_compressed_tensors(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    if not skip:
        export_folder(model, tmp_path / "dense")
        assert (logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")) - logits(model)).abs().max() < 1e-4

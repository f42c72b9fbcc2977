"""The Llama family against `transformers`, through files: logits, byte-equal round trips, and what is refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from models.checkpoint import save_model
from models.config import LayerConfig, ModelConfig
from models.errors import UserError
from models.families import export_folder, import_folder, is_family_folder
from models.io import WEIGHTS
from models.positions import Rope
from models.transformer import Transformer

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50_000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
CONFIGS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True, "attention_bias": True, "tie_word_embeddings": True},
    "head_dim": {"head_dim": 12, "num_attention_heads": 4, "num_key_value_heads": 4},
    "one kv head": {"num_key_value_heads": 1},
    "gelu": {"hidden_act": "gelu", "rms_norm_eps": 1e-5},
    "gelu tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "base": {"rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}},
    "llama3": {"rope_parameters": LLAMA3},
    "yarn": {"rope_parameters": YARN},
}


def randomise(model):
    """Random norms and biases too, which are initialised to ones and zeros, and weights large enough to matter."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else 0.15 * noise)
    return model.eval()


def llama(dtype=torch.float32, **changes):
    return randomise(LlamaForCausalLM(LlamaConfig(**SMALL | changes))).to(dtype)


def saved(model, folder, **arguments):
    model.save_pretrained(folder, **arguments)
    return folder


TOKENS = torch.randint(97, (2, 33), generator=torch.Generator().manual_seed(3))


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_import_gives_the_logits_of_transformers(tmp_path, name):
    theirs = llama(**CONFIGS[name])
    ours = import_folder(saved(theirs, tmp_path / "hf"))
    expected = logits(theirs)
    assert expected.std() > 0.1
    assert (logits(ours) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["plain", "tied", "mlp bias", "llama3", "yarn"])
def test_import_then_export_is_byte_equal(tmp_path, name, dtype):
    theirs = llama(dtype, **CONFIGS[name])
    source = saved(theirs, tmp_path / "hf")
    export_folder(import_folder(source), tmp_path / "out", source)
    before, after = load_file(source / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys()
    for tensor, copy in ((before[key], after[key]) for key in before):
        assert tensor.dtype == copy.dtype == dtype
        assert torch.equal(tensor.view(torch.uint8), copy.view(torch.uint8))
    old, new = (LlamaConfig.from_pretrained(folder).to_dict() for folder in (source, tmp_path / "out"))
    assert old | {"_name_or_path": ""} == {key: new[key] for key in old} | {"_name_or_path": ""}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_export_loads_in_transformers(tmp_path, name):
    model = import_folder(saved(llama(**CONFIGS[name]), tmp_path / "hf"))
    export_folder(model, tmp_path / "out", tmp_path / "hf")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert (logits(loaded) - logits(model)).abs().max() < 1e-5
    assert type(loaded) is LlamaForCausalLM


def test_sharded_files_are_read(tmp_path):
    theirs = llama()
    saved(theirs, tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 2
    assert (logits(import_folder(tmp_path / "hf")) - logits(theirs)).abs().max() < 1e-5


def test_the_rope_of_version_4_files_is_read(tmp_path):
    theirs = llama(rope_parameters=LLAMA3)
    folder = saved(theirs, tmp_path / "hf")
    values = json.loads((folder / "config.json").read_text())
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    values["rope_scaling"] = rope
    (folder / "config.json").write_text(json.dumps(values))
    assert (logits(import_folder(folder)) - logits(theirs)).abs().max() < 1e-5
    values["rope_scaling"] = {"type": "linear", "factor": 3.0}
    (folder / "config.json").write_text(json.dumps(values))
    assert import_folder(folder).config.position.scaling.factor == 3.0


def test_old_files_need_only_the_old_keys(tmp_path):
    """Llama 1's config: no base, no grouped heads, no biases; and rotary tables among the weights."""
    theirs = llama(num_key_value_heads=6)
    folder = saved(theirs, tmp_path / "hf")
    values = json.loads((folder / "config.json").read_text())
    kept = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    values = {key: values[key] for key in kept} | {"max_position_embeddings": 64, "head_dim": None}
    (folder / "config.json").write_text(json.dumps(values))
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, folder / WEIGHTS)
    assert (logits(import_folder(folder)) - logits(theirs)).abs().max() < 1e-5


def test_a_tied_head_may_be_stored_beside_the_embedding_if_it_is_equal(tmp_path):
    folder = saved(llama(tie_word_embeddings=True), tmp_path / "hf")
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / WEIGHTS)
    assert import_folder(folder).head is None
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, folder / WEIGHTS)
    with pytest.raises(UserError, match=r"ties its head .* yet holds a lm_head\.weight that differs"):
        import_folder(folder)


def test_mistral_is_read_and_written(tmp_path):
    small = SMALL | {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 8, "sliding_window": None}
    theirs = randomise(MistralForCausalLM(MistralConfig(**small)))
    model = import_folder(saved(theirs, tmp_path / "hf"))
    assert (logits(model) - logits(theirs)).abs().max() < 1e-5
    export_folder(model, tmp_path / "out")
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "out")) is MistralForCausalLM


@pytest.mark.parametrize("window", [1, 5, 16])
def test_mistral_with_a_sliding_window_is_read_and_written(tmp_path, window):
    small = SMALL | {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 8, "sliding_window": window}
    theirs = randomise(MistralForCausalLM(MistralConfig(**small)))
    model = import_folder(saved(theirs, tmp_path / "hf"))
    assert {layer.attention.window for layer in model.config.layers} == {window}
    assert (logits(model) - logits(theirs)).abs().max() < 1e-5
    export_folder(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.sliding_window == window
    assert torch.equal(logits(again), logits(theirs))


def ours(layers=None, **changes):
    values = {
        "vocab_size": 97,
        "width": 48,
        "depth": 3,
        "context": 64,
        "attention": {"kind": "full", "heads": 6, "kv_heads": 2},
        "feedforward": {"kind": "swiglu", "width": 80},
    }
    config = ModelConfig.from_dict(values | changes)
    if layers is not None:
        config = replace(config, layers=layers(config.layers))
    torch.manual_seed(0)
    return randomise(Transformer(config))


def each(**changes):
    """A function that changes the attention or the feed-forward of every layer."""

    def change(layers):
        return tuple(
            replace(layer, **{part: replace(getattr(layer, part), **values) for part, values in changes.items()})
            for layer in layers
        )

    return change


@pytest.mark.parametrize(
    ("layers", "kind"),
    [
        (each(feedforward={"width": 37}), LlamaForCausalLM),
        (each(attention={"heads": 3, "kv_heads": 1}), LlamaForCausalLM),
        (each(attention={"heads": 5, "kv_heads": 5}), MistralForCausalLM),  # 48 is no multiple of 5
        (lambda layers: layers[:1], LlamaForCausalLM),
    ],
)
def test_structurally_pruned_models_of_one_width_load_in_transformers(tmp_path, layers, kind):
    model = ours(layers)
    export_folder(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded) is kind
    assert (logits(loaded) - logits(model)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("attention", "feedforward"),
    [({"bias": True}, {}), ({"out_bias": True}, {}), ({}, {"out_bias": True}), ({"bias": True}, {"bias": True})],
)
def test_a_bias_that_the_format_wants_and_we_lack_is_zero(tmp_path, attention, feedforward):
    def change(layers):  # the first layer alone has biases
        return each(attention=attention, feedforward=feedforward)(layers[:1]) + layers[1:]

    model = ours(change)
    export_folder(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(loaded) - logits(model)).abs().max() < 1e-5


def at(index, **changes):
    return lambda layers: layers[:index] + each(**changes)(layers[index : index + 1]) + layers[index + 1 :]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": at(1, feedforward={"width": 64})}, "feedforward width, and here most have 80 but layer 1 has 64"),
        ({"layers": at(0, attention={"heads": 4})}, "attention heads, and here most have 6 but layer 0 has 4"),
        ({"layers": at(2, attention={"heads": 3, "kv_heads": 1})}, "layer 2 has"),
        ({"layers": lambda layers: (LayerConfig(None, layers[0].feedforward), *layers)}, "layer 0 has none"),
        ({"layers": lambda layers: (*layers, LayerConfig(layers[0].attention, None))}, "layer 3 has none"),
        ({"order": "parallel"}, "layer 0 is parallel"),
        ({"norm": "layer"}, "not layer pre"),
        ({"norm": {"kind": "rms", "position": "sandwich"}}, "not rms sandwich"),
        ({"position": "learned"}, "not learned(?! with)"),
        ({"position": {"kind": "rope", "layout": "interleaved"}}, "pairs the halves of a head, not interleaved"),
        ({"position": {"kind": "rope", "fraction": 0.5}, "layers": each(attention={"bias": True})}, "fraction of 0.5"),
        ({"norm": {"kind": "rms", "offset": 1.0}}, "its norms have no offset"),
        ({"direction": "bidirectional"}, "it is a decoder, and this model is bidirectional"),
        ({"layers": at(1, attention={"position": Rope(base=7.0)})}, "layer 1 has Rope"),
        ({"layers": each(attention={"position": Rope(base=7.0)})}, "with exceptions"),
        ({"feedforward": {"kind": "mlp", "width": 80}}, "layer 0 has mlp"),
        (
            {"layers": each(attention={"heads": 5, "kv_heads": 5, "bias": True})},
            "llama: transformers wants a width that is a multiple of the heads.*mistral: it has no attention_bias",
        ),
    ],
)
def test_what_the_format_cannot_hold_is_refused_with_the_reason(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        export_folder(ours(**changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "rwkv"}, r"model_type 'rwkv' is not supported \(one of: bert, gemma, gpt2, gpt_neox, llama, "),
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"hidden_act": "swiglu"}, "hidden_act 'swiglu' is not supported"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported"),
        ({"rope_parameters": YARN | {"mscale": 0.7}}, "mscale 0.7 of yarn is not supported"),
        ({"rope_parameters": YARN | {"attention_factor": 2.0}}, "attention_factor 2.0 is not yarn's own, 1.138"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized weights"),
        ({"auto_map": {"AutoModel": "x.py"}}, "never run"),
        ({"hidden_size": "48"}, "hidden_size must be a whole number above zero, got '48'"),
        ({"num_hidden_layers": None}, "num_hidden_layers must be a whole number"),
        ({"num_hidden_layers": 4}, r"lack model\.layers\.3"),
        ({"num_hidden_layers": 2}, r"hold model\.layers\.2"),
        ({"intermediate_size": 81}, r"shape \[80, 48\]; config.json calls for \[81, 48\]"),
        ({"num_key_value_heads": 4}, "kv_heads must divide heads"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number above zero, got 0"),
        ({"hidden_act": ["silu"]}, r"hidden_act must be a word, got \['silu'\]"),
        ({"rope_parameters": "linear"}, "rope_parameters must be keys and values, got 'linear'"),
        ({"model_type": ["llama"]}, "is not supported"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "big"}}, "rope_theta must be a number, got 'big'"),
    ],
)
def test_what_cannot_be_imported_is_refused_with_the_reason(tmp_path, change, message):
    folder = saved(llama(), tmp_path / "hf")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=message) as caught:
        import_folder(folder)
    assert str(folder) in str(caught.value)


def tokenizer(folder):
    vocabulary = {"<eot>": 0, "<pad>": 1} | {chr(97 + i): i + 2 for i in range(26)}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eot>", bos_token="<eot>", pad_token="<pad>")
    fast.save_pretrained(folder)
    return fast


def test_the_tokenizer_and_its_special_tokens_go_along(tmp_path):
    fast = tokenizer(tmp_path / "ours")
    save_model(ours(), tmp_path / "ours")
    export_folder(ours(), tmp_path / "out", tmp_path / "ours")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert loaded("abcz").input_ids == fast("abcz").input_ids
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, 1)
    assert model.generate(**loaded("abc", return_tensors="pt"), max_new_tokens=2, do_sample=False).shape[1] <= 5


def test_the_last_word_on_special_tokens_is_that_of_the_generation_config(tmp_path):
    tokenizer(tmp_path / "ours")
    (tmp_path / "ours" / "generation_config.json").write_text('{"eos_token_id": [5, 6], "temperature": 0.6}')
    export_folder(ours(), tmp_path / "out", tmp_path / "ours")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == [5, 6]
    assert model.generation_config.temperature == 0.6


def test_a_tokenizer_file_that_leads_elsewhere_is_not_copied(tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="outside the folder"):
        export_folder(ours(), tmp_path / "out", tmp_path / "source")
    assert not (tmp_path / "out").exists()


def test_family_folders_are_told_from_ours(tmp_path):
    (tmp_path / "ours").mkdir()
    save_model(ours(), tmp_path / "ours")
    saved(llama(), tmp_path / "hf")
    assert is_family_folder(tmp_path / "hf")
    assert not is_family_folder(tmp_path / "ours")
    assert not is_family_folder(tmp_path)

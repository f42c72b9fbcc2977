"""The ModernBERT family against `transformers`, through files: logits with padding, byte-equal round trips."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    ModernBertModel,
)

from models.checkpoint import load, save_model
from models.config import ModelConfig
from models.errors import UserError
from models.families import export_folder, import_folder
from models.io import WEIGHTS
from models.transformer import Transformer
from tests.models.test_families_bert import LENGTHS, TOKENS, ours_of, randomise
from tests.models.test_families_llama import saved

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "local_attention": 8,
    **{f"{role}_token_id": number for number, role in enumerate(("pad", "bos", "eos", "cls", "sep"))},
}
LOCAL, GLOBAL = "sliding_attention", "full_attention"
ROPES = {
    GLOBAL: {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0},
    LOCAL: {"rope_type": "default", "rope_theta": 7.0},
}
BIASES = {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True}
CONFIGS = {
    "plain": (ModernBertForMaskedLM, {}),
    "biases": (ModernBertForMaskedLM, BIASES | {"decoder_bias": False, "rope_parameters": ROPES}),
    "untied": (ModernBertForMaskedLM, {"tie_word_embeddings": False, "hidden_activation": "silu"}),
    "untied without bias": (ModernBertForMaskedLM, {"tie_word_embeddings": False, "decoder_bias": False}),
    "all local": (ModernBertForMaskedLM, {"layer_types": [LOCAL] * 4, "local_attention": 5, "norm_eps": 1e-3}),
    "all global": (ModernBertForMaskedLM, {"layer_types": [GLOBAL] * 4, "classifier_activation": "relu"}),
    "classes": (ModernBertForSequenceClassification, {"num_labels": 3, "classifier_dropout": 0.3}),
    "mean": (ModernBertForSequenceClassification, BIASES | {"classifier_pooling": "mean"}),
    "bare": (ModernBertModel, {}),
}


def theirs(name, dtype=torch.float32):
    kind, changes = CONFIGS[name]
    return randomise(kind(ModernBertConfig(**SMALL | changes))).to(dtype)


def outputs(model, tokens, lengths=None):
    """What a model of theirs gives at the tokens that are no padding, or, if a classifier, at each row."""
    mask = None if lengths is None else (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    with torch.no_grad():
        found = model(tokens, attention_mask=mask)
    found = found.last_hidden_state if isinstance(model, ModernBertModel) else found.logits
    return found if found.ndim == 2 or mask is None else found[mask.bool()]


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_files_both_ways(tmp_path, name):
    model = theirs(name)
    imported = import_folder(saved(model, tmp_path / "hf"))
    for tokens, lengths in ((TOKENS, None), (TOKENS, LENGTHS), (TOKENS[:1, :1], None), (TOKENS[:, :7], None)):
        expected = outputs(model, tokens, lengths)
        assert expected.std() > 0.05
        assert (ours_of(imported, tokens, lengths) - expected).abs().max() < 1e-5
    (tmp_path / "ours").mkdir()
    save_model(imported, tmp_path / "ours")
    export_folder(load(tmp_path / "ours"), tmp_path / "out", tmp_path / "hf")
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert (outputs(loaded.eval(), TOKENS, LENGTHS) - outputs(model, TOKENS, LENGTHS)).abs().max() < 1e-5
    old, new = (ModernBertConfig.from_pretrained(tmp_path / part).to_dict() for part in ("hf", "out"))
    if name == "all local":
        old["local_attention"] = 4  # two tokens on each side, as before
        old["rope_parameters"][GLOBAL] = new["rope_parameters"][GLOBAL]  # of no layer
    if name == "all global":
        old |= {key: new[key] for key in ("local_attention", "rope_parameters")}
    unnamed = {"cls_token_id": None, "sep_token_id": None}  # no tokenizer says which they are
    assert old | unnamed | {"_name_or_path": ""} == {key: new[key] for key in old} | {"_name_or_path": ""}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_import_then_export_is_byte_equal(tmp_path, name, dtype):
    source = saved(theirs(name, dtype), tmp_path / "hf")
    export_folder(import_folder(source), tmp_path / "out", source)
    before, after = load_file(source / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype == dtype
        assert torch.equal(tensor.view(torch.uint8), after[key].view(torch.uint8))


def test_the_numbers_of_the_first_files_are_read(tmp_path):
    model = theirs("plain")
    folder = saved(model, tmp_path / "hf")
    values = json.loads((folder / "config.json").read_text())
    del values["rope_parameters"], values["layer_types"]
    old = {"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(values | old))
    assert (ours_of(import_folder(folder), TOKENS) - outputs(model, TOKENS)).abs().max() < 1e-5
    again = ModernBertForMaskedLM.from_pretrained(folder)
    assert torch.equal(outputs(again.eval(), TOKENS), outputs(model, TOKENS))
    (folder / "config.json").write_text(json.dumps(values | old | {"global_attn_every_n_layers": 2}))
    kinds = [layer.attention.kind for layer in import_folder(folder).config.layers]
    assert kinds == ["full", "window", "full", "window"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["ModernBertForTokenClassification"]}, "ModernBertForTokenClassification"),
        ({"layer_types": ["full_attention"]}, "layer_types must be 4 of full_attention and sliding_attention"),
        ({"rope_parameters": {"rope_theta": 7.0}}, "rope_parameters must be those of full_attention"),
        ({"embedding_dropout": 0.5}, r"embedding_dropout 0\.5 and mlp_dropout 0\.0 differ"),
        ({"hidden_activation": "quick_gelu"}, "hidden_activation 'quick_gelu' is not supported"),
        ({"local_attention": 1}, "window must be at least 1"),
        ({"architectures": ["ModernBertForSequenceClassification"], "classifier_pooling": "max"}, "pooling 'max'"),
    ],
)
def test_what_cannot_be_imported_is_refused_with_the_reason(tmp_path, change, message):
    folder = saved(theirs("plain"), tmp_path / "hf")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=message):
        import_folder(folder)


ENCODER = {
    "vocab_size": 97,
    "width": 48,
    "context": 64,
    "attention": {"far": {"kind": "full", "heads": 6}, "near": {"kind": "window", "heads": 6, "window": 8}},
    "feedforward": {"kind": "swiglu", "width": 40, "activation": "gelu"},
    "layers": ["far", "near"],
    "depth": 4,
    "norm": "layer",
    "first_norm": False,
    "direction": "bidirectional",
    "input": {"kind": "tokens", "norm": "layer"},
    "head": {"kind": "tied", "bias": True, "transform": {"norm": "layer"}},
}


def ours(**changes):
    torch.manual_seed(0)
    return randomise(Transformer(ModelConfig.from_dict(ENCODER | changes)))


def test_an_encoder_of_ours_loads_in_transformers(tmp_path):
    for number, changes in enumerate(({}, {"feedforward": ENCODER["feedforward"] | {"bias": True}})):
        model = ours(**changes)
        export_folder(model, tmp_path / str(number))
        loaded, info = AutoModelForMaskedLM.from_pretrained(tmp_path / str(number), output_loading_info=True)
        assert type(loaded) is ModernBertForMaskedLM
        assert not any(info.values())
        assert (outputs(loaded, TOKENS) - ours_of(model, TOKENS)).abs().max() < 1e-5


NEAR = ENCODER["attention"]["near"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_norm": True}, "modernbert: its input is .* and first_norm: false"),
        ({"input": "tokens"}, "modernbert: its input is"),
        ({"norm": {"kind": "layer", "bias": False}}, "modernbert: its input is"),
        ({"norm": {"kind": "layer", "eps": 0.1}}, "modernbert: its input is .* with the eps of the layers"),
        ({"head": "untied"}, "modernbert: its head has the transform"),
        ({"head": {"kind": "classifier", "classes": 3, "pool": "last", "transform": {"norm": "layer"}}}, "last"),
        (
            {"head": {"kind": "tied", "transform": {"norm": "layer", "activation": "tanh"}}},
            "its head has the transform",
        ),
        ({"position": "alibi"}, "modernbert: it has one rope position"),
        ({"attention": {**ENCODER["attention"], "near": NEAR | {"dilation": 2}}}, "modernbert: its windows have no"),
        ({"attention": {"far": NEAR, "near": NEAR | {"window": 4}}}, "its local layers have one window"),
        ({"attention": {**ENCODER["attention"], "near": NEAR | {"heads": 4}}}, "modernbert: all layers have one"),
        ({"attention": {"far": NEAR | {"position": "alibi"}, "near": NEAR | {"position": "alibi"}}}, "not alibi"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_with_the_reason(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        export_folder(ours(**changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()

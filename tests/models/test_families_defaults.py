"""A key that a config leaves out, or has as null, means what it means in `transformers`: every key of every family."""

import json
import re

import pytest
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from models import families
from models.attention.full import Full
from models.attention.window import Window
from models.errors import UserError
from models.families import import_folder
from models.io import WEIGHTS
from tests.models.test_families_llama import YARN, logits, randomise

# every key that the numbers depend on, away from its default
COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "head_dim": 8,
    "hidden_act": "relu",
    "rms_norm_eps": 0.1,
    "tie_word_embeddings": True,
    "attention_dropout": 0.5,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0},
}
EXPERTS = {"num_experts_per_tok": 3, "num_local_experts": 9, "router_aux_loss_coef": 0.5}
FAMILIES = {
    "llama": LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**COMMON, sliding_window=5),
    "mixtral": MixtralConfig(**COMMON, **EXPERTS, sliding_window=5, router_jitter_noise=0.1),
    "qwen3_moe": Qwen3MoeConfig(
        **COMMON,
        **EXPERTS,
        moe_intermediate_size=24,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=5,
        norm_topk_prob=True,
        decoder_sparse_step=2,
        mlp_only_layers=[0],
    ),
    "phi3": Phi3Config(
        **COMMON | {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "partial_rotary_factor": 0.5}},
        original_max_position_embeddings=20,
        sliding_window=5,
        pad_token_id=0,
    ),
    "gemma": GemmaConfig(**COMMON, attention_bias=True),
    "gpt2": GPT2Config(
        vocab_size=97,
        n_embd=64,
        n_layer=2,
        n_head=16,
        n_positions=40,
        n_inner=40,
        activation_function="relu",
        attn_pdrop=0.5,
        layer_norm_epsilon=0.1,
        tie_word_embeddings=False,
    ),
    "gpt_neox": GPTNeoXConfig(
        **{name: COMMON[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
        num_attention_heads=4,
        max_position_embeddings=40,
        hidden_act="relu",
        layer_norm_eps=0.1,
        tie_word_embeddings=True,
        attention_dropout=0.5,
        hidden_dropout=0.5,
        attention_bias=False,
        use_parallel_residual=False,
        rope_parameters={"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0, "partial_rotary_factor": 1.0},
    ),
    "bert": BertConfig(
        **{name: COMMON[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
        num_attention_heads=4,
        max_position_embeddings=40,
        hidden_act="relu",
        layer_norm_eps=0.1,
        type_vocab_size=3,
        hidden_dropout_prob=0.5,
        attention_probs_dropout_prob=0.4,
        tie_word_embeddings=False,
    ),
    "modernbert": ModernBertConfig(
        **{name: COMMON[name] for name in ("vocab_size", "hidden_size", "intermediate_size")},
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=40,
        hidden_activation="relu",
        norm_eps=0.1,
        norm_bias=True,
        attention_bias=True,
        mlp_bias=True,
        decoder_bias=False,
        classifier_bias=True,
        classifier_activation="silu",
        classifier_pooling="mean",
        attention_dropout=0.5,
        classifier_dropout=0.5,
        local_attention=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 50.0, "factor": 2.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
        },
        tie_word_embeddings=False,
        **{f"{role}_token_id": 0 for role in ("pad", "bos", "eos", "cls", "sep")},
    ),
}
AUTO = dict.fromkeys(("bert", "modernbert"), AutoModelForMaskedLM)
SIZES = {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}
SIZES |= {"n_embd", "n_layer", "n_head"}
EMBEDDINGS = {"gpt2": "transformer.wte.weight", "gpt_neox": "gpt_neox.embed_in.weight"}
EMBEDDINGS |= {"bert": "bert.embeddings.word_embeddings.weight"}
EMBEDDINGS |= {"modernbert": "model.embeddings.tok_embeddings.weight"}
GENERAL = PreTrainedConfig().to_dict().keys() | {"model_type", "bos_token_id", "eos_token_id", "pad_token_id"}
CASES = [
    (family, key, null)
    for family, config in FAMILIES.items()
    for key in sorted(config.to_dict().keys() - GENERAL)
    for null in (False, True)
]


def reference(folder, values):
    """Save a model of theirs of this config.json, with that very config.json. None where they refuse it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    try:
        auto = AUTO.get(values["model_type"], AutoModelForCausalLM)
        model = randomise(auto.from_config(AutoConfig.from_pretrained(folder)))
    except Exception:  # a validation error, or whatever a null leads to
        return None
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(values))
    return model


def same(folder, values):
    """Check that an import has the logits of theirs; nothing to compare where they refuse the config."""
    theirs = reference(folder, values)
    if theirs is not None:
        expected = logits(theirs)
        assert expected.std() > 0.01
        assert (logits(import_folder(folder)) - expected).abs().max() < 1e-5
    return theirs


@pytest.mark.parametrize(("family", "key", "null"), CASES)
def test_a_key_that_is_left_out_or_null_has_their_meaning(family, key, null, tmp_path):
    values = FAMILIES[family].to_dict()
    values = values | {key: None} if null else {name: value for name, value in values.items() if name != key}
    if key in SIZES or key == "moe_intermediate_size":  # sizes of models that are not tiny
        (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=f"{key} (is missing|must be)"):
            import_folder(tmp_path)
    else:
        assert same(tmp_path / "hf", values) is not None or null


@pytest.mark.parametrize(
    "family", sorted(FAMILIES.keys() - {"gpt2", "phi3", "bert", "modernbert"})
)  # which have none, or no scaling
def test_the_base_of_rope_that_is_left_out_within_its_parameters(family, tmp_path):
    values = FAMILIES[family].to_dict()
    for number, rope in enumerate(
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 3.0}},
            {"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 70.0},  # has the last word
            {"rope_parameters": {"rope_type": "default"}, "rope_theta": 70.0},
            {"rope_parameters": {}},
        )
    ):
        assert same(tmp_path / str(number), values | rope)


@pytest.mark.parametrize("key", [key for key in YARN if key not in ("rope_type", "factor")])
@pytest.mark.parametrize("null", [False, True])
def test_a_key_of_yarn_that_is_left_out_or_null(key, null, tmp_path):
    rope = YARN | {key: None} if null else {name: value for name, value in YARN.items() if name != key}
    values = FAMILIES["llama"].to_dict() | {"rope_parameters": rope}
    assert same(tmp_path / "hf", values) is not None or null


def test_the_original_context_of_yarn_may_stand_outside(tmp_path):
    values = FAMILIES["llama"].to_dict() | {"rope_parameters": YARN, "original_max_position_embeddings": 16}
    assert same(tmp_path / "hf", values)
    truncated = FAMILIES["llama"].to_dict() | {"rope_parameters": YARN | {"truncate": None}}  # false for them
    (tmp_path / "hf" / "config.json").write_text(json.dumps(truncated))
    with pytest.raises(UserError, match="truncate None of yarn is not supported"):
        import_folder(tmp_path / "hf")


@pytest.mark.parametrize(
    ("family", "window"), [("llama", None), ("mistral", 4096), ("mixtral", None), ("qwen3_moe", 4096)]
)
def test_a_window_that_is_left_out_holds_in_a_longer_context(family, window, tmp_path):
    values = FAMILIES[family].to_dict() | {"max_position_embeddings": 8192}
    assert reference(tmp_path / "hf", {key: value for key, value in values.items() if key != "sliding_window"})
    attention = import_folder(tmp_path / "hf").config.layers[0].attention
    assert isinstance(attention, Full if window is None else Window)
    assert window is None or attention.window == window


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tied_model_may_be_stored_under_the_name_of_its_head(family, tmp_path):
    values = FAMILIES[family].to_dict() | {"tie_word_embeddings": True}
    theirs = same(tmp_path / "hf", values)
    tensors = load_file(tmp_path / "hf" / WEIGHTS)
    embedding = EMBEDDINGS.get(family, "model.embed_tokens.weight")
    head = families.FAMILIES[family].head
    tensors[head] = tensors.pop(embedding)
    save_file(tensors, tmp_path / "hf" / WEIGHTS)
    model = import_folder(tmp_path / "hf")
    assert model.head is None
    assert (logits(model) - logits(theirs)).abs().max() < 1e-5
    untied = values | {"tie_word_embeddings": False}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(untied))
    with pytest.raises(UserError, match=f"lack {re.escape(embedding)}"):
        import_folder(tmp_path / "hf")
    tensors[embedding] = tensors.pop(head)
    save_file(tensors, tmp_path / "hf" / WEIGHTS)
    with pytest.raises(UserError, match=rf"has no {re.escape(head)}.* says no tie_word_embeddings: true"):
        import_folder(tmp_path / "hf")


def test_every_registered_family_is_covered():
    assert families.FAMILIES.keys() == FAMILIES.keys()

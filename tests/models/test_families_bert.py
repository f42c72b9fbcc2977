"""The BERT family against `transformers`, through files: logits with padding, pairs, byte-equal round trips."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    BertTokenizer,
)

from models.checkpoint import load, save_model
from models.config import ModelConfig
from models.errors import UserError
from models.families import export_folder, import_folder
from models.io import WEIGHTS
from models.transformer import Transformer
from tests.models.test_families_llama import saved

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
}
NAMED = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
CONFIGS = {
    "plain": (BertForMaskedLM, {}),
    "untied relu": (BertForMaskedLM, {"tie_word_embeddings": False, "hidden_act": "relu", "layer_norm_eps": 1e-3}),
    "one head": (BertForMaskedLM, {"num_attention_heads": 1, "type_vocab_size": 3, "hidden_act": "gelu_pytorch_tanh"}),
    "classes": (BertForSequenceClassification, {"num_labels": 3}),
    "two classes": (BertForSequenceClassification, {**NAMED, "classifier_dropout": 0.3}),
    "bare": (BertModel, {}),
}
TOKENS = torch.randint(1, 97, (3, 33), generator=torch.Generator().manual_seed(3))
LENGTHS = torch.tensor([33, 17, 1])


def randomise(model):
    """Random norms and biases too, and weights large enough to matter."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm.weight" in name.lower() else 0.15 * noise)
    return model.eval()


def theirs(name, dtype=torch.float32):
    kind, changes = CONFIGS[name]
    bare = {"add_pooling_layer": False} if kind is BertModel else {}
    return randomise(kind(BertConfig(**SMALL | changes), **bare)).to(dtype)


def outputs(model, tokens, lengths=None, types=None):
    """What a model of theirs gives at the tokens that are no padding, or, if a classifier, at each row."""
    mask = None if lengths is None else (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
    with torch.no_grad():
        found = model(tokens, attention_mask=mask, token_type_ids=types)
    found = found.last_hidden_state if isinstance(model, BertModel) else found.logits
    return found if found.ndim == 2 or mask is None else found[mask.bool()]


def ours_of(model, tokens, lengths=None):
    """The same of a model of ours: hidden states where the head has no transform, as of the bare model."""
    documents = None
    if lengths is not None:
        documents = torch.where(torch.arange(tokens.shape[1]) < lengths[:, None], 0, -1)
    with torch.no_grad():
        bare = model.config.head.transform is None
        run = model.hidden(tokens, documents=documents).x if bare else model(tokens, documents=documents).logits
    if model.config.head.kind == "classifier":
        return run[:, 0]
    return run if documents is None else run[documents >= 0]


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
    assert not any(info.values()) or name == "bare"  # whose pooler transformers draws
    assert (outputs(loaded.eval(), TOKENS, LENGTHS) - outputs(model, TOKENS, LENGTHS)).abs().max() < 1e-5
    old, new = (BertConfig.from_pretrained(tmp_path / part).to_dict() for part in ("hf", "out"))
    wanted = old | {"_name_or_path": "", "classifier_dropout": new["classifier_dropout"]}
    assert wanted == {key: new[key] for key in old} | {"_name_or_path": ""}
    if name == "two classes":
        assert new["classifier_dropout"] == 0.3
        assert new["id2label"] == {0: "bad", 1: "good"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_import_then_export_is_byte_equal(tmp_path, name, dtype):
    source = saved(theirs(name, dtype), tmp_path / "hf")
    export_folder(import_folder(source), tmp_path / "out", source)
    before, after = load_file(source / WEIGHTS), load_file(tmp_path / "out" / WEIGHTS)
    assert before.keys() == after.keys()
    for key in before.keys() - ({"cls.predictions.bias"} if name == "untied relu" else set()):  # which is unused there
        assert before[key].dtype == after[key].dtype == dtype
        assert torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8))


def tokenizer(folder):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film", "was", "good", "bad", "##ly", "plot"]
    fast = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    fast.save_pretrained(folder)
    return fast


def test_segments_are_the_token_types_of_pairs(tmp_path):
    model = theirs("plain")
    fast = tokenizer(saved(model, tmp_path / "hf"))
    pairs = [("the film was good", "bad plot"), ("badly", "the plot was badly good"), ("film", "")]
    batch = fast(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt")
    imported = import_folder(tmp_path / "hf")
    assert imported.config.input.segments.separator == fast.sep_token_id
    tokens, lengths = batch.input_ids, batch.attention_mask.sum(1)
    documents = torch.where(batch.attention_mask.bool(), 0, -1)
    real = batch.attention_mask.bool()
    assert torch.equal(imported.segments.numbers(tokens, documents)[real], batch.token_type_ids[real])
    expected = outputs(model, tokens, lengths, batch.token_type_ids)
    assert (ours_of(imported, tokens, lengths) - expected).abs().max() < 1e-5
    assert (outputs(model, tokens, lengths) - expected).abs().max() > 1e-2  # they matter
    row = torch.cat([tokens[0], tokens[1, : lengths[1]]])[None]
    alone = torch.cat([ours_of(imported, tokens[:1], lengths[:1]), ours_of(imported, tokens[1:2, : lengths[1]])[0]])
    packed = torch.cat([documents[0], torch.ones_like(documents[1, : lengths[1]])])[None]
    with torch.no_grad():
        assert (imported(row, documents=packed).logits[packed >= 0] - alone).abs().max() < 1e-5


def test_the_next_sentence_head_is_left_out_and_named(tmp_path):
    whole = randomise(BertForPreTraining(BertConfig(**SMALL)))
    with pytest.warns(UserWarning, match=r"does not use bert\.pooler\.dense, cls\.seq_relationship, which is left out"):
        imported = import_folder(saved(whole, tmp_path / "hf"))
    with torch.no_grad():
        expected = whole(TOKENS).prediction_logits
    assert (ours_of(imported, TOKENS) - expected).abs().max() < 1e-5
    pooled = randomise(BertModel(BertConfig(**SMALL)))
    with pytest.warns(UserWarning, match=r"does not use pooler\.dense, which"):
        imported = import_folder(saved(pooled, tmp_path / "bare"))
    assert (ours_of(imported, TOKENS) - outputs(pooled, TOKENS)).abs().max() < 1e-5


def test_the_names_of_the_first_files_are_read(tmp_path):
    model = theirs("plain")
    folder = saved(model, tmp_path / "hf")
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        path, _, leaf = name.rpartition("LayerNorm.")
        tensors[path + old["LayerNorm." + leaf] if path else name] = tensor
    tensors["bert.embeddings.position_ids"] = torch.arange(64)[None]
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    save_file(tensors, folder / WEIGHTS)
    assert (ours_of(import_folder(folder), TOKENS) - outputs(model, TOKENS)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_decoder": True}, "is_decoder: true is not supported"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key' is not supported"),
        ({"architectures": ["BertForTokenClassification"]}, r"\['BertForTokenClassification'\] is not supported \(one"),
        ({"architectures": ["BertForSequenceClassification"], "problem_type": "regression"}, "'regression'"),
        ({"architectures": ["BertForSequenceClassification"], "num_labels": 1}, "at least 2"),
        ({"hidden_act": "swish_tanh"}, "hidden_act 'swish_tanh' is not supported"),
        ({"type_vocab_size": 0}, "type_vocab_size must be a whole number above zero"),
        ({"num_hidden_layers": 4}, r"lack bert\.encoder\.layer\.3"),
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
    "depth": 2,
    "context": 64,
    "attention": {"kind": "full", "heads": 6},
    "feedforward": {"kind": "mlp", "width": 80},
    "norm": {"kind": "layer", "position": "post"},
    "position": "learned",
    "direction": "bidirectional",
    "input": {"kind": "tokens", "norm": "layer", "segments": {"separator": 3}},
    "head": {"kind": "tied", "bias": True, "transform": {"norm": "layer"}},
}


def ours(**changes):
    torch.manual_seed(0)
    return randomise(Transformer(ModelConfig.from_dict(ENCODER | changes)))


def test_an_encoder_of_ours_without_biases_loads_in_transformers(tmp_path):
    model = ours(norm={"kind": "layer", "position": "post", "bias": False})
    export_folder(model, tmp_path / "out")
    loaded, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(loaded) is BertForMaskedLM
    assert not any(info.values())
    tokens = TOKENS.clone()
    tokens[tokens == 3] = 4
    assert (outputs(loaded, tokens) - ours_of(model, tokens)).abs().max() < 1e-5


CLASSIFIER = {"kind": "classifier", "classes": 3, "pool": "first", "transform": {"activation": "tanh"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": "tokens"}, r"bert: its input is \{kind: tokens, norm: layer"),
        ({"input": ENCODER["input"] | {"norm": {"kind": "layer", "eps": 0.1}}}, "with the eps of the layers"),
        ({"norm": "layer"}, "bert: it has layer norms in position post, not layer pre"),
        ({"head": "untied"}, "bert: its head has a bias and the transform"),
        ({"head": ENCODER["head"] | {"bias": False}}, "bert: its head has a bias and the transform"),
        (
            {"head": {"kind": "tied", "bias": True, "transform": {"activation": "relu", "norm": "layer"}}},
            "of the layers",
        ),
        ({"head": CLASSIFIER | {"pool": "mean"}}, r"bert: its classifier is \{kind: classifier, pool: first"),
        ({"head": CLASSIFIER | {"transform": None}}, "bert: its classifier is"),
        ({"head": CLASSIFIER, "position": "sinusoidal"}, "bert: it has one learned position"),
        ({"direction": "causal", "input": "tokens"}, "bert: it is an encoder, and this model is causal"),
        ({"direction": "causal", "input": "tokens"}, "llama: its head is a matrix, and this model's has a bias"),
        ({"direction": "causal", "input": {"kind": "tokens", "norm": "layer"}, "head": "tied"}, "read the embeddings"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_with_the_reason(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        export_folder(ours(**changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_token_classifier_is_refused(tmp_path):
    folder = saved(BertForTokenClassification(BertConfig(**SMALL)), tmp_path / "hf")
    with pytest.raises(UserError, match="BertForTokenClassification"):
        import_folder(folder)

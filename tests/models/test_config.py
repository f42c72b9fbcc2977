"""An architecture is read from people's short form, written in canonical form, and refused with a reason."""

import json

import pytest
import yaml

from models.attention.pooling import POOLINGS
from models.config import ModelConfig
from models.errors import UserError
from models.positions.rope import ROPE_SCALINGS
from models.presets import PRESETS, preset
from models.specs import ATTENTIONS, DEPTHS, FEEDFORWARDS, NORMS, POSITIONS

SHORT = {
    "vocab_size": 64,
    "width": 32,
    "depth": 4,
    "attention": {"many": {"kind": "full", "heads": 4, "kv_heads": 2}, "one": {"kind": "full", "heads": 1}},
    "feedforward": {"thin": {"kind": "swiglu", "width": 16}, "thick": {"kind": "mlp", "width": 64}},
    "layers": ["many/thin", "one/thick"],
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name):
    config = preset(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_pattern_is_tiled_over_the_depth():
    layers = ModelConfig.from_dict(SHORT).layers
    assert [layer.attention.heads for layer in layers] == [4, 1, 4, 1]
    assert [layer.feedforward.kind for layer in layers] == ["swiglu", "mlp", "swiglu", "mlp"]
    assert layers[1].attention.head_width == 32


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("attention_first", "sf sf sf sf"),
        ("feedforward_first", "fs fs fs fs"),
        ("parallel", "s+f s+f s+f s+f"),
        ("sandwich(1)", "s sf sf sf f"),
        ("sandwich(4)", "s s s sf f f f"),
        ("sfffs", "sf f f s"),
    ],
)
def test_order_of_sublayers(order, expected):
    layers = ModelConfig.from_dict({**SHORT, "order": order}).layers
    names = {"attention_first": "sf", "feedforward_first": "fs", "parallel": "s+f"}
    absent = {(True, False): "s", (False, True): "f"}
    written = [absent.get((x.attention is not None, x.feedforward is not None), names[x.order]) for x in layers]
    assert " ".join(written) == expected


def test_each_kind_of_sublayer_follows_its_own_pattern_in_an_explicit_order():
    layers = ModelConfig.from_dict({**SHORT, "order": "ssff"}).layers
    assert [layer.attention.heads for layer in layers if layer.attention] == [4, 1]
    assert [layer.feedforward.width for layer in layers if layer.feedforward] == [16, 64]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"widht": 3}, "architecture: unknown key 'widht' (did you mean 'width'?)"),
        ({"width": "wide"}, "architecture.width: expected int, got 'wide'"),
        ({"width": True}, "architecture.width: expected int, got True"),
        ({"depth": 3}, "architecture: a pattern of 2 layers does not tile a depth of 3"),
        ({"layers": ["many/fat", "one/thin"]}, "architecture.layers: 'many/fat' names no feedforward"),
        ({"layers": None}, "architecture: 2 attention specs and no `layers` pattern that chooses among them"),
        ({"attention": None}, "architecture: no attention: give one such as {kind: full, heads: 4}, or, for layers"),
        ({"attention": 3}, "architecture.attention: expected an attention such as {kind: full, heads: 4}, got 3"),
        ({"attention": {"kind": "top_k", "heads": 4}}, "architecture.attention: 'keep' is missing (top_k needs it)"),
        ({"norm": {"kind": "rms", "position": "per"}}, "architecture.norm: unknown norm position 'per'"),
        ({"norm": None}, "architecture.norm: expected a norm"),
        ({"position": "ropes"}, "architecture.position: unknown position 'ropes' (did you mean 'rope'?)"),
        ({"order": "sandwich(9)"}, "architecture.order: sandwich(9) needs at least 9 layers, got depth 4"),
        ({"order": "attention"}, "architecture.order: unknown order 'attention'"),
        ({"head": "shared"}, "unknown head 'shared'"),
        ({"attention": {"kind": "full", "heads": 3, "kv_heads": 2}}, "kv_heads must divide heads"),
        ({"attention": {"kind": "full", "heads": 3}, "layers": None}, "width 32 is not a multiple of 3 heads"),
        ({"attention": {"kind": "full", "heads": 4, "position": "learned"}}, "position 'learned' acts on the embed"),
    ],
)
def test_wrong_architectures_are_refused_with_place_and_reason(change, sentence):
    values = {**SHORT, **change}
    if "attention" in change:
        values |= {"feedforward": {"kind": "mlp", "width": 8}, "layers": None}
    with pytest.raises(UserError) as refusal:
        ModelConfig.from_dict(values)
    assert sentence in str(refusal.value)


def test_a_missing_size_is_named_alone():
    with pytest.raises(UserError, match="^architecture: 'vocab_size' is missing$"):
        ModelConfig.from_dict({name: value for name, value in SHORT.items() if name != "vocab_size"})


@pytest.mark.parametrize(
    "registry",
    [ATTENTIONS, DEPTHS, FEEDFORWARDS, NORMS, POSITIONS, POOLINGS, ROPE_SCALINGS],
    ids=lambda axis: axis.axis,
)
def test_the_example_of_an_axis_is_valid(registry):
    registry.parse(yaml.safe_load(registry.example), "")


def test_full_list_of_layers_excludes_the_short_keys():
    canonical = preset("quickstart").to_dict()
    with pytest.raises(UserError, match="'depth' cannot stand beside a full list of layers"):
        ModelConfig.from_dict({**canonical, "depth": 6})

"""Every field of every spec takes its own values, or a sentence says what would be right: nothing else is raised."""

import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import save_file

from models import checkpoint
from models.checkpoint import skeleton
from models.config import ATTENTIONS, DEPTHS, FEEDFORWARDS, NORMS, POSITIONS, ModelConfig
from models.errors import UserError
from models.positions.rope import ROPE_SCALINGS
from models.transformer import Transformer, outline

TINY = {
    "vocab_size": 64,
    "width": 32,
    "depth": 2,
    "context": 64,
    "attention": {"kind": "full", "heads": 4},
    "feedforward": {"kind": "swiglu", "width": 16},
}
NUMBERS = {"block": 8, "chunk": 8, "documents": 4, "globals": 2, "keep": 4, "rank": 8, "segment": 8, "stride": 8}
NUMBERS |= {"heads": 4, "window": 8, "buckets": 4, "count": 4, "width": 16, "capacity": 0.5, "clip": 4, "factor": 2.0}
NUMBERS |= {"original_context": 32, "low_frequency_factor": 1.0, "high_frequency_factor": 4.0}
WRONG = [None, [], {}, "", "x", True, [None], {"kind": "x"}, {"kind": None}, {"kind": []}, {1: 2}, "s" * 30_000]
WRONG += [0, -1, 1.5, 1e300, 10**9, 2**63, 10**40, math.nan, math.inf, -math.inf, "sandwich(" + "9" * 5000 + ")"]
HUGE = [value for value in WRONG if isinstance(value, float) and not abs(value) < 1e39] + [2**63, 10**40]


def example(cls):
    """The spec of a class with a number for each that it needs."""
    values = {"kind": cls.kind}
    for field in dataclasses.fields(cls):
        if field.default is field.default_factory is dataclasses.MISSING:
            values[field.name] = example(FEEDFORWARDS["swiglu"]) if field.name == "expert" else NUMBERS[field.name]
    return values


def architectures():
    for axis, registry in (("attention", ATTENTIONS), ("feedforward", FEEDFORWARDS), ("norm", NORMS)):
        yield from ((axis, kind, {axis: example(registry[kind])}) for kind in registry)
    yield from (("position", kind, {"position": example(POSITIONS[kind])}) for kind in POSITIONS)
    yield from (("depths", kind, {"depths": example(DEPTHS[kind])}) for kind in DEPTHS)
    for kind in ROPE_SCALINGS:
        yield "position", f"rope-{kind}", {"position": {"kind": "rope", "scaling": example(ROPE_SCALINGS[kind])}}
    yield "exits", "exits", {"exits": {"layers": [1]}}
    yield "", "model", {}


def whole(change):
    """The canonical form, every field written out, as an encoder or a decoder."""
    for more in ({}, {"direction": "bidirectional", "position": "none"}, {"position": "none"}, {"position": "learned"}):
        try:
            return ModelConfig.from_dict(TINY | more | change).to_dict()
        except UserError as error:
            reason = error
    raise reason


def places(values, before=()):
    for key, value in values.items():
        yield (*before, key)
        if isinstance(value, dict):
            yield from places(value, (*before, key))


def with_value(config, place, value):
    config = json.loads(json.dumps(config))
    inner = config
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return config


@pytest.mark.parametrize(
    ("axis", "kind", "change"), architectures(), ids=lambda value: value if type(value) is str else ""
)
def test_any_value_of_any_field_is_taken_or_refused(axis, kind, change):
    config = whole(change)
    layer = {"attention": "attention", "feedforward": "feedforward", "depths": "depth"}.get(axis)
    if layer is not None:
        found = [("layers", 0, layer), *(("layers", 0, layer, *place) for place in places(config["layers"][0][layer]))]
    else:
        found = [place for place in places(config) if place[0] == axis or not axis]
        found += [("layers", 0, *place) for place in places(config["layers"][0]) if not axis]
    refused = 0
    for place in found:
        for value in WRONG:
            try:
                outline(ModelConfig.from_dict(with_value(config, place, value)))
            except UserError:
                refused += 1
                continue
            assert not (isinstance(value, float) and not abs(value) < 1e39), (place, value)
            assert value not in (2**63, 10**40) or "scale" in place[-1] or _is_float(config, place), (place, value)
    assert refused > 10 * len(found)


def _is_float(config, place):
    for key in place:
        config = config[key]
    return config is None or isinstance(config, float)


@pytest.mark.parametrize("key", [*TINY, "layers", "order", "depths", "compression", "x" * 10_000, None, 1])
def test_any_value_in_the_short_form_is_taken_or_refused(key):
    for value in [*WRONG, [[]], [{}], ["x/y"], "/", [1], {"a": None}, {None: None}, [{"kind": None}]]:
        try:
            outline(ModelConfig.from_dict(TINY | {key: value}))
        except UserError:
            continue
        assert value not in ([], 0, -1) or (key, value) == ("dropout", 0), (key, value)
    for value in WRONG:
        with pytest.raises(UserError):
            ModelConfig.from_dict(value)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"vocab_size": 10**9, "width": 2**12}, "takes 16,384,"),
        ({"feedforward": {"kind": "swiglu", "width": 10**9}}, "and this machine has"),
        ({"attention": {"kind": "full", "heads": 10**9, "head_width": 10**9}}, "64 bits can count"),
        ({"depth": 10**9}, "at most 10000, got 1000000000"),
        ({"context": 10**9, "position": "learned"}, "takes 128,"),
        ({"feedforward": example(FEEDFORWARDS["experts"]) | {"count": 10**9}}, "and this machine has"),
        ({"feedforward": example(FEEDFORWARDS["experts"]) | {"count": 10**9, "layout": "separate"}}, "at most 4096"),
    ],
)
def test_sizes_beyond_the_machine_are_refused_before_they_are_allocated(change, why):
    with pytest.raises(UserError, match=why):
        Transformer(ModelConfig.from_dict(TINY | change))


def test_the_outline_draws_no_random_numbers():
    config = ModelConfig.from_dict(TINY | {"attention": example(ATTENTIONS["lsh"])})
    before = torch.get_rng_state()
    outline(config)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def saved(tmp_path):
    model = Transformer(ModelConfig.from_dict(TINY))
    checkpoint.save_model(model, tmp_path)
    return tmp_path, dict(model.state_dict())


def test_dense_weights_of_several_dtypes_become_the_one_that_holds_them(saved):
    place, tensors = saved
    norms = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in tensors.items()}
    save_file(norms, place / "model.safetensors")
    model = checkpoint.load(place)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, norms[name].float())
    model(torch.zeros(1, 4, dtype=torch.long))
    assert {p.dtype for p in checkpoint.load(place, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.complex64, torch.bool])
def test_a_dtype_of_no_dense_weight_is_refused(saved, dtype):
    place, tensors = saved
    save_file(tensors | {"embedding.weight": tensors["embedding.weight"].to(dtype)}, place / "model.safetensors")
    with pytest.raises(UserError, match=r"embedding\.weight is stored as torch\.\w+, which is no dense weight"):
        checkpoint.load(place)


@pytest.mark.parametrize(
    "form",
    [None, [], 4, {}, {"form": []}, {"form": None}, {"form": "x"}, {"form": "packed_int", "bits": None}]
    + [
        {"form": "packed_int", "bits": 4, key: value}
        for key in ("group_size", "symmetric", "bias")
        for value in ([], 0)
    ]
    + [{"form": "int8", "activations": value} for value in (None, [], {"kind": []}, {"kind": "outliers", "x": 1})]
    + [{"form": "fp8", "activations": []}, {"form": "lookup", "bits": {}}, {"form": "nf4", "block_size": []}]
    + [{"form": "product", "vector": 10**9}, {"form": "product", "codewords": None}, {"form": "lookup", "dtype": []}],
    ids=str,
)
def test_a_stored_form_of_other_values_is_refused(form):
    values = ModelConfig.from_dict(TINY).to_dict() | {"compression": {"blocks.0.attention.q": form}}
    with pytest.raises(UserError, match="compression"):
        skeleton(ModelConfig.from_dict(values))

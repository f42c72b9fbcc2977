"""Position encodings against `transformers`, which writes each of them down independently."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from transformers.models.roformer.modeling_roformer import RoFormerSelfAttention, RoFormerSinusoidalPositionalEmbedding
from transformers.models.t5.modeling_t5 import T5Attention

from models.config import ModelConfig
from models.errors import UserError
from models.positions.alibi import slopes
from models.positions.t5 import bucket
from models.specs import POSITIONS
from models.transformer import Transformer


def built(position, width=16, heads=4, head_width=8, **more):
    sizes = {"width": width, "heads": heads, "head_width": head_width, "context": 64}
    return POSITIONS.parse(position, "position").build(**sizes, **more)


@pytest.mark.parametrize("heads", [1, 2, 8, 12, 16, 20])
def test_alibi_slopes_are_those_of_bloom_and_mpt(heads):
    bloom = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]  # (H,) slope times position 1
    torch.testing.assert_close(slopes(heads), bloom)
    if heads & (heads - 1) == 0:  # MPT orders the others differently
        mpt = -build_mpt_alibi_tensor(heads, 2)[:, 0, 0]  # (H,) of distance 1
        torch.testing.assert_close(slopes(heads), mpt.flatten())


@pytest.mark.parametrize("heads", [1, 4, 6, 24, 127])
def test_alibi_slopes_are_powers_made_on_the_device(heads):
    power = 2 ** int(math.log2(heads))
    powers = [-8 * k / power for k in range(1, power + 1)] + [-4 * k / power for k in range(1, 2 * power, 2)]
    exact = torch.tensor([2**exponent for exponent in powers[:heads]])
    assert (slopes(heads).view(torch.int32) - exact.view(torch.int32)).abs().max() <= 1  # the last bit
    with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", None)  # numbers from the host
        made = built("alibi", heads=heads)(torch.empty(1, 3, dtype=torch.int64, device="cuda")).slopes
    assert (made.device.type, made.dtype) == ("cuda", torch.float32)


def test_alibi_falls_with_the_distance():
    positional = built("alibi")(torch.arange(3)[None])
    distance = torch.tensor([[0, 1, 7]])
    expected = -slopes(4)[:, None, None] * distance
    assert torch.equal(positional.bias(distance), expected)


@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 20), (64, 1000)])
def test_t5_buckets_are_those_of_t5(buckets, furthest):
    distance = torch.arange(3 * furthest)
    theirs = T5Attention._relative_position_bucket(
        -distance, bidirectional=False, num_buckets=buckets, max_distance=furthest
    )
    assert torch.equal(bucket(distance, buckets, furthest), theirs)


@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 20), (64, 1000)])
def test_t5_buckets_of_an_encoder_are_those_of_t5(buckets, furthest):
    distance = torch.arange(-300, 301)
    theirs = T5Attention._relative_position_bucket(
        -distance, bidirectional=True, num_buckets=buckets, max_distance=furthest
    )
    assert torch.equal(bucket(distance, buckets, furthest, bidirectional=True), theirs)
    module = built({"kind": "t5", "buckets": buckets, "max_distance": furthest}, bidirectional=True)
    bias = module(torch.arange(3)[None]).bias(distance[None])  # (H, 1, 601)
    assert torch.equal(bias, module.table.weight[theirs].T[:, None])


def test_t5_adds_the_row_of_the_bucket():
    module = built({"kind": "t5", "buckets": 8, "max_distance": 20})
    distance = torch.arange(50)[None]
    bias = module(torch.arange(3)[None]).bias(distance)  # (H, 1, 50)
    rows = module.table.weight[bucket(distance, 8, 20)]  # (1, 50, H)
    assert torch.equal(bias, rows.permute(2, 0, 1))


@pytest.mark.parametrize("per_layer", [False, True])
def test_t5_biases_can_be_those_of_a_layer(per_layer):
    values = {"vocab_size": 20, "width": 16, "depth": 3, "attention": {"kind": "full", "heads": 2}}
    values |= {"feedforward": {"kind": "mlp", "width": 8}, "position": {"kind": "t5", "per_layer": per_layer}}
    model = Transformer(ModelConfig.from_dict(values)).eval()
    assert len(model.positions) == (3 if per_layer else 1)
    tokens = torch.arange(6)[None]
    before = [model(tokens, taps=[f"blocks.{i}" for i in range(3)]).taps[f"blocks.{i}"] for i in range(3)]
    model.positions[-1].table.weight.data += torch.randn(32, 2)
    after = [model(tokens, taps=[f"blocks.{i}" for i in range(3)]).taps[f"blocks.{i}"] for i in range(3)]
    changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert changed == ([False, False, True] if per_layer else [True, True, True])


def test_interleaved_rope_is_that_of_roformer():
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)  # (B, H, T, d)
    table = RoFormerSinusoidalPositionalEmbedding(9, 8)
    table.weight.copy_(table.create_weight())
    sinusoidal = table(torch.Size([2, 9]))[None, None]
    theirs = RoFormerSelfAttention.apply_rotary_position_embeddings(sinusoidal, q, k)
    positional = built({"kind": "rope", "layout": "interleaved"})(torch.arange(9)[None])
    for mine, their in zip((positional.rotate(q), positional.rotate(k)), theirs, strict=True):
        torch.testing.assert_close(mine, their, atol=1e-6, rtol=1e-6)


def test_the_two_layouts_differ_by_an_order_of_the_channels():
    x, order = torch.randn(1, 2, 5, 8), torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    half, interleaved = (
        built({"kind": "rope", "layout": name})(torch.arange(5)[None]) for name in ("half", "interleaved")
    )
    torch.testing.assert_close(half.rotate(x[..., order]), interleaved.rotate(x)[..., order])


@pytest.mark.parametrize("factor", [2.0, 8.0])
@pytest.mark.parametrize(
    ("base", "original"),
    [(10000.0, 2048), (500000.0, 2048), (10.0, 700), (10000.0, 64)],
    ids=["Llama 2", "Llama 3", "bounds behind the last channel", "bounds before the first"],
)
def test_yarn_is_that_of_transformers(factor, base, original):
    longest = int(original * factor)
    config = LlamaConfig(hidden_size=64, num_attention_heads=1, head_dim=64, max_position_embeddings=longest)
    config.rope_parameters = {
        "rope_type": "yarn",
        "rope_theta": base,
        "factor": factor,
        "original_max_position_embeddings": original,
    }
    frequencies, amplitude = ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    scaling = {"kind": "yarn", "factor": factor, "original_context": original}
    positional = built({"kind": "rope", "base": base, "scaling": scaling}, head_width=64)(torch.tensor([[1]]))
    torch.testing.assert_close(positional.cos[0, 0, 0], amplitude * frequencies.cos())
    torch.testing.assert_close(positional.sin[0, 0, 0], amplitude * frequencies.sin())


def test_ntk_slows_the_slowest_rotation_by_the_factor_and_the_fastest_not_at_all():
    scaling = {"kind": "ntk", "factor": 4.0}
    plain, slowed = (
        built({"kind": "rope", "scaling": value}, head_width=64)(torch.tensor([[1]])).sin[0, 0, 0].asin()
        for value in (None, scaling)
    )
    assert slowed[0] == plain[0]
    torch.testing.assert_close(slowed[-1], plain[-1] / 4)
    # the same as a larger base, as it is usually written
    base = 10000 * 4 ** (64 / 62)
    torch.testing.assert_close(slowed[1:], base ** -(torch.arange(2, 64, 2) / 64))


def test_sinusoidal_is_the_formula():
    added = built("sinusoidal")(torch.tensor([[5]])).added[0, 0]
    for channel in range(8):
        angle = 5 / 10000 ** (2 * channel / 16)
        assert added[2 * channel].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert added[2 * channel + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)


def test_a_model_with_sinusoidal_positions_goes_beyond_its_context():
    from models.transformer import Transformer

    model = Transformer(
        ModelConfig.from_dict(
            {"vocab_size": 9, "width": 8, "context": 4, "depth": 1, "position": "sinusoidal",
             "attention": {"kind": "full", "heads": 2}, "feedforward": {"kind": "mlp", "width": 8}}
        )
    )  # fmt: skip
    assert model(torch.zeros(1, 10, dtype=torch.int64)).logits.shape == (1, 10, 9)


@pytest.mark.parametrize(
    ("position", "sentence"),
    [
        ({"kind": "t5", "buckets": 7}, "buckets must be even"),
        ({"kind": "t5", "buckets": 8, "max_distance": 4}, "max_distance must be above 4"),
        ({"kind": "rope", "layout": "interleave"}, "unknown layout 'interleave'.*interleaved"),
        (
            {"kind": "rope", "scaling": {"kind": "yarn", "factor": 0.5, "original_context": 8}},
            "factor must be at least 1",
        ),
        ({"kind": "sinusoidal", "base": 1.0}, "base must be above 1"),
        ({"kind": "shaw", "clip": 0}, "clip must be at least 1"),
        ({"kind": "shaw", "terms": "values"}, "unknown terms 'values'.*keys_and_values"),
    ],
)
def test_wrong_numbers_are_refused(position, sentence):
    with pytest.raises(UserError, match=sentence):
        POSITIONS.parse(position, "position")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"position": {"kind": "t5", "buckets": 2}, "direction": "bidirectional"}, "at least 4 buckets, got 2"),
        ({"position": "sinusoidal"}, "need an even width, got 15"),
        ({"position": "transformer_xl"}, "need an even width, got 15"),
    ],
)
def test_sizes_that_an_encoding_cannot_have_are_refused_by_the_config(change, sentence):
    values = {"vocab_size": 9, "width": 15, "depth": 1, "attention": {"kind": "full", "heads": 3}}
    values["feedforward"] = {"kind": "mlp", "width": 8}
    with pytest.raises(UserError, match=sentence):
        ModelConfig.from_dict(values | change)

"""Norm positions written down by hand, and what DeepNet (arXiv 2203.00555) starts from."""

import pytest
import torch
from torch import nn

from models.block import Block
from models.config import ModelConfig
from models.errors import UserError
from models.norms import Rms
from models.transformer import Transformer

CONFIG = {
    "vocab_size": 40,
    "width": 16,
    "depth": 3,
    "position": "none",
    "attention": {"kind": "full", "heads": 4, "kv_heads": 2},
    "feedforward": {"kind": "swiglu", "width": 24},
}


def build(**changes):
    torch.manual_seed(0)
    return Transformer(ModelConfig.from_dict({**CONFIG, **changes})).eval()


@pytest.mark.parametrize("order", ["attention_first", "feedforward_first"])
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(("position", "gain"), [("post", 1.0), ("deepnorm", (2 * 3) ** 0.25)])
def test_the_stream_is_normalised_behind_each_branch(kind, order, position, gain):
    model = build(norm={"kind": kind, "position": position}, order=order)
    tokens = torch.randint(40, (2, 7))
    x, context = model.embed(tokens)
    for block in model.blocks:
        steps = [
            (block.attention_norm, lambda y, block=block: block.attention(y, context)),
            (block.feedforward_norm, block.feedforward),
        ]
        for norm, branch in steps if order == "attention_first" else steps[::-1]:
            x = norm(gain * x + branch(x))
    torch.testing.assert_close(model(tokens).logits, model.project(x))
    assert isinstance(model.norm, nn.Identity)  # the stream is normalised already


def test_deepnorm_counts_sub_layers_where_layers_have_only_one():
    whole, halves = (build(norm={"kind": "rms", "position": "deepnorm"}, order=order) for order in ("sfsfsf", "sssfff"))
    assert len(halves.blocks) > len(whole.blocks)
    assert {block.gain for block in whole.blocks} == {block.gain for block in halves.blocks} == {6**0.25}


def test_deepnorm_starts_from_smaller_values_the_deeper_the_model():
    model = build(width=128, depth=2, norm={"kind": "layer", "position": "deepnorm"})
    beta = (8 * 2) ** -0.25
    for block in model.blocks:
        gains = {"q": 1.0, "k": 1.0, "v": beta, "o": beta}
        maps = [(getattr(block.attention, name), gain) for name, gain in gains.items()]
        maps += [(getattr(block.feedforward, name), beta) for name in ("gate", "up", "down")]
        for linear, gain in maps:
            expected = gain * (2 / (linear.in_features + linear.out_features)) ** 0.5  # Xavier's
            assert linear.weight.std().item() == pytest.approx(expected, rel=0.06)
            assert linear.weight.mean().abs().item() < expected / 10


def test_deepnorm_finds_the_maps_of_single_heads():
    spec = {"norm": {"kind": "rms", "position": "deepnorm"}, "attention": {"kind": "single_heads", "heads": 4}}
    attention = build(width=128, depth=2, **spec).blocks[0].attention
    named = {name: part.std for name, part in attention.named_modules() if name.rpartition(".")[2] in ("q", "v")}
    for name, std in named.items():
        gain = 16**-0.25 if name.endswith("v") else 1.0
        assert std == pytest.approx(gain * (2 / (128 + 32)) ** 0.5)
    assert len(named) == 8


def test_deepnorm_is_there_after_a_block_is_built_anew():
    model = build(norm={"kind": "rms", "position": "deepnorm"})
    old = model.blocks[1]
    new = Block(model.config.layers[1], model.config, old.place)
    assert (new.gain, new.feedforward.up.std) == (old.gain, old.feedforward.up.std)


def test_a_parallel_layer_has_no_place_behind_a_branch():
    for position in ("post", "deepnorm"):
        with pytest.raises(UserError, match=f"norm position {position} normalises after each sub-layer"):
            build(norm={"kind": "rms", "position": position}, order="parallel")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_offset_is_added_to_the_weight(dtype):
    """Gemma's weights: the difference from 1, which bf16 holds where it could not hold 1 + w."""
    norm = Rms(offset=1.0).build(16).to(dtype)
    assert not norm.weight.any()
    with torch.no_grad():
        norm.weight.copy_(0.001 * torch.randn(16))
    x = torch.randn(3, 5, 16, dtype=dtype)
    plain = nn.RMSNorm(16, eps=1e-5, dtype=torch.float64)
    plain.weight.data = 1 + norm.weight.detach().double()
    torch.testing.assert_close(norm(x), plain(x.double()).to(dtype))


def test_a_norm_with_an_offset_starts_and_trains_as_one_without():
    tokens, models = torch.randint(40, (2, 7)), [build(norm={"kind": "rms", "offset": offset}) for offset in (0.0, 1.0)]
    logits = [model(tokens).logits for model in models]
    torch.testing.assert_close(*logits)
    for found in logits:
        found.square().sum().backward()
    torch.testing.assert_close(*(model.blocks[1].attention_norm.weight.grad for model in models))

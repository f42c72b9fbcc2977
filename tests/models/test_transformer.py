"""The Transformer against closed forms: parameter counts, rotation, scaling, layer wiring."""

import math

import pytest
import torch

from models.config import ModelConfig
from models.errors import UserError
from models.positions import Rope
from models.positions.rope import LinearScaling, Llama3Scaling
from models.presets import preset
from models.transformer import Transformer


def tiny(**changes):
    values = {
        "vocab_size": 50,
        "width": 32,
        "depth": 2,
        "context": 24,
        "attention": {"kind": "full", "heads": 4, "kv_heads": 2},
        "feedforward": {"kind": "swiglu", "width": 48},
    }
    return ModelConfig.from_dict({**values, **changes})


def test_gpt2_small_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = Transformer(preset("gpt2-small"))
    assert model.count_parameters() == {"total": 124_439_808, "active": 124_439_808, "embedding": 38_597_376}


def test_rotation_depends_on_the_distance_only_and_keeps_the_norm():
    table = Rope().build(width=32, heads=4, head_width=8, context=64)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    products = []
    for shift in (0, 3, 40):
        rotated_q = table(torch.tensor([[5 + shift]])).rotate(q)
        rotated_k = table(torch.tensor([[2 + shift]])).rotate(k)
        torch.testing.assert_close(rotated_q.norm(), q.norm())
        products.append((rotated_q * rotated_k).sum())
    torch.testing.assert_close(products[0], products[1], atol=1e-6, rtol=0)
    torch.testing.assert_close(products[0], products[2], atol=1e-5, rtol=0)


def test_partial_rotation_leaves_the_other_channels():
    x = torch.randn(1, 1, 3, 8)
    rotated = Rope(fraction=0.5).build(width=8, heads=1, head_width=8, context=8)(torch.arange(3)[None]).rotate(x)
    assert torch.equal(rotated[..., 4:], x[..., 4:])
    assert not torch.equal(rotated[:, :, 1:, :4], x[:, :, 1:, :4])


def test_linear_scaling_is_position_interpolation():
    plain, scaled = (
        Rope(scaling=s).build(width=8, heads=1, head_width=8, context=8) for s in (None, LinearScaling(4.0))
    )
    torch.testing.assert_close(scaled(torch.tensor([[12]])).cos, plain(torch.tensor([[3]])).cos)


def test_llama3_scaling_keeps_short_wavelengths_and_stretches_long_ones():
    frequencies = torch.tensor([1.0, 1e-6])
    scaled = Llama3Scaling(8.0, 1.0, 4.0, 8192).apply(frequencies, 500000.0)
    torch.testing.assert_close(scaled, torch.tensor([1.0, 1e-6 / 8]))


def test_parallel_wiring_equals_the_formula():
    model = Transformer(tiny(depth=1, order="parallel")).eval()
    tokens = torch.randint(50, (1, 6))
    x, context = model.embed(tokens)
    block = model.blocks[0]
    attended = block.attention(block.attention_norm(x), context)
    expected = x + attended + block.feedforward(block.feedforward_norm(x), context)
    torch.testing.assert_close(block(x, context).y, expected)


def test_learned_positions_end_at_the_context():
    model = Transformer(tiny(position="learned"))
    with pytest.raises(UserError, match="25 tokens are more than this model's context of 24"):
        model(torch.zeros(1, 25, dtype=torch.int64))


def test_loss_is_the_mean_over_targets_that_exist():
    model = Transformer(tiny(head="untied")).eval()
    tokens = torch.randint(50, (2, 8))
    targets = torch.randint(50, (2, 8))
    targets[0, :5] = -100
    output = model(tokens, targets=targets, z_loss=True)
    logits = model(tokens).logits
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    torch.testing.assert_close(output.loss, nll)
    squared = logits.logsumexp(-1).square()
    torch.testing.assert_close(output.z_loss, squared[targets != -100].mean())


def test_fresh_model_predicts_about_uniformly():
    torch.manual_seed(0)
    model = Transformer(tiny(vocab_size=500))
    tokens = torch.randint(500, (4, 16))
    assert abs(model(tokens, targets=tokens.roll(-1, 1)).loss.item() - math.log(500)) < 0.1


def test_states_are_the_outputs_of_the_blocks():
    model = Transformer(tiny()).eval()
    tokens = torch.randint(50, (1, 6))
    output = model(tokens, taps=("blocks.0", "blocks.1"))
    torch.testing.assert_close(model.project(model.norm(output.taps["blocks.1"])), output.logits)
    assert output.taps["blocks.0"].shape == (1, 6, 32)


def test_documents_that_begin_behind_cached_tokens_without_any_are_refused():
    model, tokens = Transformer(tiny()).eval(), torch.zeros(1, 3, dtype=torch.int64)
    cache = model.new_cache(1, 8)
    model(tokens, cache=cache)
    with pytest.raises(UserError, match="documents are given behind 3 cached tokens without any"):
        model(tokens, cache=cache, documents=tokens)
    assert cache.length == 3


def test_scaled_embeddings_enter_the_stream_and_not_the_tied_head():
    torch.manual_seed(0)
    scaled, plain = Transformer(tiny(embedding_scale="sqrt_width")), Transformer(tiny())
    plain.load_state_dict(scaled.state_dict())
    tokens = torch.randint(0, plain.config.vocab_size, (2, 5))
    x, _ = scaled.embed(tokens)
    assert torch.equal(x, plain.embed(tokens)[0] * plain.config.width**0.5)
    assert torch.equal(scaled.project(x), plain.project(x))


@pytest.mark.parametrize("scale", [0.0, -1.0, "sqrt"])
def test_a_scale_of_embeddings_that_is_none_is_refused(scale):
    with pytest.raises(UserError, match="embedding_scale must be a number above 0 or sqrt_width"):
        tiny(embedding_scale=scale)

"""The model's account of itself against `transformers`, against counted operations and against the real cache."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from models.config import ModelConfig
from models.transformer import Transformer

LENGTH = 24


def build(change=None, **changes):
    values = {
        "vocab_size": 90,
        "width": 48,
        "depth": 3,
        "context": 64,
        "attention": {"kind": "full", "heads": 6, "kv_heads": 2},
        "feedforward": {"kind": "swiglu", "width": 80},
    }
    config = ModelConfig.from_dict(values | changes)
    return Transformer(change(config) if change else config)


def pruned(config):
    """Other heads and widths in the middle layer, as structured pruning leaves them."""
    first, middle, last = config.layers
    middle = replace(
        middle,
        attention=replace(middle.attention, heads=3, kv_heads=1),
        feedforward=replace(middle.feedforward, width=40),
    )
    return replace(config, layers=(first, middle, last))


TWO_QUERIES = {"kind": "query", "summaries": 2}

EXPERTS = {"kind": "experts", "count": 4, "expert": {"kind": "swiglu", "width": 32}, "layout": "separate"}

MODELS = {
    "grouped heads": {},
    "untied": {"head": "untied"},
    "experts": {"feedforward": EXPERTS},
    "experts and a shared one": {"feedforward": EXPERTS | {"shared": {"kind": "mlp", "width": 20}}},
    "mlp": {"feedforward": {"kind": "mlp", "width": 60}, "position": "learned"},
    "wide heads": {"attention": {"kind": "full", "heads": 3, "head_width": 20}},
    "sub-layers": {"order": "ssfsff"},
    "pruned": {"change": pruned},
    "window": {"attention": {"kind": "window", "heads": 6, "kv_heads": 2, "window": LENGTH}},
    "strided": {"attention": {"kind": "strided", "heads": 6, "kv_heads": 2, "stride": LENGTH}},
    "bigbird": {"attention": {"kind": "bigbird", "heads": 6, "kv_heads": 2, "block": LENGTH}},
    "top_k": {"attention": {"kind": "top_k", "heads": 6, "kv_heads": 2, "keep": 5}},
    "selective": {"attention": {"kind": "selective", "heads": 6, "kv_heads": 2}},
    "selective with a budget": {"attention": {"kind": "selective", "heads": 6, "budget": LENGTH}},
    "recursive": {"attention": {"kind": "recursive", "heads": 6, "kv_heads": 2, "chunk": 4}},
    "recursive, learned": {"attention": {"kind": "recursive", "heads": 6, "chunk": 4, "pooling": TWO_QUERIES}},
    "recursive, one level": {"attention": {"kind": "recursive", "heads": 6, "chunk": 3, "levels": 1}},
    "hierarchical": {"attention": {"kind": "hierarchical", "heads": 6, "kv_heads": 2, "segment": 4}},
    "dilated window": {"attention": {"kind": "window", "heads": 6, "window": LENGTH, "dilation": 3}},
    "longformer": {"attention": {"kind": "longformer", "heads": 6, "kv_heads": 3, "window": LENGTH, "globals": 12}},
    "transient": {"attention": {"kind": "transient", "heads": 6, "kv_heads": 2, "window": LENGTH, "block": 4}},
    "retention": {"attention": {"kind": "retention", "heads": 6, "chunk": 8}},
    "retention in one chunk": {"attention": {"kind": "retention", "heads": 6, "value_width": 5}},
    "convolution": {"attention": {"kind": "convolution", "channels": 32}, "position": "none"},
    "single heads": {"attention": {"kind": "single_heads", "heads": 6}},
    "shaw": {"position": {"kind": "shaw", "clip": 5, "terms": "keys_and_values"}},
}


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_a_llama(tied, biases):
    config = LlamaConfig(
        vocab_size=90,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attention_bias=biases,
        mlp_bias=biases,
    )
    model = build(
        head="tied" if tied else "untied",
        attention={"kind": "full", "heads": 6, "kv_heads": 2, "bias": biases, "out_bias": biases},
        feedforward={"kind": "swiglu", "width": 80, "bias": biases, "out_bias": biases},
    )
    counted = model.count_parameters()
    assert counted["total"] == counted["active"] == LlamaForCausalLM(config).num_parameters()
    assert counted["embedding"] == 90 * 48


def test_parameters_are_those_of_gpt2():
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=90, n_positions=64, n_embd=48, n_layer=3, n_head=6))
    ours = build(
        position="learned",
        norm="layer",
        attention={"kind": "full", "heads": 6, "bias": True, "out_bias": True},
        feedforward={"kind": "mlp", "width": 192, "activation": "gelu_tanh"},
    )
    assert ours.count_parameters()["total"] == theirs.num_parameters()


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_of_the_matrix_products_that_run(name):
    model = build(**MODELS[name])
    tokens = torch.randint(90, (1, LENGTH))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        logits = model(tokens).logits
    assert forward.get_total_flops() == LENGTH * model.flops_per_token(LENGTH)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as backward:
        model(tokens).logits.sum().backward()
    assert backward.get_total_flops() == LENGTH * model.training_flops_per_token(LENGTH)
    assert logits.shape == (1, LENGTH, 90)


def test_flops_of_a_decode_step_grow_with_what_it_sees():
    model = build().eval()
    cache = model.new_cache(1, LENGTH)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.randint(90, (1, LENGTH - 1)), cache=cache)
        with FlopCounterMode(display=False) as step:
            model(torch.randint(90, (1, 1)), cache=cache)
    assert step.get_total_flops() == model.flops_per_token(LENGTH)


@pytest.mark.parametrize("kind", ["retention", "convolution"])
def test_a_state_of_fixed_size_costs_the_same_at_any_length(kind):
    model = build(**MODELS[kind])
    assert model.cache_bytes(1) == model.cache_bytes(1000)
    assert model.flops_per_token(100) == model.flops_per_token(1000)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_cache_bytes_are_those_of_the_cache(name, dtype):
    model = build(**MODELS[name])
    cache = model.new_cache(3, 40, dtype)
    held = [layer for layer in cache.layers if layer is not None]
    assert len(held) == sum(layer.attention is not None for layer in model.config.layers)
    assert sum(layer.bytes() for layer in held) == 3 * model.cache_bytes(40, dtype)

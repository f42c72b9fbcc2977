"""A window beside summaries of blocks, against a dense oracle, `transformers`, and its cost."""

import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LongT5Config
from transformers.models.longt5.modeling_longt5 import LongT5TransientGlobalAttention

from models.attention.kernels import banded
from models.attention.transient_global import complete_blocks
from models.config import ModelConfig
from models.errors import UserError
from models.positions.t5 import bucket
from models.transformer import Transformer

RICH = {"position": "t5", "kv_heads": 2, "scale": 0.9, "softcap": 3.0, "sink": "learned", "qk_norm": "rms"}


def build(window=4, block=3, direction="causal", position="none", depth=2, **attention):
    torch.manual_seed(0)
    spec = {"kind": "transient", "heads": 4, "window": window, "block": block, **attention}
    config = {"vocab_size": 40, "width": 16, "depth": depth, "context": 64, "position": position, "attention": spec}
    config |= {"direction": direction, "feedforward": {"kind": "swiglu", "width": 24}}
    model = Transformer(ModelConfig.from_dict(config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_((1 if "norm" in name else 0) + 0.3 * torch.randn(parameter.shape))
    return model


def document_numbers(tokens):
    """Two rows: documents without a block, that begin inside one and that end in one; padding on the left."""
    first, second = [0] * 2 + [1] * 3 + [2] * 8 + [3] * 60, [-1] * 5 + [7] * 60
    return torch.tensor([first[:tokens], second[:tokens]])


def document_oracle(attention, x, positional):
    """One document (T, D), token by token and head by head: (T, D)."""
    tokens, size, causal = len(x), attention.block, not attention.bidirectional
    parts = [x[n * size : (n + 1) * size] for n in range(tokens // size)]
    if parts and not causal:
        parts[-1] = x[(len(parts) - 1) * size :]
    summaries = [attention.summary_norm(part.sum(0)) for part in parts]
    inputs = torch.stack([*x, *summaries])  # (T + N, D)
    q, k, v = (linear(inputs).unflatten(1, (-1, 4)) for linear in (attention.q, attention.k, attention.v))
    if attention.normalises:
        q, k = attention.q_norm(q), attention.k_norm(k)
    k, v = (y.repeat_interleave(4 // y.shape[1], 1) for y in (k, v))  # (T + N, H, d)
    sink = None if attention.sink is None else attention.sink(q)
    rows = []
    for i in range(tokens):
        if causal:
            near = range(max(0, i - attention.window + 1), i + 1)
        else:
            near = range(max(0, i - attention.window // 2), min(tokens, i + attention.window // 2 + 1))
        far = [n for n in range(len(parts)) if not causal or (n + 1) * size <= i + 1]
        own = i // size if causal else min(i // size, len(parts) - 1)
        seen = [*near, *(tokens + n for n in far)]
        scores = torch.einsum("hd,khd->hk", q[i], k[seen]) * (attention.scale or 0.5)
        if attention.softcap is not None:
            scores = attention.softcap * torch.tanh(scores / attention.softcap)
        blocks_back = torch.tensor([own - n for n in far], dtype=torch.int64)
        bias = attention.summary_bias(bucket(blocks_back, attention.buckets, attention.max_distance, not causal)).T
        if positional.table is not None:
            bias = torch.cat([positional.bias(torch.tensor([[i - j for j in near]]))[:, 0], bias], dim=1)
            scores = scores + bias
        else:
            scores = torch.cat([scores[:, : len(near)], scores[:, len(near) :] + bias], dim=1)
        if sink is not None:
            scores = torch.cat([scores, sink[:, None]], dim=1)
        p = scores.softmax(1)[:, : len(seen)]
        rows.append(torch.einsum("hk,khd->hd", p, v[seen]).flatten())
    return attention.o(torch.stack(rows))


def oracle(attention, x, documents, positional):
    if documents is None:
        return torch.stack([document_oracle(attention, row, positional) for row in x])
    found = []
    for row, numbers in zip(x, documents, strict=True):
        lengths = torch.unique_consecutive(numbers, return_counts=True)[1].tolist()
        found.append(torch.cat([document_oracle(attention, part, positional) for part in row.split(lengths)]))
    return torch.stack(found)


@pytest.mark.parametrize("options", [{}, RICH], ids=["plain", "rich"])
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("tokens", [1, 2, 4, 12, 35])
def test_it_is_what_the_definition_says(tokens, direction, documents, options, monkeypatch):
    """Outputs and gradients in fp64."""
    monkeypatch.setattr(banded, "SMALLEST", 6)  # so that there are several
    model = build(direction=direction, **options).double()
    numbers = document_numbers(tokens) if documents else None
    _, context = model.embed(torch.zeros(2, tokens, dtype=torch.int64), documents=numbers)
    attention = model.blocks[0].attention
    x = torch.randn(2, tokens, 16, dtype=torch.float64, requires_grad=True)
    positional = context.positional[attention.positional]
    mine, theirs = attention(x, context), oracle(attention, x, numbers, positional)
    if documents:  # padding is not asked
        mine, theirs = mine[numbers >= 0], theirs[numbers >= 0]
    torch.testing.assert_close(mine, theirs)
    upstream, inputs = torch.randn_like(theirs), [x, *attention.parameters()]
    pairs = zip(
        *(torch.autograd.grad(y, inputs, upstream, allow_unused=True, retain_graph=True) for y in (mine, theirs)),
        strict=True,
    )
    for mine, theirs in pairs:
        torch.testing.assert_close(*(torch.zeros(1) if y is None or not y.any() else y for y in (mine, theirs)))


@pytest.mark.parametrize("block", [1, 3, 8])
@pytest.mark.parametrize("position", ["rope", "t5"])
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("pieces", [[1] * 20, [1, 2, 10, 1, 6], [14, 1, 1, 4]], ids=str)
def test_a_cache_of_the_window_and_the_summaries_is_enough(pieces, documents, position, block):
    model, tokens = build(block=block, position=position), torch.randint(40, (2, 20))
    numbers = document_numbers(20) if documents else None
    steps = torch.arange(20)[None] if numbers is None else complete_blocks(numbers, 0, 20, 3, tokens.device).starts
    positions = steps if numbers is None else torch.arange(20) - steps
    cache, found, done = model.new_cache(2, 20), [], 0
    with torch.no_grad():
        for new in pieces:
            span = slice(done, done + new)
            own = None if numbers is None else numbers[:, span]
            found.append(model(tokens[:, span], documents=own, positions=positions[:, span], cache=cache).logits)
            done += new
        whole = model(tokens, documents=numbers).logits
    torch.testing.assert_close(torch.cat(found, dim=1), whole, atol=1e-5, rtol=1e-5)
    assert model.cache_bytes(20) == sum(layer.bytes() for layer in cache.layers) / 2


@pytest.mark.parametrize(("tokens", "padded"), [(24, False), (23, False), (23, True), (3, False)])
def test_it_is_the_attention_of_longt5(tokens, padded):
    config = LongT5Config(
        d_model=16, d_kv=4, num_heads=4, local_radius=3, global_block_size=4, dropout_rate=0.0,
        relative_attention_num_buckets=8, relative_attention_max_distance=20,
    )  # fmt: skip
    theirs = LongT5TransientGlobalAttention(config, has_relative_attention_bias=True).eval()
    position = {"kind": "t5", "buckets": 8, "max_distance": 20}
    sizes = {"window": 6, "block": 4, "buckets": 8, "max_distance": 20, "scale": 1.0}
    model = build(direction="bidirectional", position=position, depth=1, **sizes)
    attention = model.blocks[0].attention
    pairs = [(getattr(attention, name), getattr(theirs, name)) for name in ("q", "k", "v", "o")]
    pairs += [(model.positions[0].table, theirs.relative_attention_bias)]
    pairs += [(attention.summary_bias, theirs.global_relative_attention_bias)]
    pairs += [(attention.summary_norm, theirs.global_input_layer_norm)]
    with torch.no_grad():
        for ours, other in pairs:
            other.weight.copy_(ours.weight)
    x, mask = torch.randn(2, tokens, 16), torch.ones(2, tokens)
    if padded:
        mask[1, 18:] = 0
    _, context = model.embed(torch.zeros(2, tokens, dtype=torch.int64), documents=(mask - 1).long() if padded else None)
    real = mask > 0
    torch.testing.assert_close(attention(x, context)[real], theirs(x, mask=mask)[0][real], atol=1e-5, rtol=1e-5)


def seen_by(model, token, tokens=20):
    model = model.double()
    x, context = model.embed(torch.randint(40, (1, tokens)))
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.blocks[0](x, context).y[0, token].sum(), x)
    return {number for number, row in enumerate(gradient[0]) if row.any()}


def test_a_decoder_sees_complete_blocks_and_the_window():
    model = build(window=2, block=5)
    assert seen_by(model, 13) == {*range(10), 12, 13}
    assert seen_by(model, 14) == set(range(15))
    assert seen_by(model, 15) == set(range(16))
    assert seen_by(model, 16) == {*range(15), 15, 16}
    assert seen_by(model, 3) == {2, 3}


def test_an_encoder_sees_all_blocks():
    assert seen_by(build(window=2, block=6, direction="bidirectional"), 3) == set(range(20))
    assert seen_by(build(window=2, block=30, direction="bidirectional"), 3) == {2, 3, 4}


def largest_allocation(model, tokens, documents):
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        model(torch.zeros(1, tokens, dtype=torch.int64), documents=documents)
    return max(event.self_cpu_memory_usage for event in found.events())


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
def test_memory_grows_with_the_length_and_the_number_of_blocks(packed):
    """T (w + T / block) scores: with blocks of sqrt(T) that is T^1.5."""
    found = []
    for tokens in (1024, 4096):
        documents = torch.arange(tokens)[None] // 100 if packed else None
        found.append(largest_allocation(build(window=16, block=math.isqrt(tokens), depth=1), tokens, documents))
    assert found[1] < 1.3 * 4**1.5 * found[0]
    assert found[1] < 4096 * 4096 * 4  # bytes of the scores of one head: 67 million


def test_sizes_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="block must be at least 1"):
        build(block=0)
    with pytest.raises(UserError, match="dilation must be 1"):
        build(dilation=2)
    with pytest.raises(UserError, match="buckets must be even"):
        build(buckets=7)
    with pytest.raises(UserError, match="max_distance must be above 16"):
        build(max_distance=16)
    with pytest.raises(UserError, match="input_width must be the model's width of 16"):
        build(input_width=8)

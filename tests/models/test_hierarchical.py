"""Hierarchical attention against loops over tokens and segments, its cache, and schedules of windows."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer

QUERIES = {"kind": "query", "summaries": 2}
CHOICES = {
    "han": {"segment": 4},
    "mean, one segment head": {"segment": 3, "pooling": "mean", "segment_heads": 1},
    "two queries": {"segment": 5, "pooling": QUERIES},
}
every_choice = pytest.mark.parametrize("choice", CHOICES)
every_direction = pytest.mark.parametrize("direction", ["causal", "bidirectional"])


def build(direction="causal", position="rope", dtype=torch.float64, depth=1, **attention):
    torch.manual_seed(0)
    spec = {"kind": "hierarchical", "heads": 4, "kv_heads": 2, **attention}
    config = {"vocab_size": 40, "width": 16, "depth": depth, "context": 64, "position": position}
    config |= {"direction": direction, "attention": spec, "feedforward": {"kind": "swiglu", "width": 24}}
    model = Transformer(ModelConfig.from_dict(config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(("norm.weight" in name) + 0.4 * torch.randn(parameter.shape))
    return model.to(dtype)


def heads_of(model, projection, vectors, places):
    """Heads (K, H, d) of vectors (K, D); rotated to their places, where there are any."""
    heads = projection(vectors).view(len(vectors), -1, 4)  # (K, H, d)
    if places is None:
        return heads
    return model.positions[0](torch.tensor([places])).rotate(heads.transpose(0, 1)[None])[0].transpose(0, 1)


def attention_of_one(q, k, v):
    """Softmax attention of one query (H, d) over keys and values (K, G, d), head by head."""
    per_group = len(q) // k.shape[1]
    out = [(k[:, h // per_group] @ q[h] / 2).softmax(0) @ v[:, h // per_group] for h in range(len(q))]  # sqrt(d) = 2
    return torch.cat(out)


def pool_plainly(pooling, h):
    """Summaries (m, D) of the tokens h (K, D) of a segment."""
    if hasattr(pooling, "queries"):
        return (pooling.queries @ h.T / h.shape[1] ** 0.5).softmax(-1) @ h
    if not list(pooling.parameters()):
        return h.mean(0, keepdim=True)
    u = torch.tanh(h @ pooling.map.weight.T + pooling.map.bias)  # u_t = tanh(W h_t + b)
    alpha = (u @ pooling.context.weight[0]).softmax(0)  # softmax(u_t . u_w)
    return (alpha @ h)[None]


def loops(model, x, causal):
    """The layer for one document x (T, D)."""
    attention, tokens, size = model.blocks[0].attention, len(x), model.config.layers[0].attention.segment
    segments = [range(begin, min(begin + size, tokens)) for begin in range(0, tokens, size)]
    pooled = [pool_plainly(attention.pooling, x[list(segment)]) for segment in segments]  # (m, D) each
    related = []
    for number, summaries in enumerate(pooled):
        others = range(number + 1) if causal else range(len(segments))
        vectors = torch.cat([pooled[i] for i in others])
        places = [segments[i][-1] for i in others for _ in pooled[i]]
        k = heads_of(model, attention.segment_k, vectors, places)
        v = heads_of(model, attention.segment_v, vectors, None)
        q = heads_of(model, attention.segment_q, summaries, [segments[number][-1]] * len(summaries))
        related.append(summaries + attention.segment_o(torch.stack([attention_of_one(one, k, v) for one in q])))
    out = []
    for t in range(tokens):
        own = t // size
        near = [i for i in segments[own] if i <= t or not causal]
        far = [i for i in range(len(segments)) if i < own or (i != own and not causal)]
        vectors = torch.cat([x[near], *(related[i] for i in far)])
        places = near + [segments[i][-1] for i in far for _ in related[i]]
        q = heads_of(model, attention.q, x[t : t + 1], [t])[0]
        k, v = heads_of(model, attention.k, vectors, places), heads_of(model, attention.v, vectors, None)
        out.append(attention.o(attention_of_one(q, k, v)))
    return torch.stack(out)


def run(model, x, documents=None):
    _, context = model.embed(torch.zeros(x.shape[:2], dtype=torch.int64), documents=documents)
    return model.blocks[0].attention(x, context)


@every_direction
@every_choice
@pytest.mark.parametrize("tokens", [1, 8, 17])
def test_the_layer_equals_loops_over_tokens_and_segments(choice, direction, tokens):
    model, x = build(direction, **CHOICES[choice]), torch.randn(1, tokens, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(run(model, x)[0], loops(model, x[0], direction == "causal"), atol=1e-6, rtol=0)


@every_direction
@every_choice
def test_every_document_of_every_row_has_segments_of_its_own(choice, direction):
    documents = torch.tensor([[0] * 1 + [1] * 17 + [2] * 12, [-1] * 5 + [0] * 25, [4] * 9 + [5] * 2 + [6] * 19])
    model, x = build(direction, **CHOICES[choice]), torch.randn(3, 30, 16, dtype=torch.float64)
    with torch.no_grad():
        packed = run(model, x, documents)
        for row in range(3):
            for document in set(documents[row].tolist()) - {-1}:
                where = documents[row] == document
                expected = loops(model, x[row, where], direction == "causal")
                torch.testing.assert_close(packed[row, where], expected, atol=1e-6, rtol=0)


@every_choice
@pytest.mark.parametrize("pieces", [[1] * 30, [9, 1, 1, 6, 1, 12], [30]], ids=str)
def test_pieces_behind_a_cache_equal_the_whole(choice, pieces):
    """Also where rows are padded on the left, so that segments end at other steps in each."""
    model, tokens = build(depth=2, **CHOICES[choice]), torch.randint(40, (3, 30))
    for documents in (None, torch.tensor([[-1] * 5 + [1] * 25, [-1] * 7 + [0] * 23, [5] * 30])):
        cache, done = model.new_cache(3, 30), []
        numbers = [None] * len(pieces) if documents is None else documents.split(pieces, 1)
        with torch.no_grad():
            expected = model(tokens, documents=documents).logits
            for piece, number in zip(tokens.split(pieces, 1), numbers, strict=True):
                done.append(model(piece, documents=number, cache=cache).logits)
        seen = torch.ones(3, 30, dtype=torch.bool) if documents is None else documents >= 0
        torch.testing.assert_close(torch.cat(done, 1)[seen], expected[seen], atol=1e-5, rtol=0)
        assert sum(layer.bytes() for layer in cache.layers) == 3 * model.cache_bytes(30, torch.float64)


def test_the_cache_forgets_the_tokens_of_a_segment_that_is_over():
    model, per_token, per_segment = build(segment=4, segment_heads=3), 16 + 2 * 2 * 4, 2 * 2 * 4 + 2 * 3 * 4
    assert model.cache_bytes(3, torch.float64) == 8 * 3 * per_token
    assert model.cache_bytes(400, torch.float64) == 8 * (3 * per_token + 100 * per_segment)


def test_segments_are_put_in_the_context_of_earlier_ones():
    """Far tokens reach the last one through the attention between segments, too: without it the output is another."""
    model, x = build(segment=3), torch.randn(1, 12, 16, dtype=torch.float64)
    before = run(model, x)
    with torch.no_grad():
        model.blocks[0].attention.segment_o.weight.zero_()
    changed = (run(model, x) - before).abs().amax(-1)[0] > 1e-6
    assert changed.tolist() == [False] * 3 + [True] * 9


def test_operations_are_those_that_run():
    model = build(dtype=torch.float32, segment=8, segment_heads=2)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as found:
        model(torch.zeros(1, 256, dtype=torch.int64))
    assert 0 <= found.get_total_flops() - 256 * model.flops_per_token(256) < 256  # less than one for each token


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"segment": 1}, "segment must be at least 2 tokens, got 1"),
        ({"segment": 4, "segment_heads": 0}, "segment_heads must be at least 1, got 0"),
        ({"segment": 4, "position": "t5"}, "works with positions that act on rotation"),
        ({}, "'segment' is missing"),
    ],
)
def test_what_makes_no_sense_is_refused(attention, message):
    with pytest.raises(UserError, match=message):
        build(**attention)


def test_windows_that_grow_with_the_depth_reach_as_far_as_their_sum():
    """The layer-wise hierarchy is a pattern of layers; what a token depends on, by its gradient."""
    torch.manual_seed(0)
    local = {name: {"kind": "window", "heads": 2, "window": size} for name, size in (("near", 2), ("wide", 4))}
    config = {"vocab_size": 40, "width": 16, "depth": 2, "attention": local, "layers": ["near/mlp", "wide/mlp"]}
    model = Transformer(ModelConfig.from_dict(config | {"feedforward": {"mlp": {"kind": "mlp", "width": 24}}}))
    x, context = model.embed(torch.randint(40, (1, 12)))
    y = x = x.detach().requires_grad_()
    for block in model.blocks:
        y = block(y, context).y
    (gradient,) = torch.autograd.grad(y[0, -1].square().sum(), x)
    assert gradient[0].any(-1).tolist() == [False] * 7 + [True] * 5  # itself, and 1 + 3 tokens before

"""Longformer's window and global tokens against dense masks, `transformers`, and its cost."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from models.attention.kernels import banded
from models.attention.kernels.sdpa import PLAIN, AttentionMask, ScoreMod, reference_attention
from models.attention.longformer import attend_documents
from models.config import ModelConfig
from models.errors import UserError
from models.positions.alibi import slopes
from models.transformer import Transformer

RICH = {"position": "alibi", "kv_heads": 2, "scale": 0.9, "softcap": 3.0, "sink": "learned", "qk_norm": "rms"}


def build(window=4, globals=2, direction="causal", position="none", **attention):
    torch.manual_seed(0)
    spec = {"kind": "longformer", "heads": 4, "window": window, "globals": globals, **attention}
    config = {"vocab_size": 40, "width": 16, "depth": 2, "context": 64, "position": position, "attention": spec}
    config |= {"direction": direction, "feedforward": {"kind": "swiglu", "width": 24}}
    model = Transformer(ModelConfig.from_dict(config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_((1 if "norm" in name else 0) + 0.3 * torch.randn(parameter.shape))
    return model


def document_numbers(tokens):
    """Two rows: documents shorter than the global tokens, than a window and longer; padding on the left."""
    first, second = [0] * 1 + [1] * 3 + [2] * 9 + [3] * 60, [-1] * 5 + [7] * 60
    return torch.tensor([first[:tokens], second[:tokens]])


def dense_oracle(attention, x, documents, alibi):
    """Two softmaxes over all pairs, and one row or the other: the definition written down without blocks."""
    tokens = x.shape[1]
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)
    documents = torch.zeros(len(x), tokens) if documents is None else documents
    same = documents[:, :, None] == documents[:, None, :]  # (B, T, T)
    starts = same.int().argmax(-1)  # (B, T), the first token of the same document
    is_global = j - starts < attention.globals  # (B, T)
    window, dilation = attention.window, attention.band.dilation
    if attention.bidirectional:
        near, past = ((i - j).abs() <= dilation * window / 2), torch.ones(tokens, tokens, dtype=torch.bool)
    else:
        near, past = (i - j < window * dilation), j <= i
    near = near & ((i - j) % dilation == 0)
    ordinary = same & past & (near | is_global[:, None, :])

    def rows(q, k, v, mask):
        q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in (q(x), k(x), v(x)))
        if attention.normalises:
            q, k = attention.q_norm(q), attention.k_norm(k)
        bias = -slopes(4)[:, None, None] * (i - j).abs() if alibi else None
        sink = None if attention.sink is None else attention.sink(q)
        scoring = ScoreMod(attention.scale, bias, attention.softcap, sink)
        return reference_attention(q, k, v, AttentionMask(mask[:, None], False), scoring)

    local = rows(attention.q, attention.k, attention.v, ordinary)
    own = rows(attention.q_global, attention.k_global, attention.v_global, same & past)
    y = torch.where(is_global[:, None, :, None], own, local)
    return attention.o(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("options", [{}, RICH], ids=["plain", "rich"])
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("tokens", [1, 3, 4, 13, 47])
def test_it_equals_dense_masks(tokens, direction, dilation, documents, options, monkeypatch):
    """Outputs and gradients in fp64."""
    monkeypatch.setattr(banded, "SMALLEST", 6)  # so that there are several
    model = build(direction=direction, dilation=dilation, **options).double()
    numbers = document_numbers(tokens) if documents else None
    _, context = model.embed(torch.zeros(2, tokens, dtype=torch.int64), documents=numbers)
    attention = model.blocks[0].attention
    x = torch.randn(2, tokens, 16, dtype=torch.float64, requires_grad=True)
    mine, theirs = attention(x, context), dense_oracle(attention, x, numbers, "position" in options)
    torch.testing.assert_close(mine, theirs)
    upstream, inputs = torch.randn_like(theirs), [x, *attention.parameters()]
    pairs = zip(*(torch.autograd.grad(y, inputs, upstream, allow_unused=True) for y in (mine, theirs)), strict=True)
    for parameter, found in zip(inputs, pairs, strict=True):
        torch.testing.assert_close(*(torch.zeros_like(parameter) if y is None else y for y in found))


@pytest.mark.parametrize("options", [{}, RICH], ids=["plain", "rich"])
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("pieces", [[1] * 20, [1, 2, 10, 1, 6], [14, 1, 1, 4]], ids=str)
def test_a_cache_of_the_window_and_the_global_tokens_is_enough(pieces, dilation, documents, options):
    model, tokens = build(globals=3, dilation=dilation, **options), torch.randint(40, (2, 20))
    numbers = document_numbers(20) if documents else None
    cache, found, done = model.new_cache(2, 20), [], 0
    with torch.no_grad():
        for new in pieces:
            own = None if numbers is None else numbers[:, done : done + new]
            found.append(model(tokens[:, done : done + new], documents=own, cache=cache).logits)
            done += new
        whole = model(tokens, documents=numbers).logits
    torch.testing.assert_close(torch.cat(found, dim=1), whole, atol=1e-5, rtol=1e-5)
    assert model.cache_bytes(20) == model.cache_bytes(18) == sum(layer.bytes() for layer in cache.layers) / 2


@pytest.mark.parametrize("padded", [False, True])
def test_it_is_the_attention_of_longformer(padded):
    config = LongformerConfig(
        hidden_size=16,
        num_attention_heads=4,
        num_hidden_layers=1,
        attention_window=[6],
        attention_probs_dropout_prob=0.0,
    )
    theirs = LongformerSelfAttention(config, layer_id=0).eval()
    attention = build(window=6, globals=3, direction="bidirectional", bias=True).blocks[0].attention
    names = {"q": "query", "k": "key", "v": "value"}
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
        for mine, other in (names | {f"{a}_global": f"{b}_global" for a, b in names.items()}).items():
            getattr(attention, mine).load_state_dict(getattr(theirs, other).state_dict())
        attention.o.weight.copy_(torch.eye(16))
    x = torch.randn(2, 24, 16)
    mask = torch.zeros(2, 24)
    mask[:, :3] = 10000
    documents = None
    if padded:
        mask[1, 19:] = -10000
        documents = torch.where(mask < 0, -1, 0)
    _, context = build(direction="bidirectional").embed(torch.zeros(2, 24, dtype=torch.int64), documents=documents)
    (expected,) = theirs(
        x, attention_mask=mask, is_index_masked=mask < 0, is_index_global_attn=mask > 0, is_global_attn=True
    )
    real = mask >= 0
    torch.testing.assert_close(attention(x, context)[real], expected[real], atol=1e-5, rtol=1e-5)


def test_the_global_maps_start_as_copies():
    config = build(bias=True).config
    attention = Transformer(config).blocks[1].attention
    for name in ("q", "k", "v"):
        assert torch.equal(getattr(attention, name).weight, getattr(attention, f"{name}_global").weight)
        assert getattr(attention, name).weight is not getattr(attention, f"{name}_global").weight


def test_a_later_token_sees_the_window_and_the_global_tokens_only():
    model = build(window=3, globals=2).double()
    x, context = model.embed(torch.randint(40, (1, 20)))
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model.blocks[0](x, context).y[0, 17].sum(), x)
    assert {number for number, row in enumerate(gradient[0]) if row.any()} == {0, 1, 15, 16, 17}


@pytest.mark.parametrize("scoring", [PLAIN, ScoreMod(0.5, None, 2.0, torch.tensor([0.3, -1.0]))], ids=["plain", "rich"])
def test_a_softmax_by_documents_is_one_for_each(scoring):
    q, (k, v) = torch.randn(2, 2, 30, 4), torch.randn(2, 2, 1, 30, 4)
    numbers = document_numbers(30)
    starts = (numbers[:, :, None] == numbers[:, None, :]).int().argmax(-1)
    y = attend_documents(q, k, v, starts, 2, lambda q, k, distance: scoring)
    for row in range(2):
        for start in starts[row].unique().tolist():
            own = (starts[row] == start).nonzero().flatten()
            k_own, v_own = k[row : row + 1, :, own], v[row : row + 1, :, own]
            expected = reference_attention(
                q[row : row + 1, :, own[:2]], k_own, v_own, AttentionMask(None, False), scoring
            )
            torch.testing.assert_close(y[row : row + 1, :, own[:2]], expected)
            assert not y[row, :, own[2:]].any()


@pytest.mark.parametrize("after", [0, 2])
def test_the_first_tokens_of_a_document_are_seen_by_later_ones_only(after, monkeypatch):
    monkeypatch.setattr(banded, "SMALLEST", 6)
    q, k, v = torch.randn(3, 2, 1, 40, 4)
    numbers, i, j = document_numbers(40), torch.arange(40)[:, None], torch.arange(40)
    same = numbers[:, :, None] == numbers[:, None, :]
    starts = same.int().argmax(-1)  # (B, T)
    anchored = (j - starts[..., None] < 3) & (j <= i)
    seen = same & (((i - j <= 1) & (j - i <= after)) | anchored)
    expected = reference_attention(q, k, v, AttentionMask(seen[:, None], False))
    documents, anchors = (numbers, numbers), banded.Anchors(starts, 3)
    y = banded.attend_band(q, k, v, banded.Band(1, after), lambda *_: PLAIN, documents, anchors=anchors)
    torch.testing.assert_close(y, expected)


def test_an_anchor_counts_once_wherever_a_document_begins(monkeypatch):
    """Also where it is the first key that a block sees, or the last that it does not: a document from every place."""
    monkeypatch.setattr(banded, "SMALLEST", 6)  # so that blocks hold 16 queries and see 16 keys before them
    q, k, v = torch.randn(3, 40, 1, 64, 4)
    i, j, starts = torch.arange(64)[:, None], torch.arange(64), torch.arange(40)
    numbers = (j >= starts[:, None]).long()  # (B, T)
    starts = torch.where(numbers > 0, starts[:, None], 0)
    same = numbers[:, :, None] == numbers[:, None, :]
    seen = same & (j <= i) & ((i - j <= 1) | (j - starts[..., None] < 3))
    table = torch.randn(64)

    def bias(distance):  # (., .) -> (H, ., .)
        return table[distance.clamp(0, 63)][None]

    expected = reference_attention(q, k, v, AttentionMask(seen[:, None], False), ScoreMod(None, bias(i - j)))
    documents, anchors = (numbers, numbers), banded.Anchors(starts, 3, bias)

    def scoring(q, k, distance):
        return ScoreMod(None, bias(distance))

    y = banded.attend_band(q, k, v, banded.Band(1, 0), scoring, documents, anchors=anchors)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("window", [1, 3])
def test_a_cached_anchor_counts_once_wherever_a_document_begins(window):
    model, tokens = build(window=window, globals=3), torch.randint(40, (16, 20))
    numbers = (torch.arange(20) >= torch.arange(16)[:, None]).long()
    with torch.no_grad():
        whole = model(tokens, documents=numbers).logits
        for first in (1, 6):
            cache = model.new_cache(16, 20)
            steps = [slice(0, first), *(slice(n, n + 1) for n in range(first, 20))]
            found = [model(tokens[:, s], documents=numbers[:, s], cache=cache).logits for s in steps]
            torch.testing.assert_close(torch.cat(found, dim=1), whole, atol=1e-5, rtol=1e-5)


def largest_allocation(model, tokens, documents):
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        model(torch.zeros(1, tokens, dtype=torch.int64), documents=documents)
    return max(event.self_cpu_memory_usage for event in found.events())


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_memory_grows_with_the_length_and_not_with_its_square(direction, packed):
    model = build(window=16, direction=direction)
    found = [
        largest_allocation(model, tokens, torch.arange(tokens)[None] // 100 if packed else None)
        for tokens in (2048, 4096)
    ]
    assert found[1] < 2.5 * found[0]
    assert found[1] < 4096 * 4096 / 4  # bytes of a mask of all pairs: 16.8 million


def test_sizes_that_make_no_sense_are_refused():
    with pytest.raises(UserError, match="globals must be at least 1"):
        build(globals=0)
    with pytest.raises(UserError, match="window must be even in an encoder"):
        build(window=3, direction="bidirectional")

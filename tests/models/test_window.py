"""Sliding-window attention against a dense mask, its cost, and its cache."""

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from models.attention.full import token_distance
from models.cache import Kept, RollingCache
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer


def build(window=4, position="rope", **attention):
    torch.manual_seed(0)
    spec = {"kind": "window", "heads": 4, "kv_heads": 2, "window": window, **attention}
    config = {"vocab_size": 40, "width": 16, "depth": 2, "context": 64, "position": position, "attention": spec}
    return Transformer(ModelConfig.from_dict(config | {"feedforward": {"kind": "swiglu", "width": 24}})).eval()


def dense_oracle(attention, q, kept, context):
    """One softmax over all tokens under the mask i - window < j <= i, written down without blocks."""
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(kept.keys.shape[2])
    mask = ((j <= i) & (j > i - attention.window))[None, None]
    if context.documents is not None:
        mask = mask & (context.documents[:, :, None] == context.documents[:, None, :])[:, None]
    return F.scaled_dot_product_attention(q, kept.keys, kept.values, attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("tokens", [3, 4, 5, 8, 9, 15, 16, 17])
def test_blocks_equal_a_dense_mask(tokens, documents):
    attention = build().blocks[0].attention.double()
    q = torch.randn(2, 4, tokens, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, tokens, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    numbers = torch.stack([torch.arange(tokens) // 6, torch.arange(tokens) // 5]) if documents else None
    _, context = build().embed(torch.zeros(2, tokens, dtype=torch.int64), documents=numbers)
    mine, theirs = attention.mix(q, Kept(k, v, None), context), dense_oracle(attention, q, Kept(k, v, None), context)
    torch.testing.assert_close(mine, theirs)
    upstream = torch.randn_like(theirs)
    pairs = zip(*(torch.autograd.grad(y, (q, k, v), upstream) for y in (mine, theirs)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("position", ["rope", "alibi", "t5", "none", "learned"])
def test_a_window_over_everything_is_full_attention(position):
    window = build(window=20, position=position)
    full = window.config.to_dict()
    for layer in full["layers"]:
        layer["attention"] = {**layer["attention"], "kind": "full"}
        del layer["attention"]["window"]
    model = Transformer(ModelConfig.from_dict(full)).eval()
    model.load_state_dict(window.state_dict())
    tokens = torch.randint(40, (2, 17))
    torch.testing.assert_close(window(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)


def test_a_token_sees_exactly_the_window_of_each_layer():
    model, tokens = build(window=3), torch.randint(40, (1, 12))
    reach = 2 * (3 - 1)  # two layers
    before = model(tokens).logits[0, -1]
    for back in range(12):
        changed = tokens.clone()
        changed[0, -1 - back] = (changed[0, -1 - back] + 1) % 40
        assert torch.equal(model(changed).logits[0, -1], before) == (back > reach)


def test_the_cache_keeps_exactly_the_window():
    model = build(window=4)
    cache = model.new_cache(1, 30)
    with torch.no_grad():
        for piece in torch.randint(40, (1, 30)).split([9, 1, 1, 7, 1, 11], dim=1):
            model(piece, cache=cache)
    layer = cache.layers[0]
    assert layer.keys.shape[2] == 4
    assert sorted(layer.numbers.tolist()) == [26, 27, 28, 29]
    assert model.cache_bytes(30) == model.cache_bytes(4) == sum(layer.bytes() for layer in cache.layers)
    assert model.cache_bytes(3) < model.cache_bytes(4)


@pytest.mark.parametrize("pieces", [[1] * 7, [3, 1, 1, 2], [7], [2, 5]], ids=str)
def test_the_rolling_cache_returns_what_a_query_can_see(pieces):
    cache = RollingCache(1, 1, 3, 1, torch.device("cpu"), torch.float32)
    done = 0
    for new in pieces:
        numbers = torch.arange(done, done + new)
        k = numbers.float().view(1, 1, new, 1)
        kept = cache.append(k, -k)
        assert torch.equal(kept.keys.flatten().long(), kept.columns)
        assert torch.equal(kept.values, -kept.keys)
        for number in numbers.tolist():
            assert set(range(max(0, number - 2), number + 1)) <= set(kept.columns.tolist())
        done += new


def largest_allocation(model, tokens):
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        model(torch.zeros(1, tokens, dtype=torch.int64), documents=torch.zeros(1, tokens, dtype=torch.int64))
    return max(event.self_cpu_memory_usage for event in found.events())


def test_memory_grows_with_the_length_and_not_with_its_square():
    model = build(window=16)
    assert largest_allocation(model, 4096) < 2.5 * largest_allocation(model, 2048)
    assert largest_allocation(model, 4096) < 4096 * 4096 / 4  # bytes of a mask of all pairs: 16.8 million


def test_no_window_is_refused():
    with pytest.raises(UserError, match="window must be at least 1"):
        build(window=0)
    with pytest.raises(UserError, match="'window' is missing"):
        ModelConfig.from_dict(
            {"vocab_size": 9, "width": 8, "depth": 1, "attention": {"kind": "window", "heads": 2},
             "feedforward": {"kind": "mlp", "width": 8}}
        )  # fmt: skip


def test_distance_is_counted_from_the_new_tokens():
    _, context = build().embed(torch.zeros(1, 2, dtype=torch.int64))
    q = torch.zeros(1, 1, 2, 1)
    kept = Kept(torch.zeros(1, 1, 3, 1), torch.zeros(1, 1, 3, 1), torch.tensor([5, 3, 4]))
    assert token_distance(q, kept, context._replace(past=4)).tolist() == [[-1, 1, 0], [0, 2, 1]]

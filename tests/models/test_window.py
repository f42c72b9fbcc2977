"""Sliding-window attention against a dense mask, its cost, and its cache."""

import pytest
import torch
import torch.nn.functional as F
from local_attention import LocalAttention
from torch.profiler import ProfilerActivity, profile
from transformers import GPTNeoConfig, MistralConfig, ModernBertConfig, ModernBertModel
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralRotaryEmbedding

from models.attention.full import token_distance
from models.attention.kernels import banded
from models.cache import Kept, RollingCache
from models.config import ModelConfig
from models.errors import UserError
from models.specs import ATTENTIONS
from models.transformer import Transformer


def configured(window=4, position="rope", direction="causal", **attention):
    spec = {"kind": "window", "heads": 4, "kv_heads": 2, "window": window, **attention}
    config = {"vocab_size": 40, "width": 16, "depth": 2, "context": 64, "position": position, "attention": spec}
    config["direction"] = direction
    return ModelConfig.from_dict(config | {"feedforward": {"kind": "swiglu", "width": 24}})


def build(*numbers, **attention):
    torch.manual_seed(0)
    return Transformer(configured(*numbers, **attention)).eval()


def dense_oracle(attention, q, kept, context):
    """One softmax over all tokens under the mask of the definition, written down without blocks."""
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(kept.keys.shape[2])
    window, dilation = attention.window, attention.band.dilation
    if attention.bidirectional:
        mask = (i - j).abs() <= dilation * window / 2
    else:
        mask = (j <= i) & (j > i - window * dilation)
    mask = (mask & ((i - j) % dilation == 0))[None, None]
    if context.documents is not None:
        mask = mask & (context.documents[:, :, None] == context.documents[:, None, :])[:, None]
    return F.scaled_dot_product_attention(q, kept.keys, kept.values, attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("dilation", [1, 2, 5])
@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("tokens", [3, 4, 5, 8, 16, 17, 41])
def test_blocks_equal_a_dense_mask(tokens, direction, dilation, documents, monkeypatch):
    monkeypatch.setattr(banded, "SMALLEST", 6)  # so that there are several
    attention = build(direction=direction, dilation=dilation).blocks[0].attention.double()
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


@pytest.mark.parametrize("dilation", [1, 3])
def test_no_gradient_is_lost_in_the_rows_that_fill_up_a_block(dilation):
    """With a softcap the scores are made by hand, where a row without keys would be not a number."""
    model = build(dilation=dilation, softcap=2.0)
    documents = torch.arange(2).repeat_interleave(50)[None]
    model(torch.randint(40, (1, 100)), documents=documents).logits.square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("position", ["rope", "alibi", "t5", "none", "learned"])
def test_a_window_over_everything_is_full_attention(position):
    window = build(window=20, position=position)
    full = window.config.to_dict()
    for layer in full["layers"]:
        layer["attention"] = {**layer["attention"], "kind": "full"}
        del layer["attention"]["window"], layer["attention"]["dilation"]
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


def seen_by(model, token, tokens=24):
    """The tokens on whose embeddings the output of `token` depends: the rows of a Jacobian that are not zero."""
    model = model.double()
    x, context = model.embed(torch.randint(40, (1, tokens)))
    x = x.detach().requires_grad_()
    y = x
    for block in model.blocks:
        y = block(y, context).y
    (gradient,) = torch.autograd.grad((y[0, token] * torch.randn(16, dtype=y.dtype)).sum(), x)
    return {number for number, row in enumerate(gradient[0]) if row.any()}


def test_windows_that_grow_with_the_depth_give_the_reach_of_their_sum():
    """A schedule over the layers, w1 < w2 < full (Longformer, arXiv 2004.05150, section 4.1)."""

    def model(*names):
        window = {"kind": "window", "heads": 4}
        attention = {
            "near": {**window, "window": 2},
            "far": {**window, "window": 5},
            "apart": {**window, "window": 3, "dilation": 4},
            "all": {"kind": "full", "heads": 4},
        }
        feedforward = {"plain": {"kind": "swiglu", "width": 24}}
        config = {"vocab_size": 40, "width": 16, "position": "none", "feedforward": feedforward}
        torch.manual_seed(0)
        return Transformer(ModelConfig.from_dict(config | {"attention": attention, "layers": list(names)}))

    last = 20
    assert seen_by(model("near"), last) == {19, 20}
    assert seen_by(model("near", "far"), last) == set(range(last - 1 - 4, last + 1))
    assert seen_by(model("near", "near", "far"), last) == set(range(last - 1 - 1 - 4, last + 1))
    assert seen_by(model("near", "apart"), last) == {20, 19, 16, 15, 12, 11}
    assert seen_by(model("near", "far", "all"), last) == set(range(last + 1))


@pytest.mark.parametrize(("dilation", "expected"), [(1, {8, 9, 10, 11, 12}), (3, {4, 7, 10, 13, 16})])
def test_a_token_of_an_encoder_sees_half_a_window_on_each_side(dilation, expected):
    model = build(window=4, dilation=dilation, direction="bidirectional")
    del model.blocks[1]
    assert seen_by(model, 10) == expected


@pytest.mark.parametrize("position", ["rope", "t5"])
@pytest.mark.parametrize("dilation", [1, 3])
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_a_long_piece_behind_a_cache_is_cut_into_blocks_too(documents, dilation, position):
    model, tokens = build(window=3, dilation=dilation, position=position), torch.randint(40, (2, 40))
    numbers = torch.stack([torch.arange(40) // 16, torch.arange(40) // 19]) if documents else None
    cache, pieces = model.new_cache(2, 40), []
    with torch.no_grad():
        for first, last in ((0, 2), (2, 12), (12, 13), (13, 40)):
            own = None if numbers is None else numbers[:, first:last]
            # a document that began in an earlier piece continues its positions there
            steps = torch.arange(first, last)[None]
            positions = (
                steps if numbers is None else steps - torch.stack([numbers[0] * 16, numbers[1] * 19])[:, steps[0]]
            )
            pieces.append(model(tokens[:, first:last], documents=own, positions=positions, cache=cache).logits)
        whole = model(tokens, documents=numbers).logits
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=1e-5, rtol=1e-5)


def test_the_next_token_behind_a_cache_needs_no_mask():
    attention, cache = build(window=4).blocks[0].attention, RollingCache(1, 2, 4, 4, torch.device("cpu"), torch.float32)
    for step in range(6):
        _, context = build().embed(torch.zeros(1, 1, dtype=torch.int64))
        context = context._replace(past=step)
        kept = cache.append(*torch.zeros(2, 1, 2, 1, 4))
        distance = token_distance(torch.zeros(1, 4, 1, 4), kept, context)
        assert attention._mask(distance, kept, context) is None
        assert attention.band.holds(distance).all()


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_it_is_the_attention_of_local_attention(direction):
    """Whose causal windows hold one key more, and whose encoder looks `window_size` to each side."""
    causal = direction == "causal"
    attention = build(window=9 if causal else 16, position="none", direction=direction).blocks[0].attention
    theirs = LocalAttention(window_size=8, causal=causal, exact_windowsize=True, use_rotary_pos_emb=False)
    q, k, v = torch.randn(3, 2, 4, 32, 4)
    _, context = build(position="none").embed(torch.zeros(2, 32, dtype=torch.int64))
    torch.testing.assert_close(attention.mix(q, Kept(k, v, None), context), theirs(q, k, v), atol=1e-5, rtol=1e-5)


def load(attention, theirs):
    """Give ours the weights of q, k, v and o (Linear, or (weight, None)) in this order."""
    with torch.no_grad():
        for ours, linear in zip((attention.q, attention.k, attention.v, attention.o), theirs, strict=True):
            ours.weight.copy_(linear.weight)
            if linear.bias is not None:
                ours.bias.copy_(linear.bias)


def mistral(window):
    config = MistralConfig(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=2, head_dim=4, sliding_window=window,
        attn_implementation="eager",
    )  # fmt: skip
    theirs = MistralAttention(config, layer_idx=0)
    rotary = MistralRotaryEmbedding(config)

    def run(x):
        steps = torch.arange(x.shape[1])
        mask = (steps <= steps[:, None]) & (steps > steps[:, None] - window)
        mask = torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))[None, None]
        return theirs(x, position_embeddings=rotary(x, steps[None]), attention_mask=mask)[0]

    return run, [theirs.q_proj, theirs.k_proj, theirs.v_proj, theirs.o_proj], {}


def gpt_neo(window):
    config = GPTNeoConfig(
        hidden_size=16, num_heads=4, num_layers=1, attention_types=[[["local"], 1]], window_size=window,
        attention_dropout=0.0, resid_dropout=0.0,
    )  # fmt: skip
    theirs = GPTNeoSelfAttention(config, "local", layer_id=0)
    projections = [theirs.q_proj, theirs.k_proj, theirs.v_proj, theirs.out_proj]
    return lambda x: theirs(x)[0], projections, {"position": "none", "scale": 1.0, "out_bias": True, "kv_heads": 4}


@pytest.mark.parametrize("make", [mistral, gpt_neo])
def test_it_is_the_attention_of_other_decoders(make):
    run, projections, options = make(5)
    model = build(window=5, **options)
    load(model.blocks[0].attention, projections)
    x = torch.randn(2, 23, 16)
    _, context = model.embed(torch.zeros(2, 23, dtype=torch.int64))
    torch.testing.assert_close(model.blocks[0].attention(x, context), run(x), atol=1e-5, rtol=1e-5)


def test_it_is_the_local_attention_of_modernbert():
    config = ModernBertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        local_attention=6, global_attn_every_n_layers=2, attn_implementation="eager", pad_token_id=0,
        layer_types=["full_attention", "sliding_attention"],
    )  # fmt: skip
    theirs = ModernBertModel(config).eval()
    seen = {}
    local = theirs.layers[1].attn
    local.register_forward_hook(
        lambda module, args, kwargs, y: seen.update(x=args[0] if args else kwargs["hidden_states"], y=y[0]),
        with_kwargs=True,
    )
    with torch.no_grad():
        theirs(torch.randint(1, 40, (2, 23)), attention_mask=torch.ones(2, 23, dtype=torch.int64))
    base = config.rope_parameters["sliding_attention"]["rope_theta"]
    model = build(window=6, direction="bidirectional", position={"kind": "rope", "base": base}, kv_heads=4)
    with torch.no_grad():
        for ours, weight in zip(("q", "k", "v"), local.Wqkv.weight.chunk(3), strict=True):
            getattr(model.blocks[0].attention, ours).weight.copy_(weight)
        model.blocks[0].attention.o.weight.copy_(local.Wo.weight)
    _, context = model.embed(torch.zeros(2, 23, dtype=torch.int64))
    mine = model.blocks[0].attention(seen["x"], context)
    torch.testing.assert_close(mine, seen["y"].view_as(mine), atol=1e-5, rtol=1e-5)


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
        columns = numbers if kept.key_positions is None else kept.key_positions
        assert torch.equal(kept.keys.flatten().long(), columns)
        assert new == 1 or torch.equal(columns, columns.sort().values)
        assert torch.equal(kept.values, -kept.keys)
        for number in numbers.tolist():
            assert set(range(max(0, number - 2), number + 1)) <= set(columns.tolist())
        done += new


def largest_allocation(model, tokens):
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        model(torch.zeros(1, tokens, dtype=torch.int64), documents=torch.zeros(1, tokens, dtype=torch.int64))
    return max(event.self_cpu_memory_usage for event in found.events())


@pytest.mark.parametrize("dilation", [1, 8])
def test_memory_grows_with_the_length_and_not_with_its_square(dilation):
    model = build(window=16, dilation=dilation)
    assert largest_allocation(model, 4096) < 2.5 * largest_allocation(model, 2048)
    assert largest_allocation(model, 4096) < 4096 * 4096 / 4  # bytes of a mask of all pairs: 16.8 million


def test_no_window_is_refused():
    with pytest.raises(UserError, match="window must be at least 1"):
        build(window=0)
    with pytest.raises(UserError, match="dilation must be at least 1"):
        build(dilation=0)
    with pytest.raises(UserError, match="window must be even in an encoder"):
        configured(window=3, direction="bidirectional")
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


@pytest.mark.parametrize("length", [3, 4, 9, 10, 100])
def test_what_a_window_costs_is_bounded_by_what_it_sees(length):
    """4 keys of every third token: products with 4 keys, a cache of the 10 tokens from the first to the last."""
    heads = {"heads": 4, "kv_heads": 2, "head_width": 4}
    window, full = (ATTENTIONS.parse({"kind": kind, **heads, **more}, "attention")
                    for kind, more in (("window", {"window": 4, "dilation": 3}), ("full", {})))  # fmt: skip
    assert window.span() == 10
    assert window.cache_elements(length) == full.cache_elements(min(length, 10))
    assert window.flops_per_token(16, length) == full.flops_per_token(16, min(length, 4))
    both = ATTENTIONS.parse({"kind": "longformer", **heads, "window": 4, "globals": 2}, "attention")
    assert both.cache_elements(length) == full.cache_elements(min(length, 4)) + 2 * full.cache_elements(2)
    own = 2 * 4 * (2 * 16 * (4 + 2 * 2) + 4 * 4 * 2) // length  # two rows of maps of their own, and their scores
    assert both.flops_per_token(16, length) == full.flops_per_token(16, min(length, 6)) + own


@pytest.mark.parametrize("dilation", [1, 2])
def test_the_next_token_behind_a_cache_sees_its_own_document_alone(dilation):
    model, tokens = build(window=4, dilation=dilation), torch.randint(40, (3, 12))
    numbers = (torch.arange(12) >= torch.tensor([[5], [9], [12]])).long()  # two rows begin another document
    cache = model.new_cache(3, 12)
    with torch.no_grad():
        steps = [slice(n, n + 1) for n in range(12)]
        found = [model(tokens[:, step], documents=numbers[:, step], cache=cache).logits for step in steps]
        whole = model(tokens, documents=numbers).logits
    torch.testing.assert_close(torch.cat(found, dim=1), whole, atol=1e-5, rtol=1e-5)

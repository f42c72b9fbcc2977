"""Selective attention against x-transformers, against one token at a time, and its cache, budget and losses."""

import copy

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from x_transformers.attend import selective_attn
from x_transformers.x_transformers import Attention

from models.attention.selective import NOTE, last_queries
from models.cache import Kept
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer


def build(depth=2, position="none", **attention):
    torch.manual_seed(0)
    config = {"vocab_size": 40, "width": 16, "depth": depth, "context": 64, "position": position}
    spec = {"kind": "selective", "heads": 4, **attention}
    model = Transformer(
        ModelConfig.from_dict(config | {"attention": spec, "feedforward": {"kind": "swiglu", "width": 24}})
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.4 * torch.randn(parameter.shape))
    return model.eval()


def random_tokens(*shape):
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(1))


def heads_of(rows, kv_heads, tokens, dtype=torch.float64):
    q = torch.randn(rows, 4, tokens, 4, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(rows, kv_heads, tokens, 4, dtype=dtype, requires_grad=True) for _ in range(2))
    return q, k, v


def context_of(model, rows, tokens, documents=None):
    return model.embed(torch.zeros(rows, tokens, dtype=torch.int64), documents=documents)[1]


def selection(attention, q, k, context):
    memory = attention._whole(Kept(k, k, None))
    return attention.select(q, memory, attention._scoring_of(q, memory, context), context)


def test_what_is_masked_is_to_the_bit_what_x_transformers_masks():
    model = build()
    q, k, _ = heads_of(2, 4, 17, torch.float32)
    mine = selection(model.blocks[0].attention, q, k, context_of(model, 2, 17)).masked
    scores = ((q @ k.mT) * 4**-0.5).masked_fill(~torch.ones(17, 17, dtype=torch.bool).tril(), -3e38)
    theirs = -selective_attn(torch.zeros_like(scores), scores[:, 0])[:, 0]
    assert torch.equal(mine, theirs)
    assert mine.amax() > 1


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_output_and_gradients_are_those_of_x_transformers(kv_heads):
    mine = build(kv_heads=kv_heads).blocks[0].attention.double()
    theirs = Attention(16, heads=4, kv_heads=kv_heads, dim_head=4, causal=True, selective=True).double()
    pairs = [(getattr(mine, one), getattr(theirs, f"to_{one}")) for one in "qkv"] + [(mine.o, theirs.to_out)]
    order = torch.arange(16).view(kv_heads, -1, 4).transpose(0, 1).flatten()  # theirs: query head h reads h % kv_heads
    with torch.no_grad():
        for one, other in pairs:
            other.weight.copy_(one.weight)
        theirs.to_q.weight.copy_(mine.q.weight[order])
        theirs.to_out.weight.copy_(mine.o.weight[:, order])
    x = torch.randn(3, 19, 16, dtype=torch.float64)
    y, expected = mine(x, context_of(build(), 3, 19)), theirs(x)
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-6)  # theirs has its softmax in fp32
    upstream = torch.randn_like(y)
    gradients = torch.autograd.grad(y, [one.weight for one, _ in pairs], upstream)
    others = torch.autograd.grad(expected, [other.weight for _, other in pairs], upstream)
    gradients = [gradients[0][order], *gradients[1:3], gradients[3][:, order]]
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def token_by_token(q, k, v, documents, budget, slopes):
    """What the paper describes, with lists: (H, T, d) of one row whose tokens are of the documents (T,)."""
    heads, tokens, width = q.shape
    k, v = (x.repeat_interleave(heads // len(x), 0) for x in (k, v))
    outputs, kept, masked = [], [], {}
    for i in range(tokens):
        kept = [j for j in kept if documents[j] == documents[i]] + [i]  # the first of them is the document's first
        masked[i] = 0.0
        distance = torch.tensor([i - j for j in kept])
        scores = (q[:, i, None] * k[:, kept]).sum(-1) / width**0.5 - slopes[:, None] * distance  # (H, K)
        p = (scores - torch.stack([torch.as_tensor(masked[j], dtype=q.dtype) for j in kept])).softmax(-1)
        outputs.append((p[:, :, None] * v[:, kept]).sum(1))
        for j, score in zip(kept[1:-1], scores[0, 1:-1], strict=True):
            masked[j] = masked[j] + score.relu()
        if budget is not None and len(kept) > budget:
            kept.remove(max(kept[1:-1], key=lambda j: (masked[j].item(), -j)))
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("position", ["none", "alibi"])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("budget", [None, 2, 3, 5, 30])
def test_a_whole_sequence_is_as_one_token_at_a_time(budget, kv_heads, packed, position):
    model = build(budget=budget, kv_heads=kv_heads, position=position)
    q, k, v = heads_of(2, kv_heads, 18)
    documents = torch.tensor([[0] * 7 + [1] * 10 + [2], [-1] * 3 + [4] * 14 + [5]]) if packed else None
    context = context_of(model, 2, 18, documents)
    slopes = context.positional[0].slopes if position == "alibi" else torch.zeros(4)
    y = model.blocks[0].attention.mix(q, Kept(k, v, None), context).y
    numbers = torch.zeros(2, 18) if documents is None else documents
    expected = torch.stack([token_by_token(q[i], k[i], v[i], numbers[i], budget, slopes.double()) for i in range(2)])
    real = (numbers >= 0)[:, None, :, None]
    y, expected = y * real, expected * real
    torch.testing.assert_close(y, expected, atol=2e-6, rtol=1e-5)  # theirs has its softmax in fp32
    upstream = torch.randn_like(y)
    both = (torch.autograd.grad(out, (q, k, v), upstream) for out in (y, expected))
    for mine, theirs in zip(*both, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("position", ["rope", "alibi", "shaw"])
@pytest.mark.parametrize("more", [{}, {"carry": 0.5}, {"budget": 5}, {"budget": 3, "carry": 0.5}], ids=str)
@pytest.mark.parametrize("chunks", [[1] * 24, [6, 1, 1, 9, 7], [23, 1]], ids=len)
def test_decoding_in_any_pieces_equals_the_whole_forward(chunks, more, position):
    model, tokens = build(depth=3, position=position, kv_heads=2, **more).double(), random_tokens(3, 24)
    with torch.no_grad():
        cache = model.new_cache(3, 24)
        pieces = torch.cat([model(piece, cache=cache).logits for piece in tokens.split(chunks, dim=1)], dim=1)
        torch.testing.assert_close(pieces, model(tokens).logits, atol=1e-6, rtol=1e-6)


def test_a_budget_changes_what_is_predicted_unless_it_is_large():
    whole, tokens = build(), random_tokens(2, 20)
    outputs = {}
    for budget in (4, 19, 20):
        model = build(budget=budget)
        model.load_state_dict(whole.state_dict())
        outputs[budget] = model(tokens).logits
    assert torch.equal(outputs[20], whole(tokens).logits)
    assert torch.equal(outputs[19], outputs[20])  # the 20th query still sees all: 19 kept, and itself
    assert (outputs[4] - outputs[20]).abs().max() > 1e-2
    assert torch.equal(outputs[4][:, :5], outputs[20][:, :5])


def test_the_cache_holds_no_more_than_the_budget():
    model = build(budget=4)
    cache = model.new_cache(2, 30)
    with torch.no_grad():
        for piece in random_tokens(2, 30).split([9, 1, 1, 7, 1, 11], dim=1):
            model(piece, cache=cache)
    for layer in cache.layers:
        assert layer.keys.shape[2] == 4
        assert (layer.columns[:, 0] == 0).all()
        assert (layer.columns[:, 3] == 29).all()
        assert (layer.columns.diff(dim=1) > 0).all()
    assert model.cache_bytes(30) == model.cache_bytes(4) < build().cache_bytes(30)
    assert sum(layer.bytes() for layer in cache.layers) == 2 * model.cache_bytes(30)


def test_a_step_under_a_budget_computes_what_it_keeps():
    model = build(budget=4)
    cache = model.new_cache(1, 12)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(random_tokens(1, 11), cache=cache)
        with FlopCounterMode(display=False) as step:
            model(random_tokens(1, 1), cache=cache)
    assert step.get_total_flops() == model.flops_per_token(12) == model.flops_per_token(5) > model.flops_per_token(4)


def test_of_equal_sums_the_oldest_token_goes():
    deserves = torch.zeros(1, 5, 5).masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(-1), -torch.inf)
    deserves[:, :, 0] = -torch.inf
    deserves[0, 3, 2] = 0.5
    over = torch.tensor([[False, False, True, True, True]])
    assert last_queries(deserves, over).tolist() == [[5, 2, 3, 4, 5]]


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
def test_the_memory_loss_counts_what_every_document_needs_at_its_worst(packed):
    model, tokens = build(memory_loss=0.1).train(), random_tokens(2, 12)
    documents = torch.tensor([[0] * 5 + [1] * 7, [-1] * 3 + [2] * 9]) if packed else torch.zeros(2, 12).long()
    x, context = model.embed(tokens, documents=documents if packed else None)
    expected = 0.0
    for block in model.blocks:
        h = block.attention_norm(x)
        q, k = (m(h).view(2, 12, 4, 4).transpose(1, 2) for m in (block.attention.q, block.attention.k))
        masked, needed = selection(block.attention, q, k, context).masked, 0.0
        for row in range(2):
            for document in documents[row].unique():
                mine = (documents[row] == document).nonzero().flatten().tolist()
                if document >= 0:
                    each = [
                        (n + 1) - sum(masked[row, i, j].clamp(max=1) for j in mine[: n + 1]) for n, i in enumerate(mine)
                    ]
                    needed = needed + max(each)
        expected = expected + 0.1 / 2 * needed / (documents >= 0).sum()
        x = block(x, context).y
    out = model(tokens, documents=documents if packed else None)
    torch.testing.assert_close(out.losses["memory"], expected)
    assert 0.01 < float(expected.detach()) < 0.1
    out.losses["memory"].backward()
    gradient = torch.stack([block.attention.q.weight.grad for block in model.blocks])
    assert gradient[:, :4].any()  # of head 0
    assert not gradient[1, 4:].any()
    assert model.eval()(tokens).losses == {}


def test_a_model_can_be_copied_between_two_steps_with_a_memory_loss():
    model = build(memory_loss=0.1).train()
    loss = model(random_tokens(2, 9)).losses["memory"]
    assert copy.deepcopy(model)(random_tokens(2, 9)).losses["memory"] == loss


def test_what_the_layer_below_masks_is_carried():
    model, tokens = build(depth=3, carry=0.5), random_tokens(2, 9)
    x, context = model.embed(tokens)
    for number, block in enumerate(model.blocks):
        if number:
            block.attention.carry = 0.0
            h = block.attention_norm(x)
            q, k = (m(h).view(2, 9, 4, 4).transpose(1, 2) for m in (block.attention.q, block.attention.k))
            own = selection(block.attention, q, k, context).masked.tril()
            block.attention.carry = 0.5
        x, _, left = block(x, context)
        context = context._replace(state={**context.state, **left})
        if number:
            torch.testing.assert_close(context.state[number, NOTE], own + 0.5 * context.state[number - 1, NOTE])
    assert not build().run(*build().embed(tokens)).inputs.state


def test_sums_stay_fp32_in_bf16():
    model = build(budget=4).bfloat16()
    q, k, _ = heads_of(1, 4, 9, torch.bfloat16)
    assert selection(model.blocks[0].attention, q, k, context_of(model, 1, 9)).masked.dtype == torch.float32
    assert model.new_cache(1, 9).layers[0].selected.dtype == torch.float32
    assert model(random_tokens(1, 9)).logits.isfinite().all()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"budget": 1}, "budget must be at least 2"),
        ({"memory_loss": -0.1}, "memory_loss must be at least 0"),
        ({"carry": float("nan")}, "carry: expected a finite number"),
        ({"bias": 3}, "expected bool"),
    ],
)
def test_impossible_numbers_are_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        build(**wrong)


@pytest.mark.parametrize(
    ("model", "attention", "words"),
    [
        ({"direction": "bidirectional"}, {}, "a token is masked by those behind it"),
        ({"residual": "reversible"}, {"carry": 0.5}, "carry brings gradients from layer to layer"),
    ],
)
def test_impossible_models_are_refused(model, attention, words):
    config = {"vocab_size": 9, "width": 8, "depth": 2, "attention": {"kind": "selective", "heads": 2, **attention}}
    with pytest.raises(UserError, match=words):
        ModelConfig.from_dict(config | {"feedforward": {"kind": "mlp", "width": 8}} | model)

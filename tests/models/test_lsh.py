"""LSH attention: against the plain form, `transformers` and reformer-pytorch; its cost, its hashes, its cache."""

import pytest
import torch
from reformer_pytorch import LSHAttention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from models.attention.kernels.bucketed import Weighing, bucketed_attention
from models.attention.lsh import attend_last, chunks, group_of, last_of_bucket, reference, unit, windows
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer

SPEC = {"kind": "lsh", "heads": 4, "buckets": 4, "chunk": 4}


def build(dtype=torch.float32, attention=None, **changes):
    torch.manual_seed(0)
    values = {"vocab_size": 40, "width": 16, "depth": 2, "context": 64, "attention": SPEC | (attention or {})}
    values |= {"feedforward": {"kind": "swiglu", "width": 24}, **changes}
    return Transformer(ModelConfig.from_dict(values)).to(dtype)


def drawn(tokens, rounds=3, buckets=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(tokens)
    q, v = (torch.randn(2, 3, tokens, 8, generator=generator, dtype=dtype) for _ in range(2))
    return q, v, torch.randint(buckets, (2, 3, rounds, tokens), generator=generator)


def documents_of(tokens):
    return torch.stack([torch.arange(tokens) // 6, torch.arange(tokens) // 5 - 1])  # the second row begins with padding


def same_group(buckets, documents):
    same = buckets[..., :, None] == buckets[..., None, :]  # (B, H, R, T, T)
    if documents is None:
        return same
    return same & (documents[:, None, :] == documents[:, :, None])[:, None, None]


def of_bucket(buckets, documents, chunk):
    """Whom a decoder's query sees, one pair at a time."""
    same, seen = same_group(buckets, documents), torch.zeros(*buckets.shape, buckets.shape[-1], dtype=torch.bool)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in buckets.shape)).tolist():
        members = same[tuple(index)].nonzero().flatten().tolist()
        seen[tuple(index)][[j for j in members if j <= index[-1]][-1 - chunk :]] = True
    return seen


def of_chunk(buckets, documents, chunk, across):
    """Whom an encoder's query sees: sorted and cut in Python, document by document."""
    seen = torch.zeros(*buckets.shape, buckets.shape[-1], dtype=torch.bool)
    for b, h, r in torch.cartesian_prod(*(torch.arange(size) for size in buckets.shape[:-1])).tolist():
        row = buckets[b, h, r].tolist()
        numbers = [0] * len(row) if documents is None else documents[b].tolist()
        for number in set(numbers):
            order = sorted((i for i in range(len(row)) if numbers[i] == number), key=lambda i, row=row: (row[i], i))
            for at, i in enumerate(order):
                near = order[max(0, (at // chunk - 1) * chunk) : (at // chunk + 1) * chunk]
                seen[b, h, r, i, [j for j in near if across or row[j] == row[i]]] = True
    return seen


@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("tokens", [3, 4, 13, 24])
@pytest.mark.parametrize("form", ["windows", "chunks", "chunks across"])
def test_sorted_blocks_equal_a_dense_mask(form, tokens, packed, duplicates):
    q, v, buckets = drawn(tokens)
    documents = documents_of(tokens) if packed else None
    if form == "windows":
        layout, seen = windows(buckets, documents, 4, 4), of_bucket(buckets, documents, 4)
    else:
        across = form == "chunks across"
        layout, seen = chunks(buckets, documents, 4, across), of_chunk(buckets, documents, 4, across)
    scoring = Weighing(0.4, duplicates)
    q, v = q.requires_grad_(), v.requires_grad_()
    mine, theirs = (f(q, unit(q), v, how, scoring) for f, how in ((bucketed_attention, layout), (reference, seen)))
    torch.testing.assert_close(mine, theirs)
    upstream = torch.randn_like(mine)
    for a, b in zip(*(torch.autograd.grad(y, (q, v), upstream) for y in (mine, theirs)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("start", [1, 2, 3, 4])
def test_chunks_of_a_long_document_are_cut_from_its_beginning_wherever_that_is(start, across):
    """So that a block holds parts of two chunks, and its first token may look back two of them."""
    q, v, buckets = drawn(30)
    documents = (torch.arange(30) >= torch.tensor([[start], [start + 4]])).long()
    layout, seen = chunks(buckets, documents, 4, across), of_chunk(buckets, documents, 4, across)
    scoring = Weighing(0.4, False)
    torch.testing.assert_close(
        bucketed_attention(q, unit(q), v, layout, scoring), reference(q, unit(q), v, seen, scoring)
    )


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
def test_a_few_new_tokens_see_what_they_would_in_the_whole(packed):
    _, _, buckets = drawn(13)
    documents = documents_of(13) if packed else None
    assert torch.equal(last_of_bucket(buckets, documents, 3, 5), of_bucket(buckets, documents, 3)[..., -5:, :])


@pytest.mark.parametrize("duplicates", [False, True])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("tokens", [2, 13, 24])
def test_the_last_token_alone_reads_what_it_would_in_the_whole(tokens, packed, duplicates):
    q, v, buckets = drawn(tokens)
    documents = documents_of(tokens) if packed else None
    scoring = Weighing(0.4, duplicates)
    mine = attend_last(q[:, :, -1:], unit(q), v, group_of(buckets, documents), 3, scoring)
    seen = of_bucket(buckets, documents, 3)[..., -1:, :]
    torch.testing.assert_close(mine, reference(q[:, :, -1:], unit(q), v, seen, scoring))


def test_it_is_that_of_transformers_for_given_buckets():
    """All but the tokens of each round's first chunk: there `transformers` looks back to the last chunk of another."""
    rounds, chunk, tokens = 2, 4, 48
    config = ReformerConfig(hidden_size=24, num_attention_heads=3, attention_head_size=8, num_hashes=rounds,
                            num_buckets=8, lsh_attn_chunk_length=chunk, lsh_num_chunks_before=1,
                            lsh_num_chunks_after=0, is_decoder=False, lsh_attention_probs_dropout_prob=0.0)  # fmt: skip
    torch.manual_seed(0)
    theirs = LSHSelfAttention(config, layer_idx=0).eval()
    x = torch.randn(2, tokens, 24)
    buckets = torch.randint(8, (2, 3, rounds, tokens))
    offset = buckets + 8 * torch.arange(rounds)[:, None]
    expected = theirs(x, buckets=offset).hidden_states.unflatten(-1, (3, 8)).transpose(1, 2)  # (B, H, T, d)
    q, v = (linear(x).unflatten(-1, (3, 8)).transpose(1, 2) for linear in (theirs.query_key, theirs.value))
    layout = chunks(buckets, None, chunk, across=True)
    mine = bucketed_attention(q, unit(q), v, layout, Weighing(1.0, duplicates=True))
    inner = (layout.numbers > 0).all(2)
    assert inner.float().mean() > 0.7
    torch.testing.assert_close(mine[inner], expected[inner], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_where_all_tokens_are_near_it_is_that_of_reformer_pytorch(causal):
    torch.manual_seed(0)
    qk, v = torch.randn(2, 32, 8), torch.randn(2, 32, 8)  # two chunks, one round: attention to everything
    theirs = LSHAttention(bucket_size=16, n_hashes=1, causal=causal, attend_across_buckets=True).eval()(qk, v)[0]
    q, values, one = qk[:, None], v[:, None], torch.zeros(2, 1, 1, 32, dtype=torch.int64)
    layout = windows(one, None, 32, 2) if causal else chunks(one, None, 32, across=False)
    mine = bucketed_attention(q, unit(q), values, layout, Weighing(8**-0.5))
    torch.testing.assert_close(mine[:, 0], theirs, atol=1e-5, rtol=1e-5)


def test_nearby_vectors_fall_into_one_bucket():
    attention = build(attention={"buckets": 16, "rounds": 8}, width=64).blocks[0].attention
    x, far = torch.randn(2, 1, 4, 1, 16)
    q = torch.cat([x, 3 * x + 0.01 * far, -x], dim=2)  # length does not matter
    buckets = attention._buckets(q)  # (B, H, R, T)
    assert (buckets[..., 0] == buckets[..., 1]).float().mean() > 0.9
    assert not (buckets[..., 0] == buckets[..., 2]).any()
    assert len(buckets[..., 0].unique()) > 4


def test_autocast_moves_no_token_into_another_bucket():
    model = build(attention={"buckets": 64, "chunk": 4})
    attention = model.blocks[0].attention
    q = torch.randn(1, attention.spec.heads, 500, attention.spec.head_width)
    expected = attention._buckets(q)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention._buckets(q), expected)


def test_rotations_are_those_of_the_seed_and_the_layer_and_leave_random_numbers_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    build().blocks[0].attention.reset_parameters()
    first, again, other = (build(attention={"seed": seed}).blocks for seed in (0, 0, 1))
    assert torch.equal(first[0].attention.rotations, again[0].attention.rotations)
    assert not torch.equal(first[0].attention.rotations, first[1].attention.rotations)
    assert not torch.equal(first[0].attention.rotations, other[0].attention.rotations)
    torch.set_rng_state(state)
    first[0].attention.reset_parameters()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_backward_of_a_reversible_model_hashes_nothing_anew(monkeypatch):
    model, tokens = build(torch.float64, residual="reversible"), torch.randint(40, (2, 20))
    loss = model(tokens, targets=tokens).loss
    attention = model.blocks[0].attention
    with torch.no_grad():
        for block in model.blocks:
            block.attention.rotations.neg_()  # every token would fall into another bucket
    mine = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for block in model.blocks:
            block.attention.rotations.neg_()
    x, context = model.embed(tokens)
    for block in model.blocks:
        x = block(x, context).y
    theirs = torch.autograd.grad(model.loss(model.finish(x), tokens)[0], list(model.parameters()))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)
    assert attention.rotations.isfinite().all()


@pytest.mark.parametrize("pieces", [[20], [7, 13], [13, 1, 1, 5], [1] * 20], ids=str)
def test_the_cache_keeps_the_buckets(pieces):
    model, tokens = build(torch.float64).eval(), torch.randint(40, (2, 20))
    cache = model.new_cache(2, 30)
    with torch.no_grad():
        parts = [model(piece, cache=cache).logits for piece in tokens.split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens).logits)
    held = sum(layer.bytes() for layer in cache.layers)
    assert held == 2 * model.cache_bytes(30, torch.float64)


def test_flops_are_those_of_the_products_that_run():
    model, tokens = build(), torch.randint(40, (1, 64))
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(tokens)
    assert counted.get_total_flops() == 64 * model.flops_per_token(64)


def largest_allocation(model, tokens):
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        model(torch.randint(40, (1, tokens)))
    return max(event.self_cpu_memory_usage for event in found.events())


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_memory_grows_with_the_length_and_not_with_its_square(direction):
    model = build(attention={"chunk": 8, "heads": 1, "buckets": 16, "rounds": 1}, direction=direction)
    assert largest_allocation(model, 4096) < 2.5 * largest_allocation(model, 2048)
    assert largest_allocation(model, 4096) < 4096 * 4096 / 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"buckets": 3}, "buckets must be even and at least 2, got 3"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"rounds": 1, "duplicates": True}, "duplicates counts .*: give rounds 2 or more"),
        ({"scale": -1.0}, "scale must be positive"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"across_buckets": True}, "cannot be causal: which tokens of other buckets lie near .* depends on later ones"),
        ({"position": "alibi"}, "works with positions that act on rotation"),
    ],
)
def test_what_it_cannot_be_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        build(attention=change)


@pytest.mark.parametrize("chunk", [3, 12, 17])
def test_earlier_outputs_are_the_same_to_the_bit_however_later_tokens_fall(chunk):
    q, v, buckets = drawn(301, buckets=16, dtype=torch.float32)
    before = bucketed_attention(q, unit(q), v, windows(buckets, None, chunk, 16), Weighing(0.4))
    for t in (100, 200, 299):
        others = buckets.clone()
        others[..., t:] = 15 - others[..., t:]
        after = bucketed_attention(q, unit(q), v, windows(others, None, chunk, 16), Weighing(0.4))
        assert torch.equal(after[:, :, :t], before[:, :, :t])
        assert not torch.equal(after[:, :, t:], before[:, :, t:])

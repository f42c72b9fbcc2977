"""Recursive chunking against a recursion over one document in Python, its cost, its cache, and the poolings."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from models.attention.multilevel import attend_tree, place_tokens, reference_tree, sees
from models.attention.pooling import POOLINGS
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer

QUERIES = {"kind": "query", "summaries": 2}
CHOICES = {
    "mean": {"chunk": 3},
    "fast doubling": {"chunk": 2},
    "two queries": {"chunk": 4, "pooling": QUERIES},
    "han, one level": {"chunk": 3, "pooling": "han", "levels": 1},
    "two levels": {"chunk": 2, "levels": 2, "level_embedding": True},
    "options": {"chunk": 4, "pooling": QUERIES, "qk_norm": "rms", "scale": 0.6, "softcap": 2.0, "sink": "learned"},
}
DIRECTIONS = ("causal", "bidirectional")
every_choice = pytest.mark.parametrize("choice", CHOICES)
every_direction = pytest.mark.parametrize("direction", DIRECTIONS)


def build(direction="causal", position="rope", dtype=torch.float64, **attention):
    torch.manual_seed(0)
    spec = {"kind": "recursive", "heads": 4, "kv_heads": 2, **attention}
    config = {"vocab_size": 40, "width": 16, "depth": 1, "context": 64, "position": position, "direction": direction}
    config |= {"attention": spec, "feedforward": {"kind": "swiglu", "width": 24}}
    model = Transformer(ModelConfig.from_dict(config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(("norm.weight" in name) + 0.4 * torch.randn(parameter.shape))
    return model.to(dtype)


def run(model, x, documents=None):
    """The attention of the first block alone, of layer inputs x (B, T, D)."""
    _, context = model.embed(torch.zeros(x.shape[:2], dtype=torch.int64), documents=documents)
    return model.blocks[0].attention(x, context)


def pool_plainly(pooling, vectors):
    """m summaries of a list of vectors, one vector and one weight at a time."""
    if not list(pooling.parameters()):
        return [sum(vectors) / len(vectors)]
    if hasattr(pooling, "queries"):
        scores = [[(query @ h).item() / math.sqrt(len(h)) for h in vectors] for query in pooling.queries]
    else:
        u = [torch.tanh(pooling.map.weight @ h + pooling.map.bias) for h in vectors]  # u_t = tanh(W h_t + b)
        scores = [[(u_t @ pooling.context.weight[0]).item() for u_t in u]]  # u_t . u_w
    weights = [[math.exp(score) / sum(map(math.exp, row)) for score in row] for row in scores]
    return [sum(weight * h for weight, h in zip(row, vectors, strict=True)) for row in weights]


def rotate(model, heads, place):
    """Heads (H, d) at a place of their document."""
    return model.positions[0](torch.tensor([[place]])).rotate(heads[None, :, None])[0, :, 0]


def softmax_over(model, query, place, seen):
    """The output of the layer for the token `query` at a place, over keys and values of (vector, place) pairs."""
    attention = model.blocks[0].attention
    q, k = (
        [projection(x).view(-1, attention.head_width) for x in xs]
        for projection, xs in ((attention.q, [query]), (attention.k, [vector for vector, _ in seen]))
    )
    if attention.normalises:
        q, k = [attention.q_norm(x) for x in q], [attention.k_norm(x) for x in k]
    q = rotate(model, q[0], place)  # (H, d)
    k = torch.stack([rotate(model, x, where) for x, (_, where) in zip(k, seen, strict=True)])  # (K, G, d)
    v = torch.stack([attention.v(vector).view(-1, attention.head_width) for vector, _ in seen])  # (K, G, d)
    out = []
    for head in range(attention.heads):
        group = head * attention.kv_heads // attention.heads
        scores = k[:, group] @ q[head] * (attention.scale or attention.head_width**-0.5)  # (K,)
        if attention.softcap:
            scores = attention.softcap * torch.tanh(scores / attention.softcap)
        if attention.sink is not None:
            scores = torch.cat([scores, attention.sink(query[None, None, None].expand(1, 4, 1, -1))[head : head + 1]])
        out.append(scores.softmax(0)[: len(seen)] @ v[:, group])
    return attention.o(torch.cat(out))


def recursion(model, x, causal):
    """The layer for one document x (T, D), node by node and token by token."""
    attention = model.blocks[0].attention
    tree, tokens = attention.tree, len(x)
    fanouts = [tree.chunk]  # of a node of level 1, 2, ...
    while math.prod(fanouts) < tokens and len(fanouts) != tree.depth:
        fanouts.append(tree.chunk // tree.summaries)
    widths = [math.prod(fanouts[:level]) for level in range(len(fanouts) + 1)]

    def summaries(level, number):
        """Vectors of a node that stands for tokens `number * width` and on."""
        if level == 0:
            return [x[number]]
        first = number * fanouts[level - 1]
        below = [first + i for i in range(fanouts[level - 1]) if (first + i) * widths[level - 1] < tokens]
        return pool_plainly(attention.pooling, [s for child in below for s in summaries(level - 1, child)])

    def look(token, level, numbers):
        """(vector, place) of what `token` sees among sibling nodes and, inside the one that it is in, below them."""
        found = []
        for number in numbers:
            begin, end = number * widths[level], min((number + 1) * widths[level], tokens)
            if begin <= token < end:
                first = number * fanouts[level - 1] if level else 0
                below = range(first, first + fanouts[level - 1]) if level else ()
                found += look(token, level - 1, below) if level else [(x[token], token)]
            elif begin < tokens and (end <= token or not causal):
                extra = 0
                if level and attention.level_embedding is not None:
                    extra = attention.level_embedding.weight[level - 1]
                found += [(s + extra, end - 1) for s in summaries(level, number)]
        return found

    top = len(fanouts)
    all_nodes = range(-(-tokens // widths[top]))
    return torch.stack([softmax_over(model, x[t], t, look(t, top, all_nodes)) for t in range(tokens)])


@every_direction
@every_choice
@pytest.mark.parametrize("tokens", [1, 9, 17])
def test_the_batched_levels_equal_the_recursion(choice, direction, tokens):
    model = build(direction, **CHOICES[choice])
    x = torch.randn(1, tokens, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(
            run(model, x)[0], recursion(model, x[0], direction == "causal"), atol=1e-6, rtol=0
        )  # the rotations of both are in fp32


DOCUMENTS = torch.tensor([[0] * 1 + [1] * 17 + [2] * 12, [-1] * 5 + [0] * 25, [4] * 9 + [5] * 2 + [6] * 16 + [-1] * 3])


@every_direction
@every_choice
def test_every_document_of_every_row_has_a_tree_of_its_own(choice, direction):
    model = build(direction, **CHOICES[choice])
    x = torch.randn(3, 30, 16, dtype=torch.float64)
    with torch.no_grad():
        packed = run(model, x, DOCUMENTS)
        for row in range(3):
            for document in set(DOCUMENTS[row].tolist()) - {-1}:
                where = DOCUMENTS[row] == document
                expected = recursion(model, x[row, where], direction == "causal")
                torch.testing.assert_close(packed[row, where], expected, atol=1e-6, rtol=0)


@every_direction
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("choice", ["fast doubling", "two queries", "han, one level"])
def test_blocks_equal_all_entries_under_a_mask(choice, direction, documents, monkeypatch):
    """With blocks of a few tokens, so that there are many: values and gradients."""
    monkeypatch.setattr("models.attention.multilevel.SMALLEST", 3)
    monkeypatch.setattr("models.attention.multilevel.LARGEST", 5)
    model = build(direction, **CHOICES[choice])
    numbers = torch.stack([torch.arange(83) // 31, torch.arange(83) // 50]) if documents else None
    numbers = numbers if numbers is None else torch.where(torch.arange(83) < 4, -1, numbers)
    x = torch.randn(2, 83, 16, dtype=torch.float64, requires_grad=True)
    upstream, found = torch.randn(2, 83, 16, dtype=torch.float64), []
    for form in (attend_tree, reference_tree):
        monkeypatch.setattr("models.attention.summary_attention.attend_tree", form)
        y = run(model, x, numbers)
        found.append((y, *torch.autograd.grad(y, [x, *model.blocks[0].attention.parameters()], upstream)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


@every_direction
def test_every_other_token_is_seen_once(direction):
    """The entries that a token sees stand for as many tokens as come before it, or in an encoder, as there are."""
    model = build(direction, chunk=3)
    documents = torch.tensor([[-1] * 2 + [0] * 31 + [1] * 8])
    _, context = model.embed(torch.zeros(1, 41, dtype=torch.int64), documents=documents)
    tokens, x = place_tokens(context, 41, direction == "causal", documents.device), torch.zeros(1, 41, 16).double()
    listed = model.blocks[0].attention.lists(x, tokens, context.positional[0], None)
    own = tokens._replace(start=tokens.start[:, None], index=tokens.index[:, None])
    counted = torch.zeros(41, dtype=torch.int64)
    for level, entries, _ in listed:
        begins = entries.index * level.width  # in their document, of 31 or 8 tokens
        stands_for = (torch.where(entries.start == 2, 31, 8) - begins).clamp(max=level.width)  # (1, N)
        seen = sees(level, own, entries.start[:, None], entries.index[:, None])[0, 0]  # (T, N)
        counted += (seen * stands_for).sum(-1)
    assert [level.width for level, _, _ in listed] == [1, 3, 9, 27]
    before, whole = [*range(1, 32), *range(1, 9)], [31] * 31 + [8] * 8
    assert counted[2:].tolist() == (before if direction == "causal" else whole)


PIECES = [[1] * 30, [9, 1, 1, 6, 1, 12], [28, 1, 1], [30]]


@every_choice
@pytest.mark.parametrize("pieces", PIECES, ids=str)
def test_pieces_behind_a_cache_equal_the_whole(choice, pieces):
    """Also where rows are padded on the left, so that chunks end at other steps in each."""
    model = build(dtype=torch.float64, **CHOICES[choice])
    tokens = torch.randint(40, (3, 30))
    for documents in (None, torch.tensor([[-1] * 5 + [1] * 25, [-1] * 7 + [0] * 23, [5] * 30])):
        cache, done = model.new_cache(3, 30), []
        with torch.no_grad():
            expected = model(tokens, documents=documents).logits
            numbers = [None] * len(pieces) if documents is None else documents.split(pieces, 1)
            for piece, number in zip(tokens.split(pieces, 1), numbers, strict=True):
                done.append(model(piece, documents=number, cache=cache).logits)
        seen = torch.ones(3, 30, dtype=torch.bool) if documents is None else documents >= 0
        torch.testing.assert_close(torch.cat(done, 1)[seen], expected[seen], atol=1e-5, rtol=0)


def test_the_cache_keeps_an_open_chunk_and_few_summaries():
    """Its bytes grow with the logarithm of the length; of a last level, one node at a time."""
    model, width = build(chunk=4), 8
    per_entry = 16 + 2 * 2 * 4  # the layer's input, keys and values
    assert model.cache_bytes(3, torch.float64) == width * per_entry * 3
    assert model.cache_bytes(4**2, torch.float64) == width * per_entry * (3 + 3 + 1)
    assert model.cache_bytes(4**6 - 1, torch.float64) == width * per_entry * 3 * 6
    one_level = build(chunk=4, levels=1)
    assert one_level.cache_bytes(4000, torch.float64) == width * (per_entry * 3 + 2 * 2 * 4 * 1000)
    cache = model.new_cache(2, 50)
    with torch.no_grad():
        model(torch.randint(40, (2, 50)), cache=cache)
    assert cache.layers[0].bytes() == 2 * model.cache_bytes(50, torch.float64)
    assert [tail.count for tail in cache.layers[0].lists] == [3, 3, 3]  # tokens, of 12 chunks and of 3 groups
    assert [tail.buffers.index[0].tolist() for tail in cache.layers[0].lists] == [[47, 48, 49], [9, 10, 11], [0, 1, 2]]


def test_a_decode_step_multiplies_only_what_it_sees():
    model = build(dtype=torch.float32, chunk=4)
    cache, spec = model.new_cache(1, 64), model.config.layers[0].attention
    with torch.no_grad():
        model(torch.randint(40, (1, 61)), cache=cache)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as step:
            model(torch.randint(40, (1, 1)), cache=cache)  # no chunk ends here
    made = spec.tree.nodes(62) * 4 * 16 * spec.kv_heads * spec.head_width // 62  # its share in the maps of summaries
    seen = 4 + 3 + 3  # its chunk of four, of which it is the second; chunks 12 to 14, groups 0 to 2
    assert spec.tree.visible(62) == seen
    assert step.get_total_flops() == model.flops_per_token(62) - made


def largest_allocation(model, tokens, documents):
    numbers = torch.zeros(1, tokens, dtype=torch.int64) if documents else None
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        model(torch.zeros(1, tokens, dtype=torch.int64), documents=numbers)
    return max(event.self_cpu_memory_usage for event in found.events())


@every_direction
@pytest.mark.parametrize("documents", [False, True])
def test_memory_grows_with_the_length_and_not_with_its_square(direction, documents):
    model = build(direction, dtype=torch.float32, chunk=16)
    assert largest_allocation(model, 4096, documents) < 2.5 * largest_allocation(model, 2048, documents)


def test_operations_grow_with_the_length_and_not_with_its_square():
    model, counted = build(dtype=torch.float32, chunk=16), []
    for tokens in (2048, 4096):
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as found:
            model(torch.zeros(1, tokens, dtype=torch.int64))
        counted.append(found.get_total_flops())
    assert counted[1] < 2.2 * counted[0]  # a logarithm more than twice as many
    assert counted[1] <= 1.01 * 4096 * model.flops_per_token(4096)


@pytest.mark.parametrize("kind", ["mean", "query", "han"])
def test_a_pooling_sees_what_is_there_and_nothing_else(kind):
    torch.manual_seed(0)
    pooling = (POOLINGS.parse({"kind": kind, "summaries": 3} if kind == "query" else kind, "")).build(6).double()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    mask = torch.tensor([[[1, 1, 1, 1, 1], [0, 1, 1, 0, 1], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]]).bool()
    garbage = torch.where(mask[..., None], x, 1e6)
    found = pooling(garbage.requires_grad_(), mask)
    for row in range(2):
        for piece in (0, 1, 3):
            expected = torch.stack(pool_plainly(pooling, list(x[row, piece, mask[0, piece]])))
            torch.testing.assert_close(found[row, piece], expected)
    assert not found[:, 2].any()  # nothing gives zero
    (gradient,) = torch.autograd.grad(found.square().sum(), garbage)
    assert gradient.isfinite().all()
    assert not gradient[~mask.expand(2, -1, -1)].any()


@pytest.mark.parametrize("kind", ["query", "han"])
def test_learned_poolings_are_learned(kind):
    model = build(chunk=3, pooling=kind)
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    assert not torch.allclose(run(model, x)[0, 3:], run(build(chunk=3), x)[0, 3:], atol=1e-3)


def test_blocks_compile_with_packed_rows():
    model, x = build(chunk=3, pooling="han"), torch.randn(3, 30, 16, dtype=torch.float64)
    _, context = model.embed(torch.zeros(3, 30, dtype=torch.int64), documents=DOCUMENTS)
    expected = model.blocks[0](x, context).y
    torch.compiler.reset()
    model.blocks[0].compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(model.blocks[0](x, context).y, expected)


def test_half_precision_is_close():
    model = build(dtype=torch.float32, chunk=4, pooling="han")
    tokens = torch.randint(40, (2, 30))
    with torch.no_grad():
        exact, rough = model(tokens).logits, model.bfloat16()(tokens).logits
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        ({"chunk": 1}, "chunk must be at least 2 tokens, got 1"),
        ({"chunk": 5, "pooling": QUERIES}, "chunk must be a multiple of the summaries"),
        ({"chunk": 2, "pooling": QUERIES}, "more than these, got 2 and 2"),
        ({"chunk": 4, "levels": 0}, "levels must be at least 1"),
        ({"chunk": 4, "pooling": {"kind": "query", "summaries": 0}}, "summaries must be at least 1"),
        ({"chunk": 4, "pooling": {"kind": "han", "hidden": 0}}, "hidden must be at least 1"),
        ({"chunk": 4, "pooling": "max"}, "unknown pooling 'max'"),
        ({"chunk": 4, "input_width": 8}, "input_width must be the model's width of 16, got 8"),
        ({"chunk": 4, "position": "alibi"}, "works with positions that act on rotation"),
    ],
)
def test_what_makes_no_sense_is_refused(attention, message):
    with pytest.raises(UserError, match=message):
        build(**attention)

"""BigBird against a dense mask written down pair by pair, against `transformers`, its random blocks and its cost."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import BigBirdConfig
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel

from models.attention.bigbird import random_blocks
from models.attention.full import token_distance
from models.attention.kernels.sdpa import AttentionMask, reference_attention
from models.cache import Kept
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer

DIRECTIONS = ["causal", "bidirectional"]


def build(direction="causal", position="rope", **attention):
    torch.manual_seed(0)
    spec = {"kind": "bigbird", "heads": 4, "kv_heads": 2, "block": 2, "random": 1, **attention}
    config = {"vocab_size": 40, "width": 16, "depth": 1, "position": position, "direction": direction}
    config |= {"attention": spec, "feedforward": {"kind": "swiglu", "width": 24}}
    return Transformer(ModelConfig.from_dict(config)).eval()


def chosen(number, count, attention):
    """The random blocks of one block, as a list."""
    found, valid = random_blocks(
        torch.tensor(number), torch.tensor(count), attention.random, attention.seed, attention.bidirectional
    )
    return found[valid].tolist()


def seen_blocks(number, count, attention):
    """The definition: global, neighbouring and random blocks (section 2, figure 1)."""
    if attention.bidirectional and number in (0, count - 1):
        return set(range(count))
    return {0, count - 1, number - 1, number, number + 1, *chosen(number, count, attention)}


def dense_mask(attention, documents):
    """(B, 1, T, T) bool; a decoder sees of these blocks what lies before."""
    batch, tokens = documents.shape
    mask = torch.zeros(batch, 1, tokens, tokens, dtype=torch.bool)
    for b, row in enumerate(documents.tolist()):
        for i in range(tokens):
            first, length = row.index(row[i]), row.count(row[i])
            count, number = -(-length // attention.block), (i - first) // attention.block
            seen = seen_blocks(number, count if attention.bidirectional else tokens + 1, attention)
            last = first + length if attention.bidirectional else i + 1
            for j in range(first, last):
                mask[b, 0, i, j] = (j - first) // attention.block in seen
    return mask


def packed(tokens):
    """Documents of every length up to 8, of one block and of many, none of which begins with a block of the row."""
    lengths = [3, 1, 17, 1, 1, 23, 2, 7, 30, 5, 8, 40]
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return torch.stack([numbers[:tokens], numbers[21 : 21 + tokens]])


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("tokens", [1, 5, 7, 8, 31, 64])
@pytest.mark.parametrize(("block", "chosen"), [(1, 2), (2, 0), (2, 1), (3, 2), (5, 3), (8, 1)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_tiles_equal_a_dense_mask(direction, block, chosen, tokens, documents):
    compare(build(direction, block=block, random=chosen), tokens, documents)


@pytest.mark.parametrize("position", ["alibi", "t5"])
@pytest.mark.parametrize("sink", ["learned", "zero", None])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_options_of_the_scores_are_those_of_full_attention(direction, sink, position):
    model = build(direction, position=position, sink=sink, softcap=2.0, scale=0.7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    for documents in (False, True):
        compare(model, 25, documents)


def compare(model, tokens, documents):
    attention = model.blocks[0].attention.double()
    q = torch.randn(2, 4, tokens, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, tokens, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    numbers = packed(tokens) if documents else None
    _, context = model.embed(torch.zeros(2, tokens, dtype=torch.int64), documents=numbers)
    kept = Kept(k, v, None)
    mask = dense_mask(attention, packed(tokens) if documents else torch.zeros(2, tokens, dtype=torch.int64))
    scoring = attention.scoring(q, k, token_distance(q, kept, context), context)
    theirs = reference_attention(q, k, v, AttentionMask(mask, causal=False), scoring)
    mine = attention.mix(q, kept, context)
    torch.testing.assert_close(mine, theirs)
    upstream = torch.randn_like(theirs)
    pairs = zip(*(torch.autograd.grad(y, (q, k, v), upstream) for y in (mine, theirs)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("chunks", [[64], [1] * 64, [21, 1, 1, 9, 32], [3, 40, 21]], ids=str)
@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
def test_cached_pieces_equal_the_whole(chunks, documents):
    model = build(block=4, random=2).double()
    tokens, numbers = torch.randint(40, (2, 64)), packed(64)
    cache, pieces, done = model.new_cache(2, 64), [], 0
    with torch.no_grad():
        for count in chunks:
            piece = slice(done, done + count)
            more = {"documents": numbers[:, piece], "positions": torch.arange(64)[None, piece]} if documents else {}
            pieces.append(model(tokens[:, piece], cache=cache, **more).logits)
            done += count
        more = {"documents": numbers, "positions": torch.arange(64)[None]} if documents else {}
        torch.testing.assert_close(torch.cat(pieces, 1), model(tokens, **more).logits)


def test_attention_is_that_of_transformers():
    """In evaluation its random blocks are all block 0, which then counts 1 + r times in the softmax."""
    block, repeats, tokens = 4, 2, 64
    config = BigBirdConfig(
        hidden_size=16, num_attention_heads=4, block_size=block, num_random_blocks=repeats, max_position_embeddings=64
    )
    their = BigBirdBlockSparseAttention(config, seed=0).eval()
    model = build("bidirectional", position="none", block=block, random=repeats, kv_heads=4, bias=True)
    attention = model.blocks[0].attention
    with torch.no_grad():
        for mine, name in ((attention.q, "query"), (attention.k, "key"), (attention.v, "value")):
            mine.weight.copy_(getattr(their, name).weight.normal_())
            mine.bias.copy_(getattr(their, name).bias.normal_())
        attention.o.weight.copy_(torch.eye(16))
    correct = attention.far_blocks

    def block_0_again(number, count):
        far, valid = correct(number, count)
        far, valid = far.clone(), valid.clone()
        far[..., 2:], valid[..., 2:] = 0, True
        return far, valid

    x = torch.randn(2, tokens, 16)
    blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(2, tokens), block)
    expected = their(x, band, rows, columns, blocked, blocked)[0]  # (2, T, 16)
    _, context = model.embed(torch.zeros(2, tokens, dtype=torch.int64))
    assert (attention(x, context) - expected).abs().max() > 1e-3  # with random blocks that are random
    attention.far_blocks = block_0_again
    torch.testing.assert_close(attention(x, context), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_random_blocks_are_other_blocks_and_none_is_there_twice(bidirectional):
    count, r = 40, 5
    numbers = torch.arange(count)
    found, valid = random_blocks(numbers, torch.full_like(numbers, count), r, 3, bidirectional)
    for number in range(1, count - 1):
        seen = found[number][valid[number]].tolist()
        allowed = set(range(1, number - 1)) | (set(range(number + 2, count - 1)) if bidirectional else set())
        assert set(seen) <= allowed
        assert len(seen) == len(set(seen)) == min(r, len(allowed))


def test_random_blocks_follow_the_seed_and_nothing_else():
    numbers, counts = torch.arange(50), torch.full((50,), 50)
    first = random_blocks(numbers, counts, 3, 0, True)[0]
    assert torch.equal(first, random_blocks(numbers, counts, 3, 0, True)[0])
    assert torch.equal(first[20:30], random_blocks(numbers[20:30], counts[20:30], 3, 0, True)[0])
    assert (first != random_blocks(numbers, counts, 3, 1, True)[0]).float().mean() > 0.8


def test_random_blocks_are_spread_evenly():
    number = torch.tensor(25)
    found = torch.stack([random_blocks(number, number + 1, 3, seed, False)[0] for seed in range(1500)])  # (1500, 3)
    counts = found.flatten().bincount(minlength=24)[1:24].float()  # blocks 1 to 23
    expected = 3 * 1500 / 23
    assert ((counts - expected).square() / expected).sum() < 49  # chi square of 22 degrees, 0.999 quantile 48.3


def test_a_decode_step_costs_the_same_at_any_length():
    """It multiplies with the keys of its blocks only: 2 b near by, block 0 and r blocks far away."""
    model = build(block=4, random=2)
    cache, costs = model.new_cache(1, 400), []
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for length in (101, 201):
            model(torch.randint(40, (1, length)), cache=cache)  # no block begins behind these
            with FlopCounterMode(display=False) as step:
                model(torch.randint(40, (1, 1)), cache=cache)
            costs.append(step.get_total_flops())
    keys = 2 * 4 + (1 + 2) * 4
    assert costs == [model.flops_per_token(keys)] * 2


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_memory_grows_with_the_length_and_not_with_its_square(direction):
    model = build(direction, block=8, random=1)

    def largest(tokens):
        zeros = torch.zeros(1, tokens, dtype=torch.int64)
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            model(zeros, documents=zeros)
        return max(event.self_cpu_memory_usage for event in found.events())

    assert largest(8192) < 2.5 * largest(4096)
    assert largest(8192) < 8192 * 8192 / 2  # bytes, half of a mask of all pairs


def test_dropout_drops_also_in_the_rows_that_see_everything():
    attention = build("bidirectional", dropout=0.5).blocks[0].attention.train()
    _, context = build("bidirectional").embed(torch.zeros(1, 30, dtype=torch.int64))
    x = torch.randn(1, 30, 16)
    runs = torch.stack([attention(x, context).detach() for _ in range(300)])
    expected = attention.eval()(x, context).detach()
    assert (runs.std(0)[0, 0] > 0).all()
    assert (runs.mean(0) - expected).abs().max() < 6 * runs.std(0).max() / 300**0.5


@pytest.mark.parametrize(("field", "value"), [("block", 0), ("random", -1), ("seed", -1)])
def test_numbers_out_of_range_are_refused(field, value):
    with pytest.raises(UserError, match=f"{field} must be at least"):
        build(**{field: value})

"""Encodings that the queries read against pairs written out one by one, Wav2Vec2-BERT and XLNet."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import Wav2Vec2BertConfig, XLNetConfig, XLNetModel
from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import Wav2Vec2BertSelfAttention

from models.attention.full import Full
from models.attention.protocol import ForwardInputs
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer

TOKENS, WIDTH, HEADS, GROUPS, CHANNELS = 9, 16, 4, 2, 4
SHAW = {"kind": "shaw", "clip": 3, "terms": "keys_and_values"}


def build(
    position, direction="causal", groups=GROUPS, heads=HEADS, kind="full", width=WIDTH, dtype=torch.float64, **more
):
    torch.manual_seed(0)
    attention = {"kind": kind, "heads": heads, "kv_heads": groups, **more}
    config = {"vocab_size": 40, "width": width, "depth": 2, "position": position, "direction": direction}
    config |= {"attention": attention, "feedforward": {"kind": "mlp", "width": 8}}
    model = Transformer(ModelConfig.from_dict(config)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return model


def projected(attention, x):
    """q (B, H, T, d), and k and v of every query head."""
    q, k, v = (
        part(x).unflatten(-1, (-1, CHANNELS)).transpose(1, 2) for part in (attention.q, attention.k, attention.v)
    )
    return q, *(part.repeat_interleave(HEADS // GROUPS, 1) for part in (k, v))


def shaw_pair(position, q, k, head, i, j, bidirectional):
    """The score of one pair, and what is added to its value."""
    row = min(max(i - j, -3), 3) + 3 if bidirectional else min(max(i - j, 0), 3)
    return q @ (k + position.keys.weight[row]), position.values.weight[row]


def transformer_xl_pair(position, q, k, head, i, j, bidirectional):
    angles = [(i - j) / 10000 ** (2 * c / WIDTH) for c in range(WIDTH // 2)]
    r = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)
    mapped = position.weight[head * CHANNELS : (head + 1) * CHANNELS] @ r
    return (q + position.u[head]) @ k + (q + position.v[head]) @ mapped, 0


PAIRS = {"shaw": (SHAW, shaw_pair), "transformer_xl": ({"kind": "transformer_xl"}, transformer_xl_pair)}


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("name", PAIRS)
def test_every_pair_of_tokens_is_scored_as_in_the_paper(name, direction):
    spec, pair = PAIRS[name]
    model, bidirectional = build(spec, direction), direction == "bidirectional"
    attention, position = model.blocks[1].attention, model.positions[1]
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.float64)
    q, k, v = projected(attention, x)
    expected = torch.zeros_like(q)
    for head in range(HEADS):
        for i in range(TOKENS):
            seen = range(TOKENS if bidirectional else i + 1)
            terms = [pair(position, q[0, head, i], k[0, head, j], head, i, j, bidirectional) for j in seen]
            p = (torch.stack([score for score, _ in terms]) / CHANNELS**0.5).softmax(0)
            expected[0, head, i] = sum(p[j] * (v[0, head, j] + terms[j][1]) for j in seen)
    _, context = model.embed(torch.zeros(1, TOKENS, dtype=torch.int64))
    mine = attention(x, context)
    torch.testing.assert_close(mine, attention.o(expected.transpose(1, 2).flatten(2)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("position", [SHAW, {"kind": "transformer_xl"}], ids=["shaw", "transformer_xl"])
def test_each_layer_has_its_own(position):
    model = build(position)
    assert [block.attention.positional for block in model.blocks] == [0, 1]


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("position", [SHAW, {"kind": "shaw", "clip": 5}, {"kind": "transformer_xl"}], ids=str)
def test_a_band_of_blocks_is_full_attention_under_its_mask(position, direction):
    tokens = torch.randint(40, (2, 150), generator=torch.Generator().manual_seed(1))
    narrow = build(position, direction, kind="window", window=8)
    attention, full = narrow.blocks[0].attention, build(position, direction).blocks[0].attention
    full.load_state_dict(attention.state_dict())
    x, context = narrow.embed(tokens)
    distance = torch.arange(150)[:, None] - torch.arange(150)
    seen = (distance < 8) & (distance >= 0) if direction == "causal" else distance.abs() <= 4
    masked = ForwardInputs(context.positional, seen[None, None], causal=False)
    torch.testing.assert_close(attention(x, context), full(x, masked))


def test_shaw_keys_are_those_of_wav2vec2_bert():
    config = Wav2Vec2BertConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        position_embeddings_type="relative_key",
        left_max_position_embeddings=3,
        right_max_position_embeddings=3,
        attention_dropout=0.0,
    )
    theirs = Wav2Vec2BertSelfAttention(config).double().eval()
    spec = {"kind": "shaw", "clip": 3}
    model = build(spec, "bidirectional", groups=HEADS, bias=True, out_bias=True)
    attention = model.blocks[0].attention
    pairs = ("q", "linear_q"), ("k", "linear_k"), ("v", "linear_v"), ("o", "linear_out")
    for mine, their in pairs:
        getattr(attention, mine).load_state_dict(getattr(theirs, their).state_dict())
    with torch.no_grad():  # theirs count from the query to the key
        model.positions[0].keys.weight.copy_(theirs.distance_embedding.weight.flip(0))
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    _, context = model.embed(torch.zeros(2, TOKENS, dtype=torch.int64))
    torch.testing.assert_close(attention(x, context), theirs(x)[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("attn_type", "direction"), [("uni", "causal"), ("bi", "bidirectional")])
@pytest.mark.parametrize("tokens", [3, 20])
def test_transformer_xl_is_the_attention_of_xlnet(tokens, attn_type, direction):
    """Twenty tokens map the distances, three the queries."""
    torch.manual_seed(0)
    config = XLNetConfig(
        vocab_size=40, d_model=32, n_layer=1, n_head=2, d_inner=8, attn_type=attn_type, dropout=0.0, bi_data=False
    )
    xlnet = XLNetModel(config).eval()
    theirs = xlnet.layer[0].rel_attn
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    model = build("transformer_xl", direction, groups=2, heads=2, width=32, dtype=torch.float32)
    attention, position = model.blocks[0].attention, model.positions[0]
    with torch.no_grad():
        for name in ("q", "k", "v"):
            getattr(attention, name).weight.copy_(getattr(theirs, name).flatten(1).T)
        attention.o.weight.copy_(theirs.o.flatten(1))
        position.weight.copy_(theirs.r.flatten(1).T)
        position.u.copy_(theirs.r_w_bias)
        position.v.copy_(theirs.r_r_bias)
        found = {}
        theirs.register_forward_hook(
            lambda _, inputs, kept, output: found.update(x=inputs[0] if inputs else kept["h"], y=output[0]),
            with_kwargs=True,
        )
        numbers = torch.randint(40, (1, tokens))
        xlnet(numbers, use_mems=False)
        x, y = (found[name].transpose(0, 1) for name in ("x", "y"))  # (B, T, D)
        _, context = model.embed(numbers)
        mine = theirs.layer_norm(x + attention(x, context))
    torch.testing.assert_close(mine, y, atol=1e-5, rtol=1e-5)


def test_a_decode_step_maps_its_query_and_a_prompt_the_distances():
    """Both orders of the product, and the distances behind a cache, give the same."""
    model = build("transformer_xl")
    tokens = torch.randint(40, (2, 30), generator=torch.Generator().manual_seed(1))
    cache = model.new_cache(2, 30)
    with torch.no_grad():
        pieces = [model(piece, cache=cache).logits for piece in tokens.split([17, 1, 1, 8, 3], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(tokens).logits)


def largest_allocation(position, tokens):
    model = build(position, kind="window", window=16, dtype=torch.float32)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        model(torch.zeros(1, tokens, dtype=torch.int64), documents=torch.zeros(1, tokens, dtype=torch.int64))
    return max(event.self_cpu_memory_usage for event in found.events())


@pytest.mark.parametrize("position", [SHAW, {"kind": "transformer_xl"}], ids=["shaw", "transformer_xl"])
def test_a_window_asks_about_no_distance_beyond_it(position):
    assert largest_allocation(position, 2048) < 2.5 * largest_allocation(position, 1024)


def test_the_products_of_transformer_xl_are_counted():
    """In the backward no gradient goes to the sines."""
    model, tokens = build("transformer_xl"), torch.randint(40, (1, 24))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        model(tokens)
    assert forward.get_total_flops() == 24 * model.flops_per_token(24)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as both:
        model(tokens).logits.sum().backward()
    sines = 24 * 2 * len(model.blocks) * WIDTH * HEADS * CHANNELS
    assert both.get_total_flops() == 24 * model.training_flops_per_token(24) - sines


def test_a_mechanism_that_has_not_said_that_its_queries_are_read_refuses():
    class Other(Full):
        """Any."""

    assert "queries" not in Other.position_types
    with pytest.raises(UserError, match="works with positions that act on rotation, and 'shaw' acts on queries"):
        build(SHAW, kernel="tiled")

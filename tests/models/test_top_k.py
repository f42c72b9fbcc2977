"""Top-k attention against an explicit sort of every row."""

import math
from dataclasses import replace

import pytest
import torch

from models.attention.kernels.sdpa import PLAIN, AttentionMask, ScoreMod
from models.attention.top_k import largest, top_k_attention
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer

CAUSAL, ALL = AttentionMask(None, causal=True), AttentionMask(None, causal=False)


def inputs(tokens=9, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, tokens, 4) for heads in (4, 2, 2)]
    return [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for shape in shapes]


def build(keep=3, kind="top_k", direction="causal", **attention):
    torch.manual_seed(0)
    spec = {"kind": kind, "heads": 4, "kv_heads": 2, **({"keep": keep} if kind == "top_k" else {}), **attention}
    config = {"vocab_size": 40, "width": 16, "depth": 2, "direction": direction, "attention": spec}
    return Transformer(ModelConfig.from_dict(config | {"feedforward": {"kind": "swiglu", "width": 24}})).eval()


def oracle(q, k, v, keep, causal, softcap=None, position=None, sink=None):
    """Row by row: sort the logits, keep the first ones, exponentiate, divide."""
    rows = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys, values = k[b, h // 2], v[b, h // 2]
            for t in range(q.shape[2]):
                seen = t + 1 if causal else k.shape[2]
                scores = keys[:seen] @ q[b, h, t] / 2  # the root of 4 channels
                scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
                scores = scores if position is None else scores + position[h, t, :seen]
                chosen = sorted(range(seen), key=lambda j: (-scores[j].item(), j))[:keep]
                weights = scores[chosen].exp()
                total = weights.sum() + (0 if sink is None else sink[h].exp())
                rows.append((weights / total) @ values[chosen])
    return torch.stack(rows).view(q.shape)


@pytest.mark.parametrize("options", [False, True], ids=["plain", "options"])
@pytest.mark.parametrize("visible", [CAUSAL, ALL], ids=["causal", "all"])
@pytest.mark.parametrize("keep", [1, 3, 8])
def test_rows_are_those_of_an_explicit_sort(keep, visible, options):
    found, extra = inputs(), {}
    if options:
        extra = {"softcap": 1.5, "sink": torch.tensor([0.0, 1.0, -1.0, 2.0]), "position": torch.randn(4, 9, 9)}
        extra = {name: x.double() if name != "softcap" else x for name, x in extra.items()}
    mine = top_k_attention(*found, keep, visible, ScoreMod(**extra) if options else PLAIN)
    theirs = oracle(*found, keep, visible.causal, **extra)
    torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-10)
    upstream = torch.randn_like(theirs)
    gradients = (torch.autograd.grad(y, found, upstream) for y in (mine, theirs))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-10)


def test_no_gradient_reaches_what_was_not_kept():
    q, k, v = inputs()
    (gradient,) = torch.autograd.grad(top_k_attention(q, k, v, 2, ALL, PLAIN)[0, 0, 4].sum(), v)
    best = (k[0, 0] @ q[0, 0, 4]).topk(2).indices
    assert gradient[0, 0].abs().sum(-1).nonzero().flatten().tolist() == sorted(best.tolist())
    assert not gradient[1].any()
    assert not gradient[0, 1].any()


def test_of_equal_scores_the_first_are_kept():
    scores = torch.tensor([[1.0, 3, 2, 2, 3, 2], [0, 0, 0, 0, 0, 0], [5, 1, -math.inf, -math.inf, 4, -math.inf]])
    assert largest(scores, 3).nonzero().tolist() == [
        [0, 1],
        [0, 2],
        [0, 4],
        [1, 0],
        [1, 1],
        [1, 2],
        [2, 0],
        [2, 1],
        [2, 4],
    ]
    assert (largest(torch.randint(3, (50, 40)).float(), 7).sum(-1) == 7).all()


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("keep", [17, 100])
def test_keeping_all_is_full_attention(keep, direction):
    mine, full = build(keep, direction=direction), build(kind="full", direction=direction)
    full.load_state_dict(mine.state_dict())
    tokens = torch.randint(40, (2, 17))
    torch.testing.assert_close(mine(tokens).logits, full(tokens).logits, atol=1e-6, rtol=1e-6)


def test_keeping_few_is_not_full_attention():
    mine, full = build(2), build(kind="full")
    full.load_state_dict(mine.state_dict())
    tokens = torch.randint(40, (2, 17))
    assert (mine(tokens).logits - full(tokens).logits).abs().max() > 1e-4


def test_few_large_tensors_are_kept_for_the_backward():
    """The probabilities in fp32, of blocks of queries only those of the keys that the last of a block sees."""
    found, kept = inputs(64, torch.float32), {}

    def remember(x):
        kept[x.untyped_storage().data_ptr()] = (x, x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
        y = top_k_attention(*found, 5, CAUSAL, PLAIN)
    pairs = 2 * 4 * 64 * 64
    large = sorted(size for _, size in kept.values() if size >= pairs)
    assert large == [4 * pairs]
    assert y.requires_grad


@pytest.mark.parametrize(
    "visible",
    [
        CAUSAL,
        ALL,
        AttentionMask(torch.rand(2, 1, 21, 21).tril(-1).round().bool() | torch.eye(21, dtype=torch.bool), False),
    ],
    ids=["causal", "all", "mask"],
)
def test_blocks_of_queries_are_the_whole_with_and_without_dropout(visible, monkeypatch):
    monkeypatch.setattr("models.attention.top_k.ROWS", 8)
    found, generator = inputs(21), torch.Generator().manual_seed(1)
    upstream = torch.randn(found[0].shape, generator=generator, dtype=torch.float64)
    whole = replace(PLAIN, position=torch.zeros(4, 21, 21, dtype=torch.float64))  # takes the plainly written way
    ways = [top_k_attention(*found, 3, visible, scoring) for scoring in (PLAIN, whole)]
    torch.testing.assert_close(*ways)
    for mine, theirs in zip(*(torch.autograd.grad(y, found, upstream) for y in ways), strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.autograd.gradcheck(dropped, (*found, visible), fast_mode=True)


def dropped(q, k, v, visible):
    torch.manual_seed(2)
    return top_k_attention(q, k, v, 3, visible, PLAIN, dropout=0.3)


def test_ties_are_broken_in_the_rows_that_have_them_and_in_no_other():
    scores = torch.randn(2, 3, 5, 30)
    scores[1, 2, 3] = scores[0, 1, 4].round()
    expected = torch.zeros_like(scores, dtype=torch.bool)
    expected.scatter_(-1, scores.argsort(dim=-1, descending=True, stable=True)[..., :6], True)
    assert torch.equal(largest(scores, 6), expected)


def test_bf16_is_close_to_fp32():
    q, k, v = inputs(32, torch.float32)
    low = top_k_attention(*(x.bfloat16() for x in (q, k, v)), 32, CAUSAL, PLAIN)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), top_k_attention(q, k, v, 32, CAUSAL, PLAIN), atol=0.03, rtol=0.03)


def test_keeping_none_is_refused():
    with pytest.raises(UserError, match="keep must be at least 1 key"):
        build(0)

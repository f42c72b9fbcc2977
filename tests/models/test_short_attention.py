"""Short attention with its own backward against PyTorch's kernel, and where it is chosen."""

import pytest
import torch
import torch.nn.functional as F

from models.attention.kernels.sdpa import AttentionMask, attend
from models.attention.protocol import document_mask
from models.cpu import dispatch
from models.cpu.short_attention import ShortAttention, training_bias

CASES = {
    "as many groups as heads": (2, 3, 3, 7, 4),
    "two heads a group": (2, 4, 2, 9, 8),
    "one group": (1, 4, 1, 5, 6),
}


def inputs(batch, heads, groups, length, width, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, length, count, width) for count in (heads, groups, groups)]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [x.transpose(1, 2).requires_grad_() for x in drawn]  # (B, heads or groups, T, d) as a layer makes them


def mask_of(batch, length):
    documents = (torch.arange(length) >= length // 2).long().expand(batch, -1).clone()
    documents[0, -2:] = -1  # padding
    return document_mask(documents, documents, causal=True)


def bias_of(mask, length):
    visible = torch.ones(1, 1, length, length, dtype=torch.bool).tril() if mask is None else mask
    return torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))


def kernel(q, k, v, mask):
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_value_and_gradients_are_those_of_the_kernel(case, packed):
    batch, length = case[0], case[3]
    mask = mask_of(batch, length) if packed else None
    q, k, v = inputs(*case)
    mine, theirs = ShortAttention.apply(q, k, v, bias_of(mask, length)), kernel(q, k, v, mask)
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    upstream = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1), dtype=mine.dtype)
    gradients = zip(*(torch.autograd.grad(y, (q, k, v), upstream) for y in (mine, theirs)), strict=True)
    for mine, theirs in gradients:
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_gradients_are_those_of_its_value():
    case = CASES["two heads a group"]
    bias = bias_of(mask_of(case[0], case[3]), case[3])
    assert torch.autograd.gradcheck(lambda q, k, v: ShortAttention.apply(q, k, v, bias), inputs(*case))


def test_scores_beyond_the_range_of_exp_stay_finite():
    case = CASES["one group"]
    q, k, v = inputs(*case, dtype=torch.float32)
    y = ShortAttention.apply(1e3 * q, 1e3 * k, v, bias_of(None, case[3]))
    assert y.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y.sum(), (q, k, v)))


@pytest.fixture
def fast_products(monkeypatch):
    """A processor with bf16 products, whichever this one is."""
    monkeypatch.setattr(dispatch, "WIDENS_BF16", False)


def test_only_a_short_training_step_in_bf16_asks_for_it(fast_products, monkeypatch):
    def asked(dtype=torch.bfloat16, length=8):
        return training_bias(torch.zeros(2, length, 4, dtype=dtype), None, True) is not None

    assert asked()
    assert asked(length=dispatch.SHORT_TOKENS)
    assert not asked(length=dispatch.SHORT_TOKENS + 1)
    assert not asked(dtype=torch.float32)
    with torch.no_grad():
        assert not asked()
    monkeypatch.setattr(dispatch, "WIDENS_BF16", True)
    assert not asked()


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
def test_a_compiled_step_takes_it_and_stays_near_the_kernel(fast_products, packed):
    """No call of PyTorch's kernel is left in the traced graph, and the results agree to bf16's rounding."""
    batch, heads, groups, length, width = 2, 4, 2, 16, 8
    mask = mask_of(batch, length) if packed else None
    bias = training_bias(torch.zeros(batch, length, 4, dtype=torch.bfloat16), mask, True)
    assert bias.shape == (batch if packed else 1, 1, length, length)
    graphs = []

    def keep(graph, _):
        graphs.append(graph)
        return graph

    @torch.compile(backend=keep, fullgraph=True)
    def step(q, k, v):
        return attend(q, k, v, AttentionMask(mask, causal=mask is None, bias=bias))

    q, k, v = inputs(batch, heads, groups, length, width, dtype=torch.bfloat16)
    y, exact = step(q, k, v), kernel(q.double(), k.double(), v.double(), mask)
    assert "scaled_dot_product" not in graphs[0].code
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=0.03)
    mine = torch.autograd.grad(y.sum(), (q, k, v))
    for gradient, reference in zip(mine, torch.autograd.grad(exact.sum(), (q, k, v)), strict=True):
        torch.testing.assert_close(gradient.double(), reference.double(), rtol=0.05, atol=0.05)

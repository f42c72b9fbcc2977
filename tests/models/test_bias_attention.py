"""Attention whose addend is trained, tile by tile, against the plain way."""

import pytest
import torch

from models.attention.kernels.sdpa import AttentionMask, ScoreMod, reference_attention
from models.attention.selective import running_sum
from models.cpu import bias_attention
from models.cpu.bias_attention import attend_causal, causal_attention


def causal(tokens: int) -> torch.Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


def drawn(queries: int, keys: int, groups: int, bias_heads: int, dtype: torch.dtype = torch.float64):
    """q (2, 4, T, 8), k and v (2, groups, S, 8), and what is added to the scores, (2, bias_heads, T, S)."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 8, dtype=dtype) for h, n in ((4, queries), (groups, keys), (groups, keys)))
    bias = torch.randn(2, bias_heads, queries, keys, dtype=torch.promote_types(dtype, torch.float32))
    return [x.requires_grad_() for x in (q, k, v)], bias.requires_grad_()


@pytest.mark.parametrize("bias_heads", [1, 4])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (4, 9), (8, 8), (1, 5)])
def test_tiles_equal_all_at_once_in_outputs_and_gradients(monkeypatch, queries, keys, groups, bias_heads):
    monkeypatch.setattr(bias_attention, "TILE", 4)
    inputs, bias = drawn(queries, keys, groups, bias_heads)
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    mine = attend_causal(*inputs, bias, mask, 0.3)
    theirs = reference_attention(*inputs, AttentionMask(mask, causal=False), ScoreMod(0.3, bias))
    torch.testing.assert_close(mine, theirs)
    upstream = torch.randn_like(mine)
    both = [torch.autograd.grad(y, (*inputs, bias), upstream) for y in (mine, theirs)]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_are_those_of_finite_differences(monkeypatch):
    monkeypatch.setattr(bias_attention, "TILE", 2)
    inputs, bias = drawn(5, 5, 2, 1)

    def run(q, k, v, position):
        return attend_causal(q, k, v, position, causal(5), None)

    assert torch.autograd.gradcheck(run, (*inputs, bias))


def test_the_operators_are_what_torch_compile_takes_them_for():
    (q, k, v), bias = drawn(5, 5, 2, 1, torch.float32)
    torch.library.opcheck(causal_attention, (q, k, v, bias, 0.3))


def test_autocast_changes_nothing():
    inputs, bias = drawn(9, 9, 2, 1, torch.float32)

    def gradients():
        y = attend_causal(*inputs, bias, causal(9), None)
        return torch.autograd.grad(y.square().sum(), (*inputs, bias))

    plain = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(one, other) for one, other in zip(plain, gradients(), strict=True))


def test_bf16_is_as_near_to_exact_as_the_plain_way(monkeypatch):
    monkeypatch.setattr(bias_attention, "TILE", 16)
    inputs, bias = drawn(40, 40, 2, 1, torch.bfloat16)
    visible = AttentionMask(None, causal=True)
    exact = reference_attention(*(x.double() for x in inputs), visible, ScoreMod(None, bias.double()))
    mine = attend_causal(*inputs, bias, visible.dense(*inputs[:2]), None)
    theirs = reference_attention(*inputs, visible, ScoreMod(None, bias))
    assert mine.dtype == torch.bfloat16
    assert (mine - exact).abs().max() <= 1.5 * (theirs - exact).abs().max()


def test_what_rounds_to_nothing_is_nothing():
    """Weights below the smallest normal number would slow every product that they go through."""
    (q, k, _), bias = drawn(4, 4, 4, 1, torch.float32)
    far = bias.detach().clone()
    far[..., 1] -= 95.0
    p = bias_attention._probabilities(q, k, far, 0.3)
    assert not ((p > 0) & (p < torch.finfo(torch.float32).tiny)).any()
    assert (p[:, :, 2:, 1] == 0).all()


@pytest.mark.parametrize("queries", [1, 64, 65, 128, 200])
def test_running_sums_are_cumulated(queries):
    x = torch.rand(2, queries, 7, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(running_sum(x), x.cumsum(1))
    upstream = torch.randn_like(x)
    mine, theirs = (torch.autograd.grad(y, x, upstream)[0] for y in (running_sum(x), x.cumsum(1)))
    torch.testing.assert_close(mine, theirs)

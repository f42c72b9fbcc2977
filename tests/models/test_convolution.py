"""The gated convolution against PyTorch's, its cache, and what it refuses."""

import pytest
import torch

from models.attention.convolution import Taps, convolved, shifted
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer


def build(depth=1, **changes):
    torch.manual_seed(0)
    values = {"vocab_size": 40, "width": 16, "depth": depth, "context": 64, "position": "none"}
    values |= {"attention": {"kind": "convolution"}, "feedforward": {"kind": "swiglu", "width": 24}, **changes}
    return Transformer(ModelConfig.from_dict(values)).eval()


@pytest.mark.parametrize("documents", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kernel", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 3, 11])
def test_shifts_equal_the_convolution_of_every_document_by_itself(tokens, kernel, cached, documents):
    torch.manual_seed(tokens)
    v = torch.randn(2, tokens, 3, dtype=torch.float64, requires_grad=True)
    taps = torch.randn(kernel, 3, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(2, kernel - 1, 3, dtype=torch.float64) if cached else None
    begins = torch.rand(2, tokens) < 0.3 if documents else None
    mine, theirs = shifted(v, taps, memory, begins), convolved(v, taps, memory, begins)
    torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)
    upstream = torch.randn_like(theirs[0])
    pairs = zip(*(torch.autograd.grad(y, (v, taps), upstream) for y, _ in (mine, theirs)), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


def test_a_token_sees_itself_and_the_taps_before_it():
    model, tokens = build(attention={"kind": "convolution", "kernel": 3}), torch.randint(40, (1, 9))
    before = model(tokens).logits[0, -1]
    for back in range(9):
        changed = tokens.clone()
        changed[0, -1 - back] = (changed[0, -1 - back] + 1) % 40
        assert torch.equal(model(changed).logits[0, -1], before) == (back > 2)


def test_the_cache_holds_the_inputs_of_the_other_taps_and_nothing_of_an_earlier_document():
    model, tokens = build(), torch.randint(40, (2, 6))
    cache = model.new_cache(2, 20)
    held = cache.layers[0].bytes()
    with torch.no_grad():
        model(tokens, documents=torch.tensor([[0] * 6, [0] * 4 + [1] * 2]), cache=cache)
    assert cache.layers[0].state.shape == (2, 3, 16)
    assert cache.layers[0].bytes() == held == 2 * model.cache_bytes(20) == 2 * model.cache_bytes(2000)
    assert cache.layers[0].state[0].any(-1).tolist() == [True, True, True]
    assert cache.layers[0].state[1].any(-1).tolist() == [False, True, True]


def test_taps_are_drawn_as_those_of_a_convolution_and_are_no_matrix():
    torch.manual_seed(0)
    taps = Taps(4, 1000)
    assert taps.weight.dim() == 1  # so that an optimizer for matrices leaves them alone
    assert taps().shape == (4, 1000)
    assert 0.49 < taps.weight.abs().max() <= 0.5
    assert abs(float(taps.weight.detach().std()) - 0.5 / 3**0.5) < 0.01


def test_sums_in_fp32_where_the_inputs_are_bf16():
    v, taps = torch.randn(1, 50, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    y, _ = shifted(v, taps)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, convolved(v.float(), taps.float())[0], atol=1e-5, rtol=1e-5)


def test_what_it_refuses():
    with pytest.raises(UserError, match="kernel of a convolution must be at least 1"):
        build(attention={"kind": "convolution", "kernel": 0})
    with pytest.raises(UserError, match="cannot be bidirectional: its taps lie behind the token"):
        build(direction="bidirectional")
    with pytest.raises(UserError, match="no layer has one that knows positions"):
        build(position="rope")

"""Tiled attention against PyTorch's plain kernel: values, gradients, rounding, memory, and where it may be chosen."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from models.attention.kernels.flash import Tiles, tiled_attention
from models.attention.protocol import document_mask
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer

HEADS, GROUPS, WIDTH = 4, 2, 8


def inputs(queries=13, keys=13, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, HEADS, queries, WIDTH), (2, GROUPS, keys, WIDTH), (2, GROUPS, keys, WIDTH)]
    drawn = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return [x.requires_grad_() for x in drawn]


def plain(q, k, v, mask, scale=None):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)


def mask_of(queries, keys, causal):
    row = torch.zeros(1, keys, dtype=torch.int64)
    return document_mask(row[:, keys - queries :], row, causal)


def gradients(y, inputs):
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    return torch.autograd.grad(y, inputs, upstream)


@pytest.mark.parametrize("tiles", [(1, 1), (3, 5), (5, 3), (4, 13), (13, 4), (64, 64)], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "everything"])
@pytest.mark.parametrize(("queries", "keys"), [(13, 13), (4, 13), (1, 13)])
def test_value_and_gradients_are_those_of_the_plain_kernel(queries, keys, causal, tiles):
    tensors = inputs(queries, keys)
    mine = tiled_attention(*tensors, causal=causal, tiles=Tiles(*tiles))
    theirs = plain(*tensors, mask_of(queries, keys, causal))
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-10)
    for one, other in zip(gradients(mine, tensors), gradients(theirs, tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "everything"])
def test_documents_are_kept_apart(causal):
    tensors = inputs()
    documents = torch.tensor([[0] * 5 + [1] * 6 + [-1] * 2, [-1] * 4 + [3] * 9])
    mine = tiled_attention(*tensors, causal=causal, documents=(documents, documents), tiles=Tiles(4, 3), scale=0.3)
    theirs = plain(*tensors, document_mask(documents, documents, causal), scale=0.3)
    torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-10)
    for one, other in zip(gradients(mine, tensors), gradients(theirs, tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-10)


def test_gradients_are_those_of_its_value():
    tensors = inputs(6, 6)
    assert torch.autograd.gradcheck(lambda *x: tiled_attention(*x, causal=True, tiles=Tiles(4, 2)), tensors)


def test_the_largest_score_may_come_last_and_be_beyond_the_range_of_exp():
    q, k, v = inputs(dtype=torch.float32)
    growing = k * torch.arange(1, 14)[:, None] * 100
    y = tiled_attention(q, growing, v, causal=False, tiles=Tiles(4, 2))
    torch.testing.assert_close(y, plain(q, growing, v, None))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(y.sum(), (q, k, v)))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "everything"])
def test_bf16_is_at_most_twice_as_far_from_fp32_as_the_plain_kernel(causal):
    exact = inputs(200, 200, torch.float32)
    with torch.no_grad():
        for x in exact:
            x.copy_(x.bfloat16())
    half = [x.detach().bfloat16().requires_grad_() for x in exact]
    mask = mask_of(200, 200, causal)
    mine, theirs = tiled_attention(*half, causal=causal, tiles=Tiles(64, 32)), plain(*half, mask)
    expected = plain(*exact, mask)

    def error(found, reference):
        return (found.float() - reference).abs().mean()

    assert error(mine, expected) <= 2 * error(theirs, expected)
    references = gradients(expected, exact)
    for one, other, reference in zip(gradients(mine, half), gradients(theirs, half), references, strict=True):
        assert error(one, reference) <= 2 * error(other, reference)


def test_autocast_changes_nothing():
    mine = inputs(20, 20, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = tiled_attention(*mine, causal=True)
    expected = tiled_attention(*mine, causal=True)
    assert torch.equal(y, expected)
    for one, other in zip(gradients(y, mine), gradients(expected, mine), strict=True):
        assert torch.equal(one, other)


def build(kernel, **attention):
    torch.manual_seed(0)
    spec = {"kind": "full", "heads": 4, "kv_heads": 2, "kernel": kernel, **attention}
    config = {"vocab_size": 40, "width": 16, "depth": 2, "context": 64, "attention": spec}
    return Transformer(ModelConfig.from_dict(config | {"feedforward": {"kind": "swiglu", "width": 24}}))


def largest_allocation(tokens):
    """Bytes, of a step of training."""
    model = build("tiled")
    documents = torch.zeros(1, tokens, dtype=torch.int64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        model(documents, documents=documents, targets=documents).loss.backward()
    return max(event.self_cpu_memory_usage for event in found.events())


def test_memory_grows_with_the_length_and_not_with_its_square():
    assert largest_allocation(1024) < 2.5 * largest_allocation(512)
    assert largest_allocation(1024) < 1024 * 1024  # bytes: a mask of all pairs is as large


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("kernel", ["tiled", "reference"])
def test_a_model_is_the_same_with_every_kernel(kernel, direction):
    models = []
    for name in ("sdpa", kernel):
        values = build(name, scale=0.4, qk_norm="rms").config.to_dict() | {"direction": direction}
        torch.manual_seed(0)
        models.append(Transformer(ModelConfig.from_dict(values)))
    tokens = torch.randint(40, (2, 200))
    documents = torch.stack([torch.arange(200) // 90, torch.arange(200) // 150])
    losses = [model(tokens, documents=documents, targets=tokens).loss for model in models]
    torch.testing.assert_close(*losses)
    for one, other in zip(*(torch.autograd.grad(loss, list(model.parameters())) for model, loss in
                            zip(models, losses, strict=True)), strict=True):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kernel": "flash"}, "unknown kernel 'flash'"),
        ({"kernel": "tiled", "softcap": 3.0}, "kernel tiled has no softcap"),
        ({"kernel": "tiled", "sink": "zero"}, "kernel tiled has no sink"),
        ({"kernel": "tiled", "dropout": 0.1}, "kernel tiled has no dropout"),
        (
            {"kernel": "tiled", "position": "alibi"},
            "act on rotation, and 'alibi' acts on scores: kernel tiled adds",
        ),
        ({"kernel": "tiled", "position": "shaw"}, "'shaw' acts on queries: kernel tiled adds nothing to the scores"),
        ({"kernel": "tiled", "kind": "window", "window": 4}, "kernel tiled is an option of full alone"),
    ],
)
def test_what_a_kernel_cannot_do_is_refused(options, sentence):
    with pytest.raises(UserError, match=sentence):
        build(**options)

"""Linformer against the formula and the package of its name; what its layers share; documents, padding, refusals."""

import pytest
import torch
from linformer import LinformerSelfAttention
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.attention.linformer import SUMS
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer

SPEC = {"kind": "linformer", "heads": 4, "rank": 5, "documents": 3}
CONTEXT = 24


def build(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = {key: changes.pop(key) for key in ("direction", "residual", "depth", "position") if key in changes}
    values = {"vocab_size": 40, "width": 16, "depth": 2, "context": CONTEXT, "position": "learned"}
    values |= {"direction": "bidirectional", "feedforward": {"kind": "swiglu", "width": 24}, **model}
    return Transformer(ModelConfig.from_dict({**values, "attention": {**SPEC, **changes}})).to(dtype)


def context_of(model, tokens, documents=None):
    return model.embed(torch.zeros(2, tokens, dtype=torch.int64), documents=documents)[1]


@pytest.mark.parametrize("tokens", [1, 9, CONTEXT])
def test_it_is_that_of_the_package(tokens):
    attention = build().blocks[0].attention
    theirs = LinformerSelfAttention(16, CONTEXT, k=5, heads=4)
    with torch.no_grad():
        for mine, other in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out")):
            getattr(theirs, other).weight.copy_(getattr(attention, mine).weight)
        theirs.to_out.bias.zero_()
        theirs.proj_k.copy_(attention.e.weight[0].T)
        theirs.proj_v.copy_(attention.f.weight[0].T)
    x = torch.randn(2, tokens, 16)
    torch.testing.assert_close(attention(x, context_of(build(), tokens)), theirs(x), atol=1e-6, rtol=1e-6)


def tables(model, index):
    """E and F (H or 1, k, n) of a layer, for all kinds of sums but the maximum."""
    attention, spec = model.blocks[index].attention, model.config.layers[index].attention
    part = -(-CONTEXT // spec.rank)
    if spec.sharing == "layerwise":
        e = f = model.shared[0].weight
    elif spec.sums in ("linear", "convolution"):
        e = attention.e.weight
        f = e if attention.f is None else attention.f.weight
    if spec.sums == "linear":
        return e, f
    cell = (torch.arange(CONTEXT) // part == torch.arange(spec.rank)[:, None]).double()  # (k, n)
    if spec.sums == "mean":
        return cell[None], cell[None]
    kernel = torch.arange(CONTEXT) % part
    return cell * e[:, :, kernel], cell * f[:, :, kernel]


def formula(model, index, x):
    """One head after another, one row after another: softmax(Q (E K)^T / sqrt(d)) (F V) of one document x (T, D)."""
    attention, spec, tokens = model.blocks[index].attention, model.config.layers[index].attention, len(x)
    part, heads = -(-CONTEXT // spec.rank), []
    for h in range(4):
        q, k, v = (linear(x)[:, 4 * h : 4 * h + 4] for linear in (attention.q, attention.k, attention.v))
        if spec.sums == "max":
            k, v = (torch.stack([piece.amax(0) for piece in y.split(part)]) for y in (k, v))
        else:
            e, f = (table[min(h, len(table) - 1), :, :tokens] for table in tables(model, index))
            if spec.sums != "linear":
                e, f = (table[: -(-tokens // part)] for table in (e, f))  # parts that have begun
            if spec.sums == "mean":
                e, f = (table / table.sum(1, keepdim=True) for table in (e, f))
            k, v = e @ k, f @ v
        heads.append((q @ k.T / 2).softmax(-1) @ v)
    return attention.o(torch.cat(heads, dim=1))


VARIANTS = [{"sharing": sharing} for sharing in ("none", "headwise", "key_value", "layerwise")]
VARIANTS += [{"sums": sums} for sums in ("convolution", "mean", "max")]
VARIANTS += [{"sums": "convolution", "sharing": sharing} for sharing in ("none", "layerwise")]


@pytest.mark.parametrize("packed", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_it_is_the_formula_for_each_document(variant, packed):
    model, x = build(torch.float64, **variant), torch.randn(2, 13, 16, dtype=torch.float64)
    documents = torch.tensor([[4] * 3 + [2] * 9 + [7], [-1] * 2 + [0] * 6 + [-1] + [1] * 4]) if packed else None
    for index, block in enumerate(model.blocks):
        y = block.attention(x, context_of(model, 13, documents))
        for row in range(2):
            numbers = torch.zeros(13) if documents is None else documents[row]
            for number in set(numbers.tolist()) - {-1}:
                where = numbers == number
                torch.testing.assert_close(y[row, where], formula(model, index, x[row, where]))


def test_layers_that_share_their_projection_hold_it_once():
    model = build(sharing="layerwise")
    shared = [name for name in model.state_dict() if "shared" in name]
    assert shared == ["shared.0.weight"]
    assert model.shared[0].weight.shape == (1, 5, CONTEXT)
    separate = build(sharing="key_value")
    counts = [m.count_parameters()["total"] for m in (model, separate)]
    assert counts[1] - counts[0] == 5 * CONTEXT  # two layers, of which one is spared
    assert not list(build(sums="mean").shared)


@pytest.mark.parametrize("sharing", ["layerwise", "none"])
def test_shared_weights_get_the_gradients_of_all_layers(sharing):
    tokens = torch.randint(40, (2, 9))
    model = build(torch.float64, sharing=sharing, residual="reversible")
    parameters = list(model.parameters())
    mine = torch.autograd.grad(model(tokens).logits.square().sum(), parameters)
    x, context = model.embed(tokens)
    for block in model.blocks:
        x = block(x, context).y
    theirs = torch.autograd.grad(model.project(model.finish(x)).square().sum(), parameters)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_flops_are_those_of_the_products_that_run():
    model, tokens = build(), torch.randint(40, (1, CONTEXT))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        model(tokens)
    assert counted.get_total_flops() == CONTEXT * model.flops_per_token(CONTEXT)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        model(tokens).logits.sum().backward()
    assert counted.get_total_flops() == CONTEXT * model.training_flops_per_token(CONTEXT)
    assert model.cache_bytes(CONTEXT) == 0


def test_more_documents_than_it_keeps_apart_are_refused():
    model, tokens = build(documents=2), torch.randint(40, (2, 9))
    documents = torch.tensor([[0] * 9, [1] * 3 + [2] * 3 + [3] * 3])
    with pytest.raises(UserError, match="a row holds 3 documents, and this model's attention keeps 2 apart"):
        model(tokens, documents=documents)
    documents[1, 6:] = -1  # padding is none
    assert model(tokens, documents=documents).logits.isfinite().all()


@pytest.mark.parametrize("sums", SUMS)
def test_padding_takes_no_part_in_a_batch_of_one_row(sums):
    model, tokens = build(documents=1, sums=sums, sharing="headwise"), torch.randint(40, (1, 9))
    documents = torch.tensor([[-1] * 3 + [0] * 4 + [-1] * 2])
    alone = model(tokens[:, 3:7]).logits
    torch.testing.assert_close(model(tokens, documents=documents).logits[:, 3:7], alone, atol=1e-5, rtol=1e-5)


def test_what_it_cannot_be_is_refused():
    for change, message in [
        ({"direction": "causal"}, "cannot be causal: its sums run over the whole sequence"),
        ({"position": "rope"}, "acts in the attention"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"sharing": "head"}, "unknown sharing 'head'"),
        ({"sums": "average"}, "unknown sums 'average'"),
        ({"sums": "mean", "sharing": "layerwise"}, "learns nothing that could be shared"),
    ]:
        with pytest.raises(UserError, match=message):
            build(**change)
    with pytest.raises(UserError, match="25 tokens are more than the context of 24"):
        build(position="none")(torch.zeros(1, 25, dtype=torch.int64))

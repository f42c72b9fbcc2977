"""Reversible residuals: gradients are autograd's, memory does not grow with depth, randomness is repeated."""

import copy
import weakref

import pytest
import torch
from torch.func import functional_call

from app.strategies.fsdp import FSDP2
from models.attention.protocol import Attention, Mixed
from models.config import ModelConfig
from models.errors import UserError
from models.families import family_of
from models.reversible import merge
from models.transformer import Transformer

CONFIG = {
    "vocab_size": 40,
    "width": 16,
    "depth": 3,
    "context": 32,
    "residual": "reversible",
    "attention": {"kind": "full", "heads": 4, "kv_heads": 2},
    "feedforward": {"kind": "swiglu", "width": 24},
}
ORDERS = ["attention_first", "feedforward_first", "parallel", "sandwich(1)"]


def build(dtype=torch.float32, **changes):
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_dict({**CONFIG, **changes})).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(rows=2, length=9):
    return torch.randint(40, (rows, length), generator=torch.Generator().manual_seed(1))


def plainly(model, x):
    """The logits with every intermediate result kept by autograd: blocks called one after another."""
    h, context = model.embed(x)
    for block in model.blocks:
        h = block(h, context).y
    return model.project(model.finish(h))


def same(mine, theirs, tolerance):
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("order", ["attention_first", "feedforward_first"])
def test_two_streams_are_those_of_the_paper(order):
    model, x = build(torch.float64, order=order).eval(), tokens()
    embedded, context = model.embed(x)
    x1 = x2 = embedded[..., :16]
    for block in model.blocks:
        branches = [
            lambda y, block=block: block.attention(block.attention_norm(y), context),
            lambda y, block=block: block.feedforward(block.feedforward_norm(y), context),
        ]
        f, g = branches if order == "attention_first" else branches[::-1]
        y1 = x1 + f(x2)
        y2 = x2 + g(y1)
        x1, x2 = y1, y2
    torch.testing.assert_close(model(x).logits, model.project(model.norm((x1 + x2) / 2)))


@pytest.mark.parametrize("norm", ["pre", "sandwich"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("position", ["rope", "learned", "t5"])
def test_gradients_are_those_of_autograd(order, position, norm):
    model, x = build(torch.float64, order=order, position=position, norm={"kind": "rms", "position": norm}), tokens()
    upstream = torch.randn(2, 9, 40, dtype=torch.float64)
    mine, theirs = model(x).logits, plainly(model, x)
    assert torch.equal(mine, theirs)
    parameters = list(model.parameters())
    same(*(torch.autograd.grad(y, parameters, upstream) for y in (mine, theirs)), 1e-10)


def test_tensors_put_in_for_one_call_get_the_gradients():
    """`functional_call` has taken them out of the modules when the backward runs."""
    model, x = build(torch.float64), tokens()
    names, values = zip(*model.named_parameters(), strict=True)
    others = [(value + 0.1 * torch.randn_like(value)).detach().requires_grad_() for value in values]
    mine = functional_call(model, dict(zip(names, others, strict=True)), (x,)).logits
    upstream = torch.randn_like(mine)
    mine = torch.autograd.grad(mine, others, upstream)
    with torch.no_grad():
        for value, other in zip(values, others, strict=True):
            value.copy_(other)
    same(mine, torch.autograd.grad(plainly(model, x), values, upstream), 1e-10)


def test_frozen_blocks_get_no_gradient():
    model, x = build(torch.float64), tokens()
    for parameter in model.blocks[1].parameters():
        parameter.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    same(*(torch.autograd.grad(y.square().sum(), trained) for y in (model(x).logits, plainly(model, x))), 1e-10)
    model(x).logits.sum().backward()
    assert all(parameter.grad is None for parameter in model.blocks[1].parameters())


def saved_bytes(model, x):
    """Bytes that autograd keeps between forward and backward, each storage once, parameters apart."""

    class Kept:
        def __init__(self, tensor):
            self.tensor = tensor.detach()  # or it would hold the graph that holds it
            alive.add(self)

    alive = weakref.WeakSet()
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        loss = model(x, targets=x).loss
    storages = {kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage().nbytes() for kept in alive}
    loss.backward()
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


def test_memory_does_not_grow_with_depth():
    x = tokens(2, 32)
    kept = {residual: [saved_bytes(build(residual=residual, depth=depth), x) for depth in (2, 4, 8)]
            for residual in ("standard", "reversible")}  # fmt: skip
    assert len(set(kept["reversible"])) == 1
    assert kept["standard"][2] > 3 * kept["standard"][0] > 6 * kept["reversible"][0]


def test_dropout_falls_on_the_same_numbers_again():
    model, x = build(torch.float64, dropout=0.3, attention=CONFIG["attention"] | {"dropout": 0.2}), tokens()
    upstream = torch.randn(2, 9, 40, dtype=torch.float64)
    gradients = []
    for run in (lambda: model(x).logits, lambda: plainly(model, x)):
        torch.manual_seed(3)
        y = run()
        drawn = torch.rand(1)
        gradients.append((y, *torch.autograd.grad(y, list(model.parameters()), upstream), drawn, torch.rand(1)))
    same(*gradients, 1e-10)  # and the backward draws nothing from the sequence
    torch.manual_seed(4)
    assert not torch.allclose(model(x).logits, gradients[0][0])


def test_autocast_is_as_it_was_in_the_forward():
    model, x = build(), tokens()
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = model(x).logits, plainly(model, x)
    assert torch.equal(mine, theirs)
    upstream = torch.randn_like(mine)
    parameters = list(model.parameters())
    same(*(torch.autograd.grad(y, parameters, upstream) for y in (mine, theirs)), 2e-2)


def test_streams_stay_fp32_in_a_bf16_model():
    model, x = build(torch.bfloat16, depth=12), tokens()
    embedded, _ = model.embed(x)
    assert embedded.dtype == torch.float32
    mine, theirs = model(x).logits, plainly(model, x)
    assert mine.dtype == torch.bfloat16
    assert torch.equal(mine, theirs)
    upstream = torch.randn_like(mine)
    for a, b in zip(*(torch.autograd.grad(y, list(model.parameters()), upstream) for y in (mine, theirs)), strict=True):
        assert (a.float() - b.float()).norm() <= 0.01 * b.float().norm()  # what bf16 weights would not let through


def test_states_and_merged_streams_have_the_width_of_the_model():
    model, x = build().eval(), tokens()
    output = model(x, taps=("blocks.0", "blocks.2"))
    h, context = model.embed(x)
    for i, block in enumerate(model.blocks):
        h = block(h, context).y
        if i in (0, 2):
            assert torch.equal(output.taps[f"blocks.{i}"], merge(h))
    assert output.taps["blocks.2"].shape == (2, 9, 16)
    torch.testing.assert_close(model.project(model.norm(output.taps["blocks.2"])), output.logits)


def test_losses_of_mechanisms_reach_the_parameters():
    class Watched(Attention):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, *rest):
            y = self.inner(x, *rest)
            return Mixed(y, {"size": y.square().mean()})

    model, x = build(torch.float64), tokens()
    for block in model.blocks:
        block.attention = Watched(block.attention)
    found = model(x)
    assert set(found.losses) == {"size"}
    plain = copy.deepcopy(model)
    h, context = plain.embed(x)
    loss = 0
    for block in plain.blocks:
        h, losses, _ = block(h, context)
        loss = loss + losses["size"]
    logits = plain.project(plain.finish(h))
    torch.testing.assert_close(found.losses["size"], loss)
    mine, theirs = found.logits.sum() + 3 * found.losses["size"], logits.sum() + 3 * loss
    same(
        torch.autograd.grad(mine, list(model.parameters())),
        torch.autograd.grad(theirs, list(plain.parameters())),
        1e-10,
    )


def test_compiled_blocks_equal_eager_ones_without_gradients():
    model, x = build().eval(), tokens()
    with torch.no_grad():
        expected = model(x).logits
        torch.compiler.reset()
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(model(x).logits, expected)


def test_what_cannot_be_taken_back_is_refused():
    for position in ("post", "deepnorm"):
        with pytest.raises(UserError, match=f"norm position {position} normalises the stream"):
            build(norm={"kind": "rms", "position": position})
    with pytest.raises(UserError, match="unknown residual 'reverse'"):
        build(residual="reverse")
    with pytest.raises(UserError, match="exits read the stream between layers"):
        build(exits={"layers": [1]})


def test_shards_that_its_backward_would_not_gather_are_refused():
    with pytest.raises(UserError, match="the fsdp strategy cannot train a model with residual: reversible"):
        FSDP2().shard(build(), torch.float32)


def test_no_family_holds_it():
    with pytest.raises(UserError, match="its residual stream is standard, not reversible"):
        family_of(build().config)

"""Stacked experts against the same experts run one after another."""

import copy
import dataclasses

import pytest
import torch

from models.config import ModelConfig
from models.cpu.dispatch import WIDENS_BF16
from models.errors import UserError
from models.experts import Capacity, dispatch, layout
from models.experts.assignments import Assignments, token_pairs
from models.experts.separate import SeparateExperts
from models.experts.stacked import StackedExperts
from models.feedforward import Mlp, Swiglu
from models.linear import Linear
from models.transformer import Transformer

WIDTH, COUNT = 16, 4
SPECS = {
    "swiglu": Swiglu(width=24),
    "swiglu, biases": Swiglu(width=24, bias=True, out_bias=True),
    "mlp": Mlp(width=24),
    "mlp, odd": Mlp(width=7, bias=False, out_bias=False),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


def both(spec, dtype=torch.float32):
    """Stacked and separate experts with the same weights."""
    torch.manual_seed(0)
    separate = SeparateExperts(COUNT, spec, WIDTH, 4)
    for parameter in separate.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    stacked = StackedExperts(COUNT, spec, WIDTH, 4)
    with torch.no_grad():
        for name, parameter in stacked.named_parameters():
            parameter.copy_(torch.stack([each.get_parameter(dotted(name)) for each in separate]))
    return stacked.to(dtype), separate.to(dtype)


def dotted(name):
    return name.replace("_bias", ".bias") if name.endswith("_bias") else f"{name}.weight"


def gradients(stacked, separate):
    """Name -> the gradient of both, stacked."""
    for name, parameter in stacked.named_parameters():
        yield name, parameter.grad, torch.stack([each.get_parameter(dotted(name)).grad for each in separate])


def spread(tokens=13, k=2, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, COUNT, generator=generator)
    chosen = scores.topk(k).indices
    return token_pairs(chosen, torch.rand(tokens, k, generator=generator).to(dtype))


def dropped(pairs):
    return pairs._replace(experts=torch.where(torch.arange(len(pairs.experts)) % 3 == 1, COUNT, pairs.experts))


def shuffled(pairs):
    """As expert choice gives them: tokens that several experts chose, and such that none did."""
    order = torch.randperm(len(pairs.tokens), generator=torch.Generator().manual_seed(1))[: len(pairs.tokens) // 2]
    return Assignments(pairs.tokens[order], pairs.experts[order], pairs.weights[order])


ROUTES = {
    "spread": spread(),
    "one choice": spread(k=1),
    "every expert": spread(k=COUNT),
    "one token": spread(tokens=1),
    "one token, one of its pairs dropped": dropped(spread(tokens=1)),
    "dropped": dropped(spread()),
    "all dropped": spread()._replace(experts=torch.full((26,), COUNT)),
    "few tokens": dropped(spread(tokens=5)),
    "few tokens, all dropped": spread(tokens=5)._replace(experts=torch.full((10,), COUNT)),
    "one token with an expert twice": Assignments(
        torch.zeros(3, dtype=torch.int64), torch.tensor([2, 0, 2]), torch.rand(3)
    ),
    "shuffled": shuffled(spread()),
    "shuffled and dropped": dropped(shuffled(spread())),
    "an expert without tokens": spread()._replace(experts=spread().experts % 3),
    "all to one": token_pairs(torch.full((13, 1), 2), torch.rand(13, 1)),
    "no tokens": token_pairs(torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2)),
}


def run(experts, x, pairs):
    """Output and the gradients of x and of the weights of the pairs; those of the parameters accumulate."""
    x, weights = x.clone().requires_grad_(), pairs.weights.clone().requires_grad_()
    y = experts(x, pairs._replace(weights=weights))
    (y.to(torch.float64) * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)).sum().backward()
    return y, x.grad, weights.grad


def noise(tokens, dtype=torch.float32):
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)


def tokens_of(pairs):
    return int(pairs.tokens.max()) + 1 if len(pairs.tokens) else 0


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that nobody has written holds NaN, as it may: what must not be read is found out."""
    for name in ("grouped_product", "grouped_outer"):
        monkeypatch.setattr(dispatch, name, _poison(getattr(dispatch, name)))


def _poison(function):
    def poisoned_function(a, b, ends):
        out = function(a, b, ends)
        if out.dim() == 2:
            out[int(ends[-1]) :] = torch.nan
        return out

    return poisoned_function


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_stacked_equals_separate(poisoned, spec, route, dtype):
    stacked, separate = both(SPECS[spec], dtype)
    pairs = ROUTES[route]._replace(weights=ROUTES[route].weights.to(dtype))
    x = noise(tokens_of(pairs), dtype)
    near = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    for mine, plain in zip(run(stacked, x, pairs), run(separate, x, pairs), strict=True):
        torch.testing.assert_close(mine, plain, **near)
    for name, mine, plain in gradients(stacked, separate):
        torch.testing.assert_close(mine, plain, **near, msg=lambda text, name=name: f"{name}: {text}")
    with torch.no_grad():
        torch.testing.assert_close(stacked.eval()(x, pairs), separate.eval()(x, pairs), **near)


@pytest.mark.parametrize("route", ["spread", "dropped"])
def test_every_token_is_the_weighted_sum_of_its_experts(route):
    """Against the definition, one pair at a time."""
    _, separate = both(SPECS["swiglu"], torch.float64)
    pairs, x = ROUTES[route], noise(13, torch.float64)
    expected = torch.zeros_like(x)
    for token, expert, weight in zip(*pairs[:3], strict=True):
        if expert < COUNT:
            expected[token] += weight * separate[expert](x[token])
    torch.testing.assert_close(separate(x, pairs), expected, rtol=1e-12, atol=1e-12)


def test_derivatives_are_those_of_the_function():
    stacked, _ = both(SPECS["swiglu, biases"], torch.float64)
    pairs = dropped(spread(tokens=4, dtype=torch.float64))
    names, values = zip(*stacked.named_parameters(), strict=True)

    def function(x, weights, *values):
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(stacked, given, (x, pairs._replace(weights=weights)))

    arguments = [t.detach().requires_grad_() for t in (noise(4, torch.float64), pairs.weights, *values)]
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)


@pytest.mark.parametrize("bf16_products", [True, False], ids=["grouped", "one an expert"])
@pytest.mark.parametrize("autocast", [True, False])
def test_bf16(monkeypatch, autocast, bf16_products):
    """In bf16, and under autocast with fp32 weights, as near to fp32 as the separate experts are."""
    if not bf16_products:
        monkeypatch.setattr(dispatch, "_grouped_mm_takes", lambda a, b: False)
    exact, _ = both(SPECS["swiglu"])
    found, _ = both(SPECS["swiglu"], torch.float32 if autocast else torch.bfloat16)
    pairs, x = ROUTES["dropped"], noise(13)
    expected, given = run(exact, x, pairs), x if autocast else x.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        results = run(found, given, pairs)
    assert [result.dtype for result in results] == [torch.bfloat16, given.dtype, torch.float32]
    for mine, true in zip(results, expected, strict=True):
        assert (mine.float() - true).norm() <= 0.02 * true.norm()
    for (name, mine), true in zip(found.named_parameters(), exact.parameters(), strict=True):
        assert mine.grad.dtype == mine.dtype
        assert (mine.grad.float() - true.grad).norm() <= 0.02 * true.grad.norm(), name


def test_one_token_computes_in_the_autocast_dtype():
    stacked, separate = both(SPECS["swiglu, biases"])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        mine, plain = (experts(noise(1), ROUTES["one token"]) for experts in (stacked, separate))
    assert mine.dtype == plain.dtype == torch.bfloat16
    torch.testing.assert_close(mine, plain)


def test_sums_over_many_experts_are_not_rounded_to_bf16_in_between():
    stacked, _ = both(SPECS["mlp, odd"], torch.bfloat16)
    with torch.no_grad():
        stacked.up.zero_()
        stacked.down.zero_()
        stacked.down_bias = torch.nn.Parameter(torch.ones(COUNT, WIDTH, dtype=torch.bfloat16))
        weights = torch.tensor([256.0, 0.75, 0.75, 0.75])  # 258.25: in bf16, 256 + 0.75 is 256
        for tokens in (1, 2):
            pairs = token_pairs(torch.arange(4).expand(tokens, -1), weights.expand(tokens, -1))
            assert stacked(noise(tokens).bfloat16(), pairs).unique().item() == 258


@pytest.mark.parametrize("strides", ["permuted", "expanded"])
def test_gradients_in_any_layout(strides):
    """grouped_mm refuses operands that are not in rows or columns."""
    stacked, separate = both(SPECS["swiglu"])
    x, pairs = noise(13), ROUTES["spread"]
    gradient = torch.randn(WIDTH, 13).t() if strides == "permuted" else torch.ones(1, 1).expand(13, WIDTH)
    for experts in (stacked, separate):
        experts(x, pairs).backward(gradient)
    for _, mine, plain in gradients(stacked, separate):
        torch.testing.assert_close(mine, plain, rtol=1e-6, atol=1e-6)


def test_a_permuted_input_and_a_product_of_an_expanded_gradient():
    stacked, _ = both(SPECS["swiglu"])
    x = noise(13).t().contiguous().t()
    torch.testing.assert_close(stacked(x, ROUTES["spread"]), stacked(x.contiguous(), ROUTES["spread"]))
    groups = dispatch.group(ROUTES["spread"], COUNT)
    rows = torch.randn(26, WIDTH, requires_grad=True)
    dispatch.grouped_linear(rows, stacked.up, None, groups).sum().backward()
    torch.testing.assert_close(rows.grad, stacked.up.sum(1)[groups.experts])


@pytest.mark.parametrize("route", ["dropped", "shuffled and dropped", "an expert without tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_as_one_graph(dtype, route):
    torch._dynamo.reset()
    stacked, _ = both(SPECS["swiglu, biases"], dtype)
    pairs, x = ROUTES[route], noise(13, dtype)
    compiled = copy.deepcopy(stacked)
    compiled.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    near = {"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    for mine, plain in zip(run(compiled, x, pairs), run(stacked, x, pairs), strict=True):
        torch.testing.assert_close(mine, plain, **near)
    for mine, plain in zip(compiled.parameters(), stacked.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, plain.grad, **near)


def test_the_operators_behave_as_torch_compile_expects():
    a, b, ends = noise(13), torch.randn(COUNT, WIDTH, 8), torch.tensor([3, 3, 9, 13], dtype=torch.int32)
    torch.library.opcheck(dispatch._traced_product, (a, b, ends))
    torch.library.opcheck(dispatch._traced_outer, (a, torch.randn(13, 8), ends))


def test_separate_experts_stand_in_a_compiled_function():
    torch._dynamo.reset()
    _, separate = both(SPECS["swiglu"])
    pairs, x = ROUTES["spread"], noise(13)

    def function(x):
        return 2 * separate(x + 1, pairs)

    torch.testing.assert_close(torch.compile(function, backend="aot_eager")(x), function(x))


@pytest.mark.parametrize("training", [True, False])
def test_a_hook_on_an_expert_sees_its_tokens_alone(training):
    _, separate = both(SPECS["swiglu"])
    separate.train(training)
    pairs = dropped(ROUTES["an expert without tokens"])
    seen = {}
    for number, expert in enumerate(separate):
        expert.gate.register_forward_pre_hook(lambda _, given, number=number: seen.update({number: given[0]}))
    x = noise(13)
    separate(x, pairs)
    expected = {number: x[pairs.tokens[pairs.experts == number]] for number in range(COUNT)}
    assert len(expected[3]) == 0
    if not training:
        expected.pop(3)
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[number], expected[number]) for number in seen)


@pytest.mark.parametrize("kind", [StackedExperts, SeparateExperts])
def test_an_expert_without_tokens_has_a_gradient_of_zero(kind):
    experts = kind(COUNT, SPECS["swiglu, biases"], WIDTH, 4)
    experts(noise(13), ROUTES["all to one"]).sum().backward()
    for name, parameter in experts.named_parameters():
        assert parameter.grad is not None, name
        if kind is StackedExperts:
            assert parameter.grad.flatten(1).ne(0).any(1).tolist() == [False, False, True, False], name
        else:
            assert parameter.grad.ne(0).any() == name.startswith("2."), name


@pytest.mark.parametrize("spec", SPECS)
def test_both_draw_from_the_same_distributions(spec):
    torch.manual_seed(0)
    with torch.device("meta"):
        stacked = StackedExperts(COUNT, SPECS[spec], 256, 12)
    stacked.to_empty(device="cpu")
    stacked.reset_parameters()
    separate = SeparateExperts(COUNT, SPECS[spec], 256, 12)
    for name, parameter in stacked.named_parameters():
        expected = torch.stack([each.get_parameter(dotted(name)) for each in separate])
        torch.testing.assert_close(parameter.std(), expected.std(), rtol=0.05, atol=0)
        assert parameter.shape == expected.shape


def test_nothing_waits_for_the_device(monkeypatch):
    """Nothing asks for the value of a tensor where grouped_mm takes the inputs."""
    stacked, _ = both(SPECS["swiglu"], torch.bfloat16)
    if WIDENS_BF16:
        stacked, _ = both(SPECS["swiglu"])

    def refuse(*_):
        raise AssertionError("a value was asked for")

    for name in ("item", "tolist", "__bool__", "__int__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    x = noise(13, stacked.up.dtype).requires_grad_()
    stacked(x, ROUTES["dropped"]).sum().backward()


def mixture_model(layout, depth=4, **expert):
    torch.manual_seed(0)
    expert = {"kind": "swiglu", "width": 24, **expert}
    feedforward = {
        "dense": {"kind": "swiglu", "width": 24},
        "moe": {"kind": "experts", "count": COUNT, "expert": expert, "layout": layout},
    }
    return Transformer(
        ModelConfig.from_dict(
            {
                "vocab_size": 50,
                "width": WIDTH,
                "depth": depth,
                "attention": {"kind": "full", "heads": 2},
                "feedforward": feedforward,
                "layers": ["dense", "moe"],
            }
        )
    )


@pytest.mark.parametrize("expert", [{}, {"bias": True, "out_bias": True}, {"kind": "mlp"}])
def test_layouts_change_into_each_other_exactly(expert):
    model = mixture_model("stacked", **expert)
    torch.nn.init.normal_(model.blocks[1].feedforward.experts.down)
    before, config = copy.deepcopy(model.state_dict()), model.config
    tokens = torch.randint(50, (2, 9))
    logits = model(tokens).logits
    layout.separate(model)
    assert model.config == mixture_model("separate", **expert).config
    assert model.state_dict().keys() == mixture_model("separate", **expert).state_dict().keys()
    torch.testing.assert_close(model(tokens).logits, logits, rtol=1e-6, atol=1e-6)
    layout.stack(model)
    assert model.config == config
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model(tokens).logits, logits)


def test_changed_layouts_keep_what_may_train_and_the_dtype():
    model = mixture_model("stacked").to(torch.bfloat16).requires_grad_(requires_grad=False).eval()
    for convert in (layout.separate, layout.stack):
        convert(model)
        parameters = list(model.blocks[1].feedforward.experts.parameters())
        assert {parameter.dtype for parameter in parameters} == {torch.bfloat16}
        assert not any(parameter.requires_grad for parameter in parameters)
        assert not any(module.training for module in model.modules())


def test_experts_that_differ_are_not_stacked():
    model = mixture_model("separate")
    config = model.config
    first, second = model.blocks[1].feedforward.experts, model.blocks[3].feedforward.experts
    second[2].up = Linear(WIDTH, 20, bias=False, std=0.02)
    with pytest.raises(UserError, match=r"blocks\.3\.feedforward\.experts\.2\.up is 20 x 16 and that of .* 24 x 16"):
        layout.stack(model)
    second[2].up = torch.nn.Identity()
    with pytest.raises(UserError, match=r"experts\.2\.up is stored as Identity: stack dense experts only"):
        layout.stack(model)
    assert model.config is config
    assert model.blocks[1].feedforward.experts is first


@pytest.mark.parametrize("which", ["stacked", "separate"])
def test_a_model_of_experts_is_compiled_by_blocks(which):
    torch._dynamo.reset()
    model = mixture_model(which, depth=2)
    tokens = torch.randint(50, (2, 9))
    plain = model(tokens, targets=tokens).loss
    plain.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    for block in model.blocks:
        block.compile(backend="aot_eager", dynamic=False, fullgraph=which == "stacked")
    loss = model(tokens, targets=tokens).loss
    loss.backward()
    torch.testing.assert_close(loss, plain)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_capacity_that_nothing_exceeds_is_dropless():
    model, roomy = mixture_model("stacked"), mixture_model("stacked")
    for number in (1, 3):
        spec = dataclasses.replace(model.config.layers[number].feedforward, capacity=Capacity(factor=float(COUNT)))
        roomy.blocks[number].feedforward.spec = spec
    tokens = torch.randint(50, (2, 9))
    plain = copy.deepcopy(model)
    layout.separate(plain)
    found = {}
    for name, each in (("dropless", model), ("capacity", roomy), ("eager", plain)):
        each.double()
        loss = each(tokens, targets=tokens).loss
        loss.backward()
        found[name] = [loss, *(p.grad for n, p in each.named_parameters() if ".experts." not in n)]
    for name in ("capacity", "eager"):
        torch.testing.assert_close(found[name], found["dropless"], rtol=1e-10, atol=1e-12)

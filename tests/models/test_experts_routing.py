"""Routing, balancing and capacity of experts against the papers' algorithms, `transformers`, and what must hold."""

import copy
import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import DeepseekV3Config, MixtralConfig, SwitchTransformersConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter, load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from models.attention.protocol import ForwardInputs
from models.checkpoint import load, save_model, writing
from models.config import ModelConfig
from models.errors import UserError
from models.experts import BALANCES, ROUTERS, Capacity
from models.experts.balancing import Routed
from models.specs import FEEDFORWARDS
from models.transformer import Transformer

WIDTH, COUNT = 16, 8
CONTEXT = ForwardInputs((), None, causal=True)
ROUTED = {"softmax": 2, "noisy_top_k": 3, "gshard": 2, "switch": 1, "sigmoid": 3, "expert_choice": 2}


def mixture(router="softmax", top_k=None, *, dtype=torch.float32, **more):
    """A mixture with a router that tells its experts apart."""
    torch.manual_seed(0)
    kind = router if isinstance(router, str) else router["kind"]
    values = {"kind": "experts", "count": COUNT, "expert": {"kind": "swiglu", "width": 12}, "router": router}
    spec = FEEDFORWARDS.parse(values | {"top_k": top_k or ROUTED[kind]} | more, "feedforward")
    module = spec.build(WIDTH, 1)
    with torch.no_grad():
        for parameter in module.router.parameters():
            parameter.normal_(std=0.5)
    return module.to(dtype)


def model(feedforward, **more):
    values = {"kind": "experts", "count": 4, "expert": {"kind": "swiglu", "width": 12}} | feedforward
    attention = {"kind": "full", "heads": 2}
    plain = {"vocab_size": 30, "width": WIDTH, "depth": 2, "context": 16, "attention": attention}
    torch.manual_seed(0)
    return Transformer(ModelConfig.from_dict(plain | {"feedforward": values} | more))


def inputs(*shape, seed=1, **options):
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed), **options)


def padded(rows=2, length=12):
    """Documents of which the first row ends, and the second begins, with padding."""
    documents = torch.zeros(rows, length, dtype=torch.int64)
    documents[0, -4:] = documents[1, :3] = -1
    return documents


def gshard(gates, places, uniform):
    """Algorithm 1 of arXiv 2006.16668 for one group: gates (S, E) -> combine weights (S, E) and the loss."""
    tokens, count = gates.shape
    combine, counters = torch.zeros_like(gates), [0] * count
    top = gates.topk(2, dim=-1)
    shares = top.values / top.values.sum(-1, keepdim=True)
    for s in range(tokens):
        e = int(top.indices[s, 0])
        if counters[e] < places:
            combine[s, e] = shares[s, 0]
        counters[e] += 1
    loss = sum(counters[e] / tokens * gates[:, e].mean() for e in range(count)) / count
    for s in range(tokens):
        e = int(top.indices[s, 1])
        if counters[e] < places and 2 * shares[s, 1] > uniform[s]:
            combine[s, e] = shares[s, 1]
        counters[e] += 1
    return combine, loss


def combined(module, x, context=CONTEXT):
    """Combine weights (N, E) of what a mixture sends to its experts."""
    sent = []
    handle = module.experts.register_forward_pre_hook(lambda _, args: sent.append(args[1]))
    module(x, context)
    handle.remove()
    (pairs,) = sent
    weights = torch.zeros(x.shape[0] * x.shape[1], COUNT + 1, dtype=pairs.weights.dtype)
    return weights.index_put((pairs.tokens, pairs.experts), pairs.weights)[:, :-1].detach()


@pytest.mark.parametrize("random", [True, False])
@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
def test_gshard_is_the_loop_of_the_paper(factor, random):
    router = {"kind": "gshard", "random_second": random}
    capacity, balance = {"factor": factor, "priority": "choice"}, [{"kind": "auxiliary", "choices": "first"}]
    module, x = mixture(router, capacity=capacity, balance=balance), inputs(1, 40)
    torch.manual_seed(3)
    ours = combined(module, x)
    torch.manual_seed(3)
    uniform = torch.rand(40, 2)[:, 1] if random else torch.zeros(40)
    gates = (x[0] @ module.router.projection.weight.T).softmax(-1).detach()
    theirs, loss = gshard(gates, math.ceil(factor * 40 * 2 / COUNT), uniform)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    torch.manual_seed(3)
    unweighted = module(x, CONTEXT).losses["balance"] / 0.01
    torch.testing.assert_close(unweighted, loss * COUNT**2, atol=1e-6, rtol=1e-6)
    dropped = 1 - (theirs > 0).sum() / 80
    torch.testing.assert_close(module.statistics.dropped, dropped)
    assert (dropped > 0) == (factor < 4 or random)


@pytest.mark.parametrize("places", [2, 3, 64])
def test_switch_is_that_of_transformers(places):
    config = SwitchTransformersConfig(
        d_model=WIDTH, d_ff=12, num_experts=COUNT, expert_capacity=places, router_jitter_noise=0.0, dropout_rate=0.0
    )
    theirs, x = SwitchTransformersSparseMLP(config), inputs(3, 20)
    factor = places * COUNT / 20
    expert = {"kind": "mlp", "width": 12, "activation": "relu", "bias": False, "out_bias": False}
    ours = mixture({"kind": "switch", "jitter": 0.0}, capacity={"factor": factor}, expert=expert, layout="separate")
    with torch.no_grad():
        ours.router.projection.weight.copy_(theirs.router.classifier.weight.normal_(std=0.5))
        for mine, their in zip(ours.experts, theirs.experts.values(), strict=True):
            mine.up.weight.copy_(their.wi.weight.normal_(std=0.3))
            mine.down.weight.copy_(their.wo.weight.normal_(std=0.3))
    expected = theirs.eval()(x)
    expected = expected[0] if isinstance(expected, tuple) else expected
    torch.testing.assert_close(ours(x, CONTEXT).y, expected, atol=1e-6, rtol=1e-5)
    assert (ours.statistics.dropped > 0) == (places < 20)


def test_softmax_router_and_its_loss_are_those_of_mixtral():
    config = MixtralConfig(hidden_size=WIDTH, num_local_experts=COUNT, num_experts_per_tok=2)
    theirs, ours, x = MixtralTopKRouter(config), mixture(), inputs(2, 12)
    with torch.no_grad():
        theirs.weight.copy_(ours.router.projection.weight)
    _logits, weights, chosen = theirs(x.view(-1, WIDTH))
    routing = ours.router(x)
    assert torch.equal(routing.chosen, chosen)
    torch.testing.assert_close(routing.weights, weights.to(routing.weights), atol=1e-6, rtol=1e-6)
    documents = padded()
    for mask in (None, (documents >= 0).long()):
        loss = load_balancing_loss_func((routing.logits,), COUNT, 2, mask)
        real = torch.ones(2, 12, dtype=torch.bool) if mask is None else mask.bool()
        mine = BALANCES["auxiliary"]().loss(Routed(routing, real, None))
        torch.testing.assert_close(mine, loss / 2, atol=1e-6, rtol=1e-6)  # theirs sums over both choices


@pytest.mark.parametrize("normalised", [True, False])
def test_sigmoid_router_is_that_of_deepseek_v3(normalised):
    config = DeepseekV3Config(
        hidden_size=WIDTH,
        moe_intermediate_size=12,
        n_routed_experts=COUNT,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        norm_topk_prob=normalised,
        routed_scaling_factor=2.5,
    )
    theirs, x = DeepseekV3MoE(config), inputs(2, 30)
    weights = "renormalised" if normalised else "probability"
    router = {"kind": "sigmoid", "groups": 4, "top_groups": 2, "weights": weights, "scale": 2.5}
    ours = mixture(router, balance=["bias"]).router
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.projection.weight)
        theirs.gate.e_score_correction_bias.copy_(ours.bias.normal_(std=0.3))
    chosen, weights = route(theirs, x)
    routing = ours(x)
    places = [
        scattered.zero_().scatter(1, c, w.float())
        for c, w, scattered in (
            (chosen, weights, torch.empty(60, COUNT)),
            (routing.chosen, routing.weights, torch.empty(60, COUNT)),
        )
    ]
    torch.testing.assert_close(places[1], places[0], atol=1e-6, rtol=1e-6)


def route(theirs, x):
    found = theirs.gate(x)
    if isinstance(found, tuple):
        return found[-1], found[-2]
    return theirs.route_tokens_to_experts(found)


def test_renormalised_weights_are_a_softmax_over_the_chosen_logits_and_probabilities_are_not():
    x = inputs(1, 9)
    renormalised, probability = (
        mixture({"kind": "softmax", "weights": w}).router(x) for w in ("renormalised", "probability")
    )
    chosen = renormalised.logits.gather(1, renormalised.chosen)
    torch.testing.assert_close(renormalised.weights, chosen.softmax(-1))
    torch.testing.assert_close(probability.weights, probability.logits.softmax(-1).gather(1, renormalised.chosen))


def test_noisy_load_is_how_often_an_expert_is_chosen_when_its_noise_is_drawn_again():
    module = mixture("noisy_top_k", dtype=torch.float64)
    x = inputs(1, 2, dtype=torch.float64)
    routing = module.router(x)
    scale = torch.nn.functional.softplus(module.router.noise(x[0]))
    torch.manual_seed(0)
    module.router(x)  # only the noise is drawn
    noisy = recover(module, x)
    load = module.router.load(routing.logits, noisy, scale)
    draws = torch.randn(40_000, 2, COUNT, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for expert in range(COUNT):
        again = noisy.expand(len(draws), -1, -1).clone()
        again[..., expert] = routing.logits[:, expert] + draws[..., expert] * scale[:, expert]
        share = (again.topk(3, dim=-1).indices == expert).any(-1).double().mean(0)
        torch.testing.assert_close(load[:, expert].detach(), share, atol=0.01, rtol=0)


def recover(module, x):
    """Scores with noise of a fixed draw."""
    scale = torch.nn.functional.softplus(module.router.noise(x[0]))
    noise = torch.randn(2, COUNT, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return (module.router.projection(x[0]) + noise * scale).detach()


def test_noise_is_of_training_alone_and_begins_even():
    spec = FEEDFORWARDS.parse(
        {"kind": "experts", "count": COUNT, "expert": {"kind": "swiglu", "width": 4}, "router": "noisy_top_k"}, ""
    )
    module, x = spec.build(WIDTH, 1), inputs(4, 500)
    assert not module.router.projection.weight.any()
    assert not module.router.noise.weight.any()
    module(x, CONTEXT)
    assert (module.statistics.load - 1 / COUNT).abs().max() < 0.02
    assert torch.equal(module.eval()(x, CONTEXT).y, module(x, CONTEXT).y)


@pytest.mark.parametrize("router", [{"kind": "softmax", "jitter": 0.3}, {"kind": "switch", "jitter": 0.3}])
def test_jitter_is_of_training_alone(router):
    module, x = mixture(router), inputs(2, 12)
    assert not torch.equal(module.router(x).logits, module.router(x).logits)
    plain = torch.nn.functional.linear(x.flatten(0, 1), module.router.projection.weight)
    assert torch.equal(module.eval().router(x).logits, plain)


def test_importance_and_load_are_squared_coefficients_of_variation():
    module, x = mixture("noisy_top_k", balance=["importance_and_load"]), inputs(2, 12)
    routing = module.router(x)
    real = padded() >= 0
    importance, load = torch.zeros(COUNT), torch.zeros(COUNT)
    for n in real.flatten().nonzero().flatten().tolist():
        importance.index_add_(0, routing.chosen[n], routing.weights[n].detach())
        load += routing.load[n].detach()
    expected = sum((v.std(correction=0) / v.mean()) ** 2 for v in (importance, load))
    found = BALANCES["importance_and_load"]().loss(Routed(routing, real, None))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def routed(logits, chosen, real=None):
    """As a router of these logits (N, E) and choices (N, k) leaves it."""
    routing = mixture().router(inputs(1, len(logits)))
    routing = routing._replace(logits=logits, probabilities=logits.softmax(-1), chosen=chosen)
    return Routed(routing, torch.ones(1, len(logits), dtype=torch.bool) if real is None else real, None)


@pytest.mark.parametrize("per", ["batch", "sequence"])
def test_auxiliary_loss_is_1_at_an_even_load_and_the_number_of_experts_when_it_collapses(per):
    loss = BALANCES["auxiliary"](per=per).loss
    each = torch.arange(16)[:, None] % COUNT
    torch.testing.assert_close(loss(routed(torch.zeros(16, COUNT), each)), torch.tensor(1.0))
    torch.testing.assert_close(
        loss(routed(torch.zeros(16, COUNT), torch.cat([each, (each + 3) % COUNT], 1))), torch.tensor(1.0)
    )
    collapsed = torch.zeros(16, COUNT)
    collapsed[:, 2] = 100.0
    torch.testing.assert_close(loss(routed(collapsed, torch.full((16, 1), 2))), torch.tensor(float(COUNT)))


def test_auxiliary_loss_per_sequence_is_the_mean_over_rows_without_padding():
    module, x, real = mixture(), inputs(2, 12), padded() >= 0
    routing = module.router(x)
    whole = BALANCES["auxiliary"](per="sequence").loss(Routed(routing, real, None))
    each = []
    for row in range(2):
        alone = module.router(x[row : row + 1, real[row]])
        each.append(BALANCES["auxiliary"]().loss(Routed(alone, real[row : row + 1, real[row]], None)))
    torch.testing.assert_close(whole, (each[0] + each[1]) / 2, atol=1e-6, rtol=1e-6)
    assert not torch.isclose(whole, BALANCES["auxiliary"]().loss(Routed(routing, real, None)))


@pytest.mark.parametrize("router", ["softmax", "expert_choice"])
def test_padding_is_not_dropped(router):
    """Shares are of the pairs, and of the tokens, that are no padding."""
    module, x, documents = mixture(router, top_k=COUNT if router == "expert_choice" else 2), inputs(2, 12), padded()
    for training in (True, False):
        module.train(training)(x, CONTEXT._replace(documents=documents))
        torch.testing.assert_close(module.statistics.dropped, torch.tensor(0.0))
        torch.testing.assert_close(module.statistics.load.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("kind", [{"kind": "auxiliary", "per": "sequence"}, "auxiliary", "z_loss"])
def test_a_row_that_is_all_padding_changes_no_loss(kind):
    module, x, real = mixture(), inputs(2, 12), padded() >= 0
    loss = BALANCES.parse(kind, "balance").loss
    more = torch.cat([x, inputs(1, 12, seed=5)]), torch.cat([real, torch.zeros(1, 12, dtype=torch.bool)])
    found = loss(Routed(module.router(more[0]), more[1], None))
    torch.testing.assert_close(found, loss(Routed(module.router(x), real, None)))
    nothing = loss(Routed(module.router(more[0][2:]), more[1][2:], None))
    assert nothing.item() == 0


def test_z_loss_is_the_mean_square_of_logsumexp_without_padding():
    routing, real = mixture().router(inputs(2, 12)), padded() >= 0
    expected = routing.logits[real.flatten()].exp().sum(-1).log().square().mean()
    torch.testing.assert_close(BALANCES["z_loss"]().loss(Routed(routing, real, None)), expected, atol=1e-6, rtol=1e-6)


def test_balance_over_a_step_counts_its_earlier_micro_batches():
    module = mixture(balance=[{"kind": "auxiliary", "over": "step", "weight": 1.0}])
    first, second = inputs(2, 12), inputs(2, 12, seed=9)
    module(first, CONTEXT)
    module.advance()
    losses = module(second, CONTEXT).losses
    counts = sum(
        Routed(module.router(x), torch.ones(2, 12, dtype=torch.bool), None).counts()[0] for x in (first, second)
    )
    mean = module.router(second).probabilities.mean(0)
    torch.testing.assert_close(losses["balance"], COUNT * (counts / counts.sum() * mean).sum())
    module.after_step()
    losses = module(second, CONTEXT).losses
    torch.testing.assert_close(losses["balance"], module.statistics.balance)


def test_losses_are_averaged_over_the_layers_that_have_experts():
    tokens = torch.randint(30, (2, 12), generator=torch.Generator().manual_seed(0))
    decoder = model({"balance": [{"kind": "auxiliary", "weight": 0.5}, {"kind": "z_loss", "weight": 0.1}]})
    found = decoder(tokens).losses
    assert set(found) == {"balance", "router_z"}
    mean = sum(block.feedforward.statistics.balance for block in decoder.blocks) / 2
    torch.testing.assert_close(found["balance"], 0.5 * mean)
    moe = {"kind": "experts", "count": 4, "expert": {"kind": "swiglu", "width": 12}, "balance": ["auxiliary"]}
    both = {"dense": {"kind": "swiglu", "width": 8}, "moe": moe}
    values = {"vocab_size": 30, "width": WIDTH, "depth": 3, "context": 16, "attention": {"kind": "full", "heads": 2}}
    values |= {"feedforward": both, "layers": ["dense", "moe", "dense"]}
    mixed = Transformer(ModelConfig.from_dict(values))
    alone = mixed(tokens).losses["balance"]  # one layer of three has experts
    torch.testing.assert_close(alone, 0.01 * mixed.blocks[1].feedforward.statistics.balance)
    assert decoder.eval()(tokens).losses == {}


def test_padding_is_no_part_of_losses_statistics_or_capacity():
    balance = ["auxiliary", "z_loss", "bias", {"kind": "auxiliary", "per": "sequence"}]
    module, x = mixture(balance=balance, capacity={"factor": 1.0, "per": "batch"}), inputs(2, 12)
    documents, other = padded(), x.clone()
    other[documents < 0] = inputs(7, seed=5)
    found = []
    for one in (x, other):
        y, losses, _ = module(one, CONTEXT._replace(documents=documents))
        found.append((y[documents >= 0], *losses.values(), *module.statistics, module._counts))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert module._counts.sum() == 2 * 17


def plain_capacity(chosen, probabilities, places, priority):
    """Which pairs (T, k) of one group are kept, one after another."""
    tokens, k = chosen.shape
    pairs = [(t, j) for t in range(tokens) for j in range(k)]
    if priority == "choice":
        pairs = [(t, j) for j in range(k) for t in range(tokens)]
    if priority == "probability":
        pairs.sort(key=lambda pair: -probabilities[pair].item())
    taken, kept = [0] * COUNT, torch.zeros_like(chosen, dtype=torch.bool)
    for pair in pairs:
        expert = int(chosen[pair])
        kept[pair] = taken[expert] < places
        taken[expert] += 1
    return kept


@pytest.mark.parametrize("per", ["sequence", "batch"])
@pytest.mark.parametrize("priority", ["token", "choice", "probability"])
def test_capacity_is_what_a_queue_would_leave(priority, per):
    routing = mixture().router(inputs(3, 20))
    chosen = routing.chosen.view(3, 20, 2)
    probabilities = routing.probabilities.gather(1, routing.chosen).view(3, 20, 2)
    capacity = Capacity(factor=0.7, per=per, priority=priority)
    kept = capacity.keep(chosen, probabilities, None, COUNT)
    groups = [(3, 20)] if per == "batch" else [(1, 20)] * 3
    begin, expected = 0, []
    for rows, length in groups:
        mine = slice(begin, begin + rows)
        places = math.ceil(0.7 * rows * length * 2 / COUNT)
        expected.append(plain_capacity(chosen[mine].flatten(0, 1), probabilities[mine].flatten(0, 1), places, priority))
        begin += rows
    assert torch.equal(kept.flatten(0, 1), torch.cat(expected))
    assert not kept.all()
    assert kept.any()


def test_places_are_rounded_up_and_at_least_1():
    assert Capacity(factor=1.25).places(64, 12, 1) == 7
    assert Capacity(factor=1.0).places(64, 8, 1) == 8
    assert Capacity(factor=0.01).places(8, 8, 1) == 1


def test_dropped_tokens_pass_by_and_evaluation_drops_nothing():
    module, x = mixture(capacity={"factor": 0.25}), inputs(2, 16)
    y = module(x, CONTEXT).y
    weights = combined(module, x)
    nothing = ~weights.any(-1).view(2, 16)
    assert nothing.any()
    assert not y[nothing].any()
    assert module.statistics.dropped > 0.5
    module.eval()
    plain = mixture()
    torch.testing.assert_close(module(x, CONTEXT).y, plain.eval()(x, CONTEXT).y)
    assert module.statistics.dropped == 0


def test_a_capacity_that_nothing_exceeds_changes_neither_outputs_nor_gradients():
    found = []
    for capacity in (None, {"factor": COUNT}):
        module, x = mixture(capacity=capacity), inputs(2, 12).requires_grad_()
        module(x, CONTEXT).y.square().sum().backward()
        found.append([x.grad, *(parameter.grad for parameter in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("router", ["softmax", "switch", "sigmoid"])
def test_no_later_token_changes_a_route_where_earlier_ones_come_first(router):
    """To the bit, in evaluation and in training with experts that overflow; in what they compute, but for rounding."""
    router = {"kind": router, "jitter": 0.0} if router == "switch" else router
    module, x = mixture(router, capacity={"factor": 0.5}), inputs(2, 16)
    for training in (True, False):
        module.train(training)
        routes, before = combined(module, x).view(2, 16, -1), module(x, CONTEXT).y
        assert (module.statistics.dropped > 0.2) == training
        for t in (3, 9, 15):
            changed = x.clone()
            changed[:, t:] = inputs(2, 16 - t, seed=t)
            assert torch.equal(combined(module, changed).view(2, 16, -1)[:, :t], routes[:, :t])
            torch.testing.assert_close(module(changed, CONTEXT).y[:, :t], before[:, :t], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("priority", ["choice", "probability"])
def test_with_the_other_priorities_a_later_token_can_take_an_earlier_ones_place(priority):
    module, x = mixture(capacity={"factor": 0.5, "priority": priority}), inputs(2, 16)
    before, moved = combined(module, x).view(2, 16, -1)[:, :8], False
    for seed in range(20):
        changed = x.clone()
        changed[:, 8:] = 3 * inputs(2, 8, seed=seed)
        moved |= not torch.equal(combined(module, changed).view(2, 16, -1)[:, :8] > 0, before > 0)
    assert moved


def test_the_bias_chooses_and_does_not_weigh():
    module, x = mixture("sigmoid", balance=["bias"], dtype=torch.bfloat16), inputs(2, 12)
    assert module.router.bias.dtype == torch.float32
    module.router.bias[5] = 10.0
    routing = module.router(x)
    assert (routing.chosen == 5).any(1).all()
    weights = routing.logits.sigmoid().gather(1, routing.chosen)
    torch.testing.assert_close(routing.weights, weights / weights.sum(1, keepdim=True))


def test_the_bias_moves_against_the_load_of_the_whole_step():
    module = mixture(balance=[{"kind": "bias", "rate": 0.01}])
    counts = torch.zeros(COUNT)
    for seed in (1, 2):
        x = inputs(2, 12, seed=seed)
        module.advance()  # as the model does before each forward
        module(x, CONTEXT)
        counts += torch.bincount(module.router(x).chosen.flatten(), minlength=COUNT)
    assert not module.router.bias.any()
    module.after_step()
    torch.testing.assert_close(module.router.bias, 0.01 * (counts.mean() - counts).sign())
    moved = module.router.bias.clone()
    module.after_step()  # nothing was counted since
    assert torch.equal(module.router.bias, moved)


def test_the_bias_moves_against_the_load_of_all_devices(monkeypatch):
    """The load is even on both devices together, on neither alone."""
    module, x = mixture(balance=[{"kind": "bias", "rate": 0.01}]), inputs(2, 12)
    module(x, CONTEXT)
    counts = torch.bincount(module.router(x).chosen.flatten(), minlength=COUNT).float()
    theirs = counts.max() + 1 - counts
    theirs[2] += 3
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda mine: mine.add_(theirs))
    module.after_step()
    expected = torch.full((COUNT,), 0.01)
    expected[2] = -0.01
    torch.testing.assert_close(module.router.bias, expected)


def test_the_bias_evens_out_the_load():
    module, x = mixture(balance=[{"kind": "bias", "rate": 0.02}]), inputs(8, 32)
    with torch.no_grad():
        module(x, CONTEXT)
        uneven = module.statistics.load.max()
        for _ in range(60):
            module(x, CONTEXT)
            module.after_step()
        module(x, CONTEXT)
    assert module.statistics.load.max() < 1.25 / COUNT < uneven


def step(decoder, tokens):
    """Losses, statistics, counts and gradients of one training step of two micro-batches."""
    found = []
    for micro_batch in tokens:
        output = decoder(micro_batch, targets=micro_batch)
        (output.loss + sum(output.losses.values())).backward()
        for block in decoder.blocks:
            found += [*block.feedforward.statistics]
        found += [output.loss, *output.losses.values()]
    for block in decoder.blocks:
        block.feedforward.advance()
        found.append(block.feedforward._seen)
        block.feedforward.after_step()
        found.append(block.feedforward.router.bias)
    return [one.detach().clone() for one in found] + [parameter.grad for parameter in decoder.parameters()]


MIXTURES = {
    "switch": {"router": "switch", "top_k": 1},
    "gshard": {"router": "gshard", "capacity": {"factor": 0.8, "priority": "choice"}},
    "softmax": {"router": {"kind": "softmax", "jitter": 0.1}, "capacity": {"factor": 0.8, "priority": "probability"}},
    "noisy": {"router": "noisy_top_k"},
}


@pytest.mark.parametrize("name", MIXTURES)
def test_nothing_is_counted_twice_where_activations_are_computed_again(name):
    balance = [{"kind": "auxiliary", "over": "step"}, "z_loss", "bias"]
    plain = model(MIXTURES[name] | {"balance": balance})
    again = copy.deepcopy(plain)
    tokens = torch.randint(30, (2, 2, 12), generator=torch.Generator().manual_seed(0))
    for block in again.blocks:
        whole = block.feedforward.forward
        block.feedforward.forward = lambda x, context, whole=whole: checkpoint(whole, x, context, use_reentrant=False)
    torch.manual_seed(1)
    expected = step(plain, tokens)
    torch.manual_seed(1)
    for mine, theirs in zip(step(again, tokens), expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=0, rtol=0)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_reversible_model_chooses_once(name):
    """What it computes again is rounded otherwise: near ties must not turn over."""
    decoder = model(MIXTURES[name] | {"balance": ["auxiliary", "bias"]}, residual="reversible").double()
    tokens = torch.randint(30, (2, 12), generator=torch.Generator().manual_seed(0))
    grads = []
    for taps in ((), ("blocks.0",)):  # with a tap, all activations are kept
        decoder.zero_grad()
        torch.manual_seed(1)
        output = decoder(tokens, targets=tokens, taps=taps)
        before = [block.feedforward._counts.clone() for block in decoder.blocks]
        (output.loss + sum(output.losses.values())).backward()
        assert all(torch.equal(b.feedforward._counts, c) for b, c in zip(decoder.blocks, before, strict=True))
        grads.append([parameter.grad.clone() for parameter in decoder.parameters()])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-10)


def test_a_recomputation_repeats_the_decision_that_it_is_told():
    module = mixture(capacity={"factor": 0.5})
    x, other = inputs(2, 12), inputs(2, 12, seed=4)
    context = CONTEXT._replace(state=module(x, CONTEXT._replace(recomputed=True)).state)
    first = combined(module, x, context) > 0
    assert torch.equal(combined(module, other, context) > 0, first)
    assert not torch.equal(combined(module, other) > 0, first)


@pytest.mark.parametrize("router", ["softmax", "noisy_top_k", "gshard", "switch", "sigmoid"])
def test_gradients_of_fixed_choices_are_those_of_finite_differences(router):
    """In training, with all losses; the choices of a first forward are repeated, so nothing jumps."""
    balance = [{"kind": "auxiliary", "weight": 0.3}, {"kind": "z_loss", "weight": 0.2}]
    balance += ["importance_and_load"] if router == "noisy_top_k" else []
    spec = {"kind": "switch", "jitter": 0.0} if router == "switch" else router
    module = mixture(spec, dtype=torch.float64, balance=balance, capacity={"factor": 0.8})
    x = inputs(1, 6, dtype=torch.float64).requires_grad_()
    torch.manual_seed(2)
    context = CONTEXT._replace(state=module(x, CONTEXT._replace(recomputed=True)).state)

    def run(x, *_):
        torch.manual_seed(2)
        y, losses, _ = module(x, context)
        return y, sum(losses.values())

    assert torch.autograd.gradcheck(run, (x, *module.parameters()), fast_mode=True)


def test_the_router_is_exact_in_a_small_dtype_and_under_autocast():
    module, x = mixture(dtype=torch.bfloat16), inputs(2, 12).bfloat16()
    expected = (x.float() @ module.router.projection.weight.float().T).flatten(0, 1)
    assert torch.equal(module.router(x).logits, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.router(x).logits, expected)
        assert module.router(x).weights.dtype == torch.float32
    assert module(x, CONTEXT).y.dtype == torch.bfloat16


def test_statistics_are_those_of_the_pairs():
    module, x = mixture(), inputs(2, 12)
    routing = module.router(x)
    module(x, CONTEXT)
    load = torch.bincount(routing.chosen.flatten(), minlength=COUNT) / 48
    torch.testing.assert_close(module.statistics.load, load)
    entropy = torch.distributions.Categorical(probs=routing.probabilities.detach()).entropy().mean()
    torch.testing.assert_close(module.statistics.entropy, entropy)
    assert not any(one.requires_grad for one in module.statistics)


def test_switch_starts_small_and_truncated():
    spec = ROUTERS.parse({"kind": "switch"}, "router")
    weight = spec.build(400, 50, 1, biased=False).projection.weight
    std = (0.1 / 400) ** 0.5
    assert weight.abs().max() <= 2 * std
    assert 0.8 * std < weight.std() < 0.95 * std  # truncation takes 12 %


def test_expert_choice_gives_every_expert_the_best_tokens_of_a_row():
    module, x = mixture("expert_choice"), inputs(2, 12)
    documents = padded()
    weights = combined(module, x, CONTEXT._replace(documents=documents)).view(2, 12, COUNT)
    scores = (x @ module.router.projection.weight.T).softmax(-1).detach()
    for row in range(2):
        real = documents[row] >= 0
        places = math.ceil(int(real.sum()) * 2 / COUNT)
        for expert in range(COUNT):
            mine = scores[row, :, expert].masked_fill(~real, -1)
            best = mine.topk(places).indices
            expected = torch.zeros(12).index_put((best,), scores[row, best, expert])
            torch.testing.assert_close(weights[row, :, expert], expected)
    assert module.statistics.load.std() < 1e-6
    assert 0 <= module.statistics.dropped < 1


def test_a_compiled_training_step_counts_and_loses_what_the_eager_one_does():
    balance = [{"kind": "auxiliary", "over": "step"}, "z_loss", "bias"]
    eager = model(MIXTURES["gshard"] | {"balance": balance}, depth=1)
    compiled, found = copy.deepcopy(eager), []
    torch.compiler.reset()
    for block in compiled.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    tokens = torch.randint(30, (2, 2, 12), generator=torch.Generator().manual_seed(0))
    for decoder in (eager, compiled):
        torch.manual_seed(1)
        found.append(step(decoder, tokens))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_deepnorm_draws_stacked_experts_as_separate_ones():
    found = []
    for layout in ("stacked", "separate"):
        norm, expert = {"kind": "layer", "position": "deepnorm"}, {"kind": "swiglu", "width": 300}
        experts = model({"layout": layout, "expert": expert}, norm=norm).blocks[0].feedforward.experts
        down = experts.down if layout == "stacked" else torch.stack([expert.down.weight for expert in experts])
        found.append(down.std())
    torch.testing.assert_close(*found, rtol=0.05, atol=0)
    assert abs(found[0] / (16**-0.25 * (2 / 316) ** 0.5) - 1) < 0.05


def test_a_folder_in_bf16_keeps_the_bias_exact(tmp_path):
    decoder = model({"balance": ["bias"]}).bfloat16()
    for block in decoder.blocks:
        block.feedforward.router.bias.fill_(0.1 + 1e-5)
    with writing(tmp_path / "m") as directory:
        save_model(decoder, directory)
    again = load(tmp_path / "m", dtype=torch.bfloat16)
    for block in again.blocks:
        assert torch.equal(block.feedforward.router.bias, torch.full((4,), 0.1 + 1e-5))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": 5}, "top_k must be from 1 to the 4 experts that there are, got 5"),
        ({"count": 1, "top_k": 1}, "at least 2 experts"),
        ({"capacity": {"factor": 0.0}}, "capacity factor must be above 0"),
        ({"capacity": {"factor": 0.01}}, "less than one of a sequence's 16 tokens"),
        ({"capacity": {"priority": "tokens"}}, "did you mean 'token'"),
        ({"capacity": 1.25}, "capacity: expected its keys"),
        ({"router": "switch"}, "give top_k: 1, not 2"),
        ({"router": "gshard", "top_k": 3}, "give top_k: 2, not 3"),
        ({"router": "noisy_top_k", "top_k": 1}, "at least 2 experts"),
        ({"router": {"kind": "sigmoid", "groups": 3}}, "do not divide into 3 equal groups"),
        ({"router": {"kind": "sigmoid", "groups": 2}, "top_k": 3}, "hold only 2 experts"),
        ({"router": {"kind": "softmax", "weights": "raw"}}, "renormalised or probability"),
        ({"router": {"kind": "switch", "jitter": 2.0}, "top_k": 1}, "jitter must be"),
        ({"router": "expert_choice"}, "cannot be causal: an expert takes the best tokens of a whole sequence"),
        ({"router": "expert_choice", "balance": ["auxiliary"]}, "all experts have the same load; leave it out"),
        ({"router": "expert_choice", "capacity": {}}, "knows no other capacity"),
        ({"balance": ["importance_and_load"]}, "only router 'noisy_top_k' has"),
        ({"balance": ["bias", "bias"]}, "one bias is enough"),
        ({"balance": "auxiliary"}, "balance: expected a list such as"),
        ({"balance": [{"kind": "auxiliary", "weight": -1.0}]}, r"balance\[0\]: the weight of a balance"),
        ({"balance": [{"kind": "auxiliary", "over": "step", "per": "sequence"}]}, "counted per batch"),
        ({"expert": {"kind": "experts", "count": 2, "expert": {"kind": "mlp", "width": 4}}}, "is a swiglu or mlp"),
        ({"layout": "stack"}, "did you mean 'stacked'"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(values, message):
    with pytest.raises(UserError, match=message):
        model(values)

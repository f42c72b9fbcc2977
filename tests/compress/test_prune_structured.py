"""Structured pruning: equal to zero-masking, really smaller, config true, compensation exact, refusals in words."""

import copy
import itertools

import pytest
import torch
import torch_pruning as tp

from compress.calibration.store import FolderStore
from compress.pruning.structured import surgery
from compress.pruning.structured.allocation import Global
from compress.pruning.structured.importance import IMPORTANCES, GroupMoments, WeightNorm
from compress.pruning.structured.sequential import Structured, prune_structured
from models.checkpoint import load, save_model
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer

LLAMA = {"kind": "swiglu", "width": 48}
BIASED = {"kind": "swiglu", "width": 48, "bias": True, "out_bias": True}
GPT = {"kind": "mlp", "width": 48}
GQA = {"kind": "full", "heads": 8, "kv_heads": 4, "head_width": 6}
GQA_BIASED = {**GQA, "bias": True, "out_bias": True}


def tiny(attention=GQA, feedforward=LLAMA, seed=0, **changes):
    torch.manual_seed(seed)
    values = {"vocab_size": 50, "width": 32, "depth": 3, "attention": attention, "feedforward": feedforward, **changes}
    model = Transformer(ModelConfig.from_dict(values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # biases and norms that do something
    return model.eval()


def tokens(count=3, rows=2, length=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 50, (count, rows, length + 1), generator=generator)
    return [{"tokens": row[:, :-1], "targets": row[:, 1:]} for row in drawn]


def kept_rows(old, new):
    """Index in `old` of every row of `new`; rows are all different."""
    return [int((old == row).all(dim=1).nonzero()[0]) for row in new]


CASES = [
    (GQA, LLAMA, ["neurons"], "rope"),
    (GQA, LLAMA, ["groups"], "rope"),
    (GQA, LLAMA, ["heads"], "rope"),
    (GQA_BIASED, BIASED, ["neurons", "heads", "groups"], "rope"),
    (GQA_BIASED, GPT, ["groups", "neurons"], "learned"),
    ({"kind": "full", "heads": 4}, GPT, ["heads", "neurons"], "learned"),
    ({**GQA, "kind": "window", "window": 5, "qk_norm": "rms"}, LLAMA, ["heads", "neurons"], "rope"),
    (GQA, LLAMA, ["neurons"], "alibi"),
]


@pytest.mark.parametrize(("attention", "feedforward", "targets", "position"), CASES)
@pytest.mark.parametrize("criterion", sorted(IMPORTANCES))
def test_the_pruned_forward_equals_the_zero_masked_one(attention, feedforward, targets, position, criterion):
    dense, pruned = (tiny(attention, feedforward, position=position) for _ in range(2))
    prune_structured(pruned, targets, 0.5, criterion, tokens(), compensation="none")
    with torch.no_grad():
        for old, new in zip(dense.blocks, pruned.blocks, strict=True):
            gone = torch.ones(48, dtype=torch.bool)
            gone[kept_rows(old.feedforward.up.weight, new.feedforward.up.weight)] = False
            old.feedforward.down.weight[:, gone] = 0
            gone = torch.ones(old.attention.q.out_features, dtype=torch.bool)
            gone[kept_rows(old.attention.q.weight, new.attention.q.weight)] = False
            old.attention.o.weight[:, gone] = 0
        data = tokens(seed=1)[0]["tokens"]
        torch.testing.assert_close(pruned(data).logits, dense(data).logits, rtol=0, atol=1e-5)


def unit_weights(block, kind):
    """The weights that go with each unit, in pieces, as slices of the block's matrices: unit -> [(matrix, index)]."""
    feedforward, attention = block.feedforward, block.attention
    if kind == "neurons":
        writes = [m for m in (getattr(feedforward, "gate", None), feedforward.up) if m is not None]
        return [[(m, (j,)) for m in writes] + [(feedforward.down, (slice(None), j))] for j in range(48)]
    width, per_group = attention.head_width, attention.heads // attention.kv_heads

    def rows(unit, count=1):
        return slice(unit * count * width, (unit + 1) * count * width)

    if kind == "heads":
        return [[(attention.q, (rows(h),)), (attention.o, (slice(None), rows(h)))] for h in range(attention.heads)]
    return [
        [
            *((attention.q, (rows(g, per_group),)), (attention.o, (slice(None), rows(g, per_group)))),
            *((attention.k, (rows(g),)), (attention.v, (rows(g),))),
        ]
        for g in range(attention.kv_heads)
    ]


def independent_scores(model, dense, index, kind, criterion, data):
    """Scores of one kind of unit in block `index`, computed anew from what the criterion is defined as.

    Args:
        model: with the blocks before that one pruned, where the criterion looks at activations.
        dense: the model before any of it, of which Taylor's and magnitude's scores are.
    """
    if criterion == "magnitude":
        units = unit_weights(dense.blocks[index], kind)
        return [sum(float(m.weight[place].detach().square().sum()) for m, place in unit) ** 0.5 for unit in units]
    if criterion == "taylor":
        units = unit_weights(dense.blocks[index], kind)
        scores = torch.zeros(len(units))
        for batch in data:
            dense.zero_grad()
            dense(batch["tokens"], targets=batch["targets"]).loss.backward()
            for number, unit in enumerate(units):
                scores[number] += abs(sum(float((m.weight[p].detach() * m.weight.grad[p]).sum()) for m, p in unit))
        return scores.tolist()
    reads = model.blocks[index].feedforward.down if kind == "neurons" else model.blocks[index].attention.o
    seen = []
    handle = reads.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().flatten(0, 1)))
    with torch.no_grad():
        for batch in data:
            model(batch["tokens"])
    handle.remove()
    x, scores = torch.cat(seen), []  # (N, K)
    for unit in unit_weights(model.blocks[index], kind):
        (place,) = (p[1] for m, p in unit if m is reads)
        part = slice(place, place + 1) if isinstance(place, int) else place
        moved = x[:, part] @ reads.weight[:, part].detach().T  # what the unit adds to the sub-layer's output
        moved = moved - moved.mean(0) if criterion == "variance" else moved
        scores.append(float(moved.square().sum(1).mean()))
    return scores


def strongest(scores, count):
    """Numbers of the `count` largest scores, ascending."""
    return sorted(sorted(range(len(scores)), key=lambda unit: -scores[unit])[:count])


@pytest.mark.parametrize("feedforward", [LLAMA, GPT], ids=["gated", "plain"])
@pytest.mark.parametrize("targets", [["neurons", "heads", "groups"], ["heads"], ["groups"]], ids=", ".join)
@pytest.mark.parametrize("criterion", sorted(IMPORTANCES))
def test_the_units_that_stay_are_the_strongest_by_the_criterion(criterion, targets, feedforward):
    """Heads within each group that stays, wherever that lies; a block sees what the pruned ones before it give."""
    attention, data = {"kind": "full", "heads": 12, "kv_heads": 4, "head_width": 4}, tokens()
    dense, pruned = (tiny(attention, feedforward, seed=3) for _ in range(2))
    prune_structured(pruned, targets, {target: 0.5 if target != "heads" else 1 / 3 for target in targets}, criterion,
                     data, compensation="none")  # fmt: skip
    for index in range(3):
        model = copy.deepcopy(dense)
        for before in range(index):
            model.blocks[before] = pruned.blocks[before]
        groups, heads = range(4), range(12)
        old, new = dense.blocks[index], pruned.blocks[index]
        if "neurons" in targets:
            kept = strongest(independent_scores(model, dense, index, "neurons", criterion, data), 24)
            assert torch.equal(new.feedforward.up.weight, old.feedforward.up.weight[kept])
            assert torch.equal(new.feedforward.down.weight, old.feedforward.down.weight[:, kept])
        if "groups" in targets:
            groups = strongest(independent_scores(model, dense, index, "groups", criterion, data), 2)
        if "heads" in targets:
            scores = independent_scores(model, dense, index, "heads", criterion, data)
            heads = [3 * g + r for g in range(4) for r in strongest(scores[3 * g : 3 * g + 3], 2)]
        kept = [h for h in heads if h // 3 in groups]
        assert torch.equal(new.attention.q.weight.view(-1, 4, 32), old.attention.q.weight.view(12, 4, 32)[kept])
        assert torch.equal(new.attention.o.weight.view(32, -1, 4), old.attention.o.weight.view(32, 12, 4)[:, kept])
        for name in ("k", "v"):
            mine, theirs = (getattr(block.attention, name).weight.view(-1, 4, 32) for block in (new, old))
            assert torch.equal(mine, theirs[list(groups)])


@pytest.mark.parametrize("criterion", ["magnitude", "taylor"])
def test_scores_are_those_of_all_weights_of_a_unit(criterion):
    """Of the dense model: keys and values count in those of their group."""
    data, dense = tokens(), tiny(GQA_BIASED, BIASED)
    importance = IMPORTANCES.parse(criterion, "criterion").prepare(dense, data)
    for index, block in enumerate(dense.blocks):
        found = {
            "neurons": importance.neurons(index, block.feedforward, None),
            "heads": importance.heads(index, block.attention, None).flatten(),
            "groups": importance.groups(index, block.attention, None),
        }
        for kind, scores in found.items():
            expected = torch.tensor(independent_scores(dense, dense, index, kind, criterion, data))
            expected = expected / len(data) if criterion == "taylor" else expected
            torch.testing.assert_close(scores.detach(), expected, rtol=1e-3, atol=1e-6)


def test_tensors_config_and_cache_shrink_by_the_ratio(tmp_path):
    model = tiny(GQA_BIASED, BIASED)
    before = model.cache_bytes(1, torch.float32), model.count_parameters()["total"]
    records = prune_structured(model, ["neurons", "groups"], 0.5, "variance", tokens())
    assert model.cache_bytes(1, torch.float32) == before[0] // 2
    assert model.new_cache(1, 4).layers[0].keys.shape == (1, 2, 4, 6)
    layer = model.config.layers[1]
    assert (layer.attention.heads, layer.attention.kv_heads, layer.feedforward.width) == (4, 2, 24)
    assert len(set(model.config.layers)) == 1
    assert model.blocks[0].attention.q.weight.shape == (24, 32)
    assert model.blocks[0].attention.o.weight.shape == (32, 24)
    assert model.blocks[0].feedforward.gate.bias.shape == (24,)
    assert model.count_parameters()["total"] == sum(p.numel() for p in model.parameters()) < before[1]
    cache = [record.achieved["cache_bytes_per_token"] for record in records if record.name.endswith((".k", ".v"))]
    assert sum(old for old, _ in cache) == before[0]
    assert sum(new for _, new in cache) == before[0] // 2
    save_model(model, tmp_path)
    data = tokens()[0]["tokens"]
    assert torch.equal(load(tmp_path)(data).logits, model(data).logits)


def test_records_hold_what_was_asked_and_what_came_out():
    model = tiny()
    records = {r.name: r for r in prune_structured(model, ["neurons"], 0.4, "magnitude", round_to=8)}
    up = records["blocks.0.feedforward.up"]
    assert up.shape == (48, 32)
    assert up.requested["ratio"] == 0.4
    assert up.achieved["neurons"] == [48, 32]
    assert up.achieved["shape"] == [32, 32]
    assert up.achieved["ratio"] == pytest.approx(1 / 3)
    assert "multiple of 8" in up.note
    assert 0 < up.error < 0.4
    assert records["blocks.0.attention.q"].skipped
    assert "not a target" in records["blocks.0.attention.q"].note
    assert "residual" in records["embedding"].note
    assert len(records) == 3 * 7 + 1


def test_query_heads_leave_every_group_alike_and_the_cache_stays():
    model = tiny({"kind": "full", "heads": 8, "kv_heads": 2, "head_width": 4})
    cache = model.cache_bytes(1)
    records = {r.name: r for r in prune_structured(model, ["heads"], 0.25, "magnitude")}
    assert (model.blocks[0].attention.heads, model.blocks[0].attention.kv_heads) == (6, 2)
    assert model.cache_bytes(1) == cache
    assert records["blocks.0.attention.k"].skipped
    assert records["blocks.0.attention.q"].achieved["heads"] == [8, 6]


def test_the_weakest_units_go():
    model = tiny()
    with torch.no_grad():
        model.blocks[1].feedforward.down.weight[:, [3, 20]] *= 1e-3
        model.blocks[1].attention.o.weight.view(32, 4, 12)[:, 2] *= 1e-3
    for criterion in ("variance", "norm", "taylor"):
        pruned = copy.deepcopy(model)
        prune_structured(pruned, ["neurons", "groups"], {"neurons": 2 / 48, "groups": 0.25}, criterion, tokens())
        old, new = model.blocks[1], pruned.blocks[1]
        assert set(range(48)) - set(kept_rows(old.feedforward.up.weight, new.feedforward.up.weight)) == {3, 20}
        assert torch.equal(new.attention.k.weight, old.attention.k.weight.view(4, 6, 32)[[0, 1, 3]].flatten(0, 1))


@pytest.mark.parametrize("compensation", ["existing", "add"])
def test_compensation_is_exact_where_the_removed_activation_is_constant(compensation):
    """Neurons that see only their bias are constant: their mean moves into the next bias and nothing changes."""
    has = compensation == "existing"
    model = tiny(feedforward={"kind": "mlp", "width": 48, "bias": True, "out_bias": has})
    with torch.no_grad():
        for block in model.blocks:
            block.feedforward.up.weight[::2] = 0
            block.feedforward.up.bias[::2] = torch.rand(24) + 1
    pruned, without = copy.deepcopy(model), copy.deepcopy(model)
    records = prune_structured(pruned, ["neurons"], 0.5, "variance", tokens(), compensation=compensation)
    prune_structured(without, ["neurons"], 0.5, "variance", tokens(), compensation="none")
    data = tokens(seed=5)[0]["tokens"]
    torch.testing.assert_close(pruned(data).logits, model(data).logits, rtol=0, atol=1e-5)
    assert (without(data).logits - model(data).logits).abs().max() > 1e-2
    assert pruned.config.layers[0].feedforward.out_bias
    added = [record.name for record in records if "bias was added" in record.note]
    assert len(added) == (0 if has else 3)
    assert all(name.endswith("feedforward.down") for name in added)


def test_compensation_of_heads_lowers_the_error():
    model = tiny(GQA_BIASED)
    with torch.no_grad():
        for block in model.blocks:
            block.attention.v.bias += 2.0
    errors = []
    for compensation in ("existing", "none"):
        pruned = copy.deepcopy(model)
        prune_structured(pruned, ["groups"], 0.5, "variance", tokens(), compensation=compensation)
        data = tokens(seed=5)[0]["tokens"]
        with torch.no_grad():
            errors.append(float((pruned(data).logits - model(data).logits).square().mean()))
    assert errors[0] < 0.5 * errors[1]


def test_global_allocation_takes_more_where_less_matters():
    model = tiny()
    with torch.no_grad():
        model.blocks[2].feedforward.down.weight[:, 10:] *= 1e-3
    prune_structured(model, ["neurons", "groups"], 0.25, "variance", tokens(), allocation="global")
    widths = [layer.feedforward.width for layer in model.config.layers]
    assert sum(widths) == 3 * 36
    assert widths[2] < min(widths[:2])
    assert sum(layer.attention.kv_heads for layer in model.config.layers) == 9


def test_global_allocation_compares_scores_with_the_mean_of_their_block():
    """Whatever their scale: 3 of 8 units go, those furthest below the mean of their own block."""
    scores = {0: torch.tensor([1.0, 5.0, 6.0, 8.0]), 1: torch.tensor([1.0, 2.0, 3.0, 14.0])}  # means of 5
    for first, second in itertools.product((1e-3, 1.0, 1e4), repeat=2):
        scaled = {0: first * scores[0], 1: second * scores[1]}
        assert Global().keep({0: 4, 1: 4}, 3 / 8, 1, lambda scaled=scaled: scaled) == {0: 3, 1: 2}
    assert Global().keep({0: 4, 1: 4}, 5 / 8, 2, lambda: scores) == {0: 2, 1: 2}  # 2 and 1, in twos
    assert Global().keep({0: 4, 1: 4}, 1.0, 1, lambda: scores) == {0: 0, 1: 0}
    flat = {0: torch.full((4,), 9.0), 1: torch.tensor([0.0, 0.0, 0.0, 1.0])}
    assert Global().keep({0: 4, 1: 4}, 3 / 8, 1, lambda: flat) == {0: 4, 1: 1}


def test_weight_norm_ranks_as_torch_pruning_does():
    feedforward = tiny(feedforward=BIASED).blocks[0].feedforward
    graph = tp.DependencyGraph().build_dependency(feedforward, example_inputs=torch.zeros(1, 2, 32))
    group = graph.get_pruning_group(feedforward.down, tp.prune_linear_in_channels, list(range(48)))
    theirs = tp.importance.GroupMagnitudeImportance(p=2, group_reduction="sum", normalizer=None)(group)
    ours = WeightNorm().neurons(0, feedforward, None)
    torch.testing.assert_close(ours.square(), theirs.detach(), rtol=1e-5, atol=1e-6)


def test_taylor_is_the_gradient_of_scaling_a_unit_away():
    """|sum g w| over the rows that write a unit and the columns that read it, against finite differences."""
    model = tiny(position="none").double()
    batch = tokens(count=1)
    taylor = IMPORTANCES.parse("taylor", "criterion").prepare(model, batch)

    def loss(factor, neuron):
        changed = copy.deepcopy(model)
        feedforward = changed.blocks[1].feedforward
        with torch.no_grad():
            for weight in (feedforward.gate.weight[neuron], feedforward.up.weight[neuron]):
                weight.mul_(factor)
            feedforward.down.weight[:, neuron].mul_(factor)
            return float(changed(batch[0]["tokens"], targets=batch[0]["targets"]).loss)

    for neuron in (0, 17, 40):
        slope = (loss(1 + 1e-5, neuron) - loss(1 - 1e-5, neuron)) / 2e-5
        score = float(taylor.neurons(1, model.blocks[1].feedforward, None)[neuron])
        assert score == pytest.approx(abs(slope), rel=1e-3, abs=1e-9)


def test_group_scores_are_the_error_of_removing_one_group_alone():
    model = tiny()
    attention = model.blocks[0].attention
    x = torch.randn(200, 48, generator=torch.Generator().manual_seed(0)) + 0.5
    statistic = GroupMoments(48, torch.device("cpu"), groups=4)
    statistic.update(x[:80])
    statistic.update(x[80:])
    norm, variance = (IMPORTANCES.parse(kind, "criterion") for kind in ("norm", "variance"))
    for group in range(4):
        part = slice(12 * group, 12 * group + 12)
        moved = x[:, part] @ attention.o.weight[:, part].T
        assert float(norm.groups(0, attention, statistic)[group]) == pytest.approx(
            float(moved.square().sum(1).mean()), rel=1e-4
        )
        spread = moved - moved.mean(0)
        assert float(variance.groups(0, attention, statistic)[group]) == pytest.approx(
            float(spread.square().sum(1).mean()), rel=1e-3
        )
    for head in range(8):
        part = slice(6 * head, 6 * head + 6)
        moved = x[:, part] @ attention.o.weight[:, part].T
        assert float(norm.heads(0, attention, statistic).flatten()[head]) == pytest.approx(
            float(moved.square().sum(1).mean()), rel=1e-4
        )


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_weights_shrink_all_the_same(frozen):
    model = tiny().requires_grad_(not frozen)
    prune_structured(model, ["neurons"], 0.5, "magnitude")
    shapes = {name: tuple(t.shape) for name, t in model.blocks[0].feedforward.state_dict().items()}
    assert shapes == {"gate.weight": (24, 32), "up.weight": (24, 32), "down.weight": (32, 24)}


def test_a_cut_that_does_not_happen_is_an_error(monkeypatch):
    monkeypatch.setattr(tp.Group, "prune", lambda *_, **__: None)
    with pytest.raises(RuntimeError, match="24 of 48 neurons were to be kept"):
        prune_structured(tiny(), ["neurons"], 0.5, "magnitude")


def test_heads_of_two_groups_in_one_row_are_a_fault():
    with pytest.raises(ValueError, match="one group"):
        surgery.cut_heads(tiny().blocks[0].attention, torch.tensor([[1, 2]]))


@pytest.mark.parametrize("finished", [1, 2, 4])
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, finished):
    settings = (["neurons", "groups", "heads"], 0.5, "variance", tokens())

    class Killed(Exception):
        pass

    def stop(step):
        if step.index == finished:
            raise Killed

    whole = tiny(GQA_BIASED, LLAMA)
    prune_structured(whole, *settings, compensation="add")
    first = {"store": FolderStore(tmp_path), "compensation": "add"}
    if finished < 4:
        with pytest.raises(Killed):
            prune_structured(tiny(GQA_BIASED, LLAMA), *settings, progress=stop, **first)
    else:
        prune_structured(tiny(GQA_BIASED, LLAMA), *settings, **first)
    resumed = tiny(GQA_BIASED, LLAMA)
    prune_structured(resumed, *settings, store=FolderStore(tmp_path), compensation="add")
    assert resumed.config == whole.config
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("targets", "ratio", "options", "words"),
    [
        (["groups"], 0.9, {}, "leaves none of the 4 groups"),
        (["heads"], 0.9, {}, "leaves none of the 2 query heads of a group"),
        (["neurons"], 0.999, {}, "leaves none of the 48 neurons"),
        (["neurons"], 1.0, {}, "between 0 and 1"),
        (["neurons"], 0.0, {}, "between 0 and 1"),
        (["groups"], 0.1, {}, "removes nothing"),
        (["neurons"], 0.1, {"round_to": 48}, "removes nothing: .* round_to 48"),
        (["depth"], 0.5, {}, "takes neurons, heads, groups, experts"),
        (["experts"], 0.5, {}, "target 'experts': no block of this model has any"),
        ([], 0.5, {}, "at least one"),
        (["neurons"], {"groups": 0.5}, {}, "but the targets are neurons"),
        (["neurons"], 0.5, {"criterion": "varience"}, "did you mean 'variance'"),
        (["neurons"], 0.5, {"allocation": "locl"}, "unknown allocation"),
        (["neurons"], 0.5, {"compensation": "ad"}, "did you mean 'add'"),
        (["neurons"], 0.5, {"round_to": 0}, "at least 1"),
        (["neurons"], 0.5, {"batches": None}, "give it text"),
        (["neurons"], 0.5, {"batches": None, "criterion": "taylor"}, "give it text"),
    ],
)
def test_impossible_requests_are_refused_before_anything_changes(targets, ratio, options, words):
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=words):
        prune_structured(model, targets, ratio, **{"batches": tokens(), **options})
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("attention", "position", "words"),
    [(GQA, "alibi", "alibi positions"), (GQA, "t5", "t5 positions"), ({**GQA, "sink": "learned"}, "rope", "sink")],
)
@pytest.mark.parametrize("target", ["heads", "groups"])
def test_heads_with_numbers_of_their_own_are_not_cut(target, attention, position, words):
    model = tiny(attention, position=position)
    with pytest.raises(UserError, match=f"heads of block 0 cannot be cut: .*{words}.* cut neurons instead"):
        prune_structured(model, [target], 0.5, "magnitude", tokens())


def test_a_block_without_attention_or_feedforward_is_passed_over():
    torch.manual_seed(0)
    config = ModelConfig.from_dict(
        {"vocab_size": 50, "width": 32, "depth": 2, "order": "ssff", "attention": GQA, "feedforward": LLAMA}
    )
    model = Transformer(config)
    prune_structured(model, ["neurons", "groups"], 0.5, "variance", tokens())
    kept = [
        (layer.attention and layer.attention.kv_heads, layer.feedforward and layer.feedforward.width)
        for layer in model.config.layers
    ]
    assert kept == [(2, None), (2, 24), (None, 24)]
    assert model(tokens()[0]["tokens"]).logits.isfinite().all()


def test_a_query_head_goes_with_its_group_or_alone():
    """1 - (1 - h)(1 - g) of the query heads are asked to go."""
    for ratios, heads in (({"heads": 0.5}, 0.5), ({"groups": 0.25}, 0.25), ({"heads": 0.5, "groups": 0.25}, 0.625)):
        ratios = {**ratios, "neurons": 0.1}
        cut = Structured(tuple(ratios), ratios, allocation=Global())
        assert cut.expected("heads") == pytest.approx(heads)
        assert cut.expected("groups") == ratios.get("groups")
        assert cut.expected("neurons") == 0.1
    assert Structured(("neurons",), 0.1).expected("heads") is None

"""Budgets of selective attention: the greedy search, what it leaves, and what it refuses."""

import functools
import itertools

import pytest
import torch

from compress.calibration.store import FolderStore
from compress.pruning.context import BudgetSearch, ContextPruning, prune_context
from compress.pruning.structured.sequential import prune_structured
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer

LENGTH = 16


def build(kinds=("selective", "selective", "selective"), **attention):
    torch.manual_seed(0)
    spec = {"heads": 2, **attention}
    layers = [
        {"attention": {"kind": kind, **(spec if kind == "selective" else {"heads": 2})},
         "feedforward": {"kind": "mlp", "width": 16}}
        for kind in kinds
    ]  # fmt: skip
    model = Transformer(ModelConfig.from_dict({"vocab_size": 30, "width": 16, "context": LENGTH, "layers": layers}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape))
    return model.eval()


@functools.cache
def batches():
    """Tokens whose targets are what the model without budgets finds likeliest, so that forgetting hurts."""
    generator = torch.Generator().manual_seed(3)
    found = [{"tokens": torch.randint(30, (4, LENGTH), generator=generator)} for _ in range(3)]
    for batch in found:
        batch["targets"] = build()(batch["tokens"]).logits.argmax(-1)
    found[2]["targets"][1:, 4:] = -100
    return found


def loss_of(model, budgets):
    """Of a model built anew with these budgets, over all targets together."""
    layers = [layer | {"attention": layer["attention"] | {"budget": budget}}
              for layer, budget in zip(model.config.to_dict()["layers"], budgets, strict=True)]  # fmt: skip
    other = Transformer(ModelConfig.from_dict(model.config.to_dict() | {"layers": layers})).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        logits = torch.cat([other(batch["tokens"]).logits for batch in batches()]).flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(logits, torch.cat([b["targets"] for b in batches()]).flatten()))


def test_every_step_is_the_least_harmful_one():
    model = build()
    _, trace = prune_context(model, batches(), ContextPruning(step=5, budget_ratio=0.4))
    budgets = [LENGTH] * 3
    assert trace[0].loss == pytest.approx(loss_of(model, budgets), rel=1e-5)
    for step in trace[1:]:
        tried = {
            i: loss_of(model, [*budgets[:i], max(2, budgets[i] - 5), *budgets[i + 1 :]])
            for i in range(3)
            if budgets[i] > 2
        }
        assert step.layer == min(tried, key=tried.get)
        assert step.loss == pytest.approx(tried[step.layer], rel=1e-5)
        budgets[step.layer] = step.budget
        assert step.memory == pytest.approx(sum(budgets) / (3 * LENGTH))
    assert trace[-1].memory <= 0.4 < trace[-2].memory
    assert len({step.layer for step in trace[1:]}) > 1


def test_the_result_is_an_ordinary_config():
    model = build()
    whole = model.cache_bytes(LENGTH)
    records, trace = prune_context(model, batches(), ContextPruning(step=4, budget_ratio=0.5))
    budgets = [layer.attention.budget for layer in model.config.layers]
    assert loss_of(model, budgets) == pytest.approx(trace[-1].loss, rel=1e-5)
    assert [block.attention.budget for block in model.blocks] == budgets
    assert model.cache_bytes(LENGTH) == round(whole * trace[-1].memory)
    assert sum(layer.bytes() for layer in model.new_cache(1, LENGTH).layers) == model.cache_bytes(LENGTH)
    for record, budget in zip(records, budgets, strict=True):
        assert record.skipped == (budget is None)
        assert budget is None or record.achieved["tokens_before"] == LENGTH
        assert budget is None or record.achieved["tokens_after"] == budget
        assert budget is None or record.achieved["cache_bytes_after"] < record.achieved["cache_bytes_before"]
    assert ModelConfig.from_dict(model.config.to_dict()) == model.config


def test_a_tolerance_ends_the_search():
    _, whole = prune_context(build(), batches(), ContextPruning(step=4, budget_ratio=0.3))
    rises = [step.loss - whole[0].loss for step in whole[1:]]
    assert rises[-1] > 0.01
    tolerance = rises[-1] / 2
    _, trace = prune_context(build(), batches(), ContextPruning(step=4, budget_ratio=0.3, tolerance=tolerance))
    allowed = list(itertools.takewhile(lambda rise: rise <= tolerance, rises))
    assert 0 < len(allowed) < len(rises)
    assert trace == whole[: len(allowed) + 1]


def test_without_a_ratio_budgets_may_fall_to_two_tokens():
    model = build(("selective",))
    _, trace = prune_context(model, batches(), ContextPruning(step=6, tolerance=100.0))
    assert [step.budget for step in trace] == [None, 10, 4, 2]
    assert model.config.layers[0].attention.budget == 2


def test_other_layers_and_earlier_budgets_stay():
    model = build(("full", "selective", "full"), budget=10)
    records, trace = prune_context(model, batches(), ContextPruning(step=3, budget_ratio=0.5))
    assert [record.name for record in records] == ["blocks.1.attention"]
    assert [step.budget for step in trace] == [None, 7]
    assert trace[0].memory == 10 / LENGTH
    assert model.config.layers[1].attention.budget == 7


def test_an_interrupted_search_goes_on(tmp_path):
    goal = ContextPruning(step=4, budget_ratio=0.4)
    model, store, every, seen = build(), FolderStore(tmp_path), [], []
    expected = BudgetSearch(build(), batches(), goal).run(None, lambda *one: every.append(one))

    class Killed(Exception):
        pass

    def kill(done, total):
        seen.append(done)
        if len(seen) == 8:
            raise Killed

    with pytest.raises(Killed):
        prune_context(model, batches(), goal, store=store, progress=kill)
    tried = []
    search = BudgetSearch(build(), batches(), goal)
    assert search.run(store, lambda *one: tried.append(one)) == expected
    assert len(tried) == len(every) - 6  # two steps of three candidates were there
    assert tried[-1][0] == tried[-1][1]
    assert [done for done, _ in tried] == sorted(done for done, _ in tried)


@pytest.mark.parametrize(
    ("kinds", "goal", "words"),
    [
        (["full"], {"budget_ratio": 0.5}, "this model has none"),
        (["selective"], {}, "give budget_ratio, tolerance or both"),
        (["selective"], {"budget_ratio": 1.0}, "between 0 and 1"),
        (["selective"], {"budget_ratio": 0.05}, "2 tokens of 16 are 0.125"),
        (["selective"], {"tolerance": -1.0}, "at least 0 nats"),
        (["selective"], {"tolerance": 0.5, "step": 0}, "at least 1 token"),
    ],
)
def test_impossible_wishes(kinds, goal, words):
    with pytest.raises(UserError, match=words):
        prune_context(build(kinds), batches(), ContextPruning(**{"step": 4, **goal}))


def test_nothing_to_lower_is_said():
    with pytest.raises(UserError, match="at 0.25 already"):
        prune_context(build(budget=4), batches(), ContextPruning(step=1, budget_ratio=0.3))
    with pytest.raises(UserError, match="no budget can be lowered any more"):
        prune_context(build(budget=2), batches(), ContextPruning(step=1, tolerance=0.3))
    with pytest.raises(UserError, match="tolerance 0 allows no step of 14 tokens: the best one costs"):
        prune_context(build(), batches(), ContextPruning(step=14, tolerance=0.0))
    with pytest.raises(UserError, match="no batch"):
        prune_context(build(), [], ContextPruning(step=1, tolerance=0.3))


def test_heads_are_bound_to_the_one_that_selects():
    with pytest.raises(UserError, match="head 0 selects for all of them"):
        prune_structured(build(), "groups", 0.5, "magnitude", compensation="none")

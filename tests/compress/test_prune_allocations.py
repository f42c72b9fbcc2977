"""How much each layer gives up: against the formulas of the papers, and the totals."""

import pytest
import torch

from compress.calibration.store import FolderStore
from compress.pruning.allocations.erk import ErdosRenyi
from compress.pruning.allocations.owl import Owl
from compress.pruning.allocations.uniform import UniformSparsity
from compress.pruning.criteria.magnitude import Magnitude
from compress.pruning.criteria.wanda import Wanda
from compress.pruning.patterns import NOfM, Unstructured
from compress.pruning.solvers.sparsegpt import SparseGpt
from compress.pruning.sparsify import Sparsify, sparsify
from models.errors import UserError
from tests.compress.test_prune_sparsify import linears, tiny, tokens

SHAPES = {"a": (64, 64), "b": (64, 8), "c": (256, 64), "d": (64, 256), "e": (16, 16)}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 0.99])
def test_erk_has_one_factor_for_all_that_are_not_dense(sparsity):
    found = ErdosRenyi().sparsities(None, SHAPES, sparsity, None)
    sizes = {name: a * b for name, (a, b) in SHAPES.items()}
    kept = sum((1 - found[name]) * size for name, size in sizes.items())
    assert kept == pytest.approx((1 - sparsity) * sum(sizes.values()))
    factors = {name: (1 - found[name]) * sizes[name] / sum(shape) for name, shape in SHAPES.items()}
    free = {factors[name] for name in SHAPES if found[name] > 1e-9}
    assert max(free, default=0) == pytest.approx(min(free, default=0))
    for name in factors.keys() - {name for name in SHAPES if found[name] > 1e-9}:
        assert factors[name] <= max(free, default=1e9) + 1e-9  # dense ones would have asked for more than all
    assert (sparsity != 0.5) or (found["b"] == 0.0 < found["a"] < found["c"])


def shares_by_hand(model, batches, threshold):
    """The share of outliers in each block, over inputs that hooks collect on the dense model."""
    kept = {name: [] for name in linears(model)}
    hooks = [
        module.register_forward_pre_hook(lambda m, args, own=kept[name]: own.append(args[0].detach()))
        for name, module in linears(model).items()
    ]
    model.eval()
    for batch in batches:
        model(batch["tokens"])
    for hook in hooks:
        hook.remove()
    shares = []
    for i in range(len(model.blocks)):
        scores = [
            (module.weight.detach().abs() * torch.cat(kept[name]).square().mean((0, 1)).sqrt()).flatten()
            for name, module in linears(model).items()
            if name.startswith(f"blocks.{i}.")
        ]
        scores = torch.cat(scores)
        shares.append(float((scores > threshold * scores.mean()).float().mean()))
    return shares


def test_owl_follows_the_outliers_of_each_block():
    model, batches = tiny_with_outliers(), tokens()
    shares = shares_by_hand(tiny_with_outliers(), batches, 3.0)
    records = sparsify(model, Wanda(allocation=Owl(threshold=3.0, spread=0.1)), Unstructured(0.6), batches)
    asked = {record.name: record.requested["sparsity"] for record in records if not record.skipped}
    keep = [(share - min(shares)) / (max(shares) - min(shares)) * 0.2 for share in shares]
    expected = [1 - (one - sum(keep) / len(keep) + 0.4) for one in keep]
    for name, sparsity in asked.items():
        assert sparsity == pytest.approx(expected[int(name.split(".")[1])], abs=1e-6)
    for name, module in linears(model).items():
        assert ((module.weight == 0).sum(1) == round(asked[name] * module.in_features)).all()


def tiny_with_outliers():
    model = tiny()
    with torch.no_grad():
        model.blocks[1].feedforward.up.weight[:4] *= 30
    return model


def test_owl_with_equal_blocks_is_uniform_and_unequal_ones_are_weighed_by_their_size():
    assert Owl().shared([(5, 100), (10, 200)], 0.7) == [0.7, 0.7]
    assert Owl().shared([], 0.7) == []
    shared = Owl(spread=0.1).shared([(9, 100), (0, 300)], 0.7)
    assert (shared[0] * 100 + shared[1] * 300) / 400 == pytest.approx(0.7)
    assert shared[1] - shared[0] == pytest.approx(0.2)


@pytest.mark.parametrize("method", [Magnitude(allocation=ErdosRenyi()), SparseGpt(allocation=Owl(2.0, 0.1))], ids=str)
def test_the_whole_has_the_sparsity_that_is_asked_for(method):
    model = tiny_with_outliers()
    records = [record for record in sparsify(model, method, Unstructured(0.5, "layer"), tokens()) if not record.skipped]
    weights = sum(module.weight.numel() for module in linears(model).values())
    zeros = sum(record.achieved["zeros"] for record in records)
    assert abs(zeros - 0.5 * weights) <= len(records)
    assert len({record.requested["sparsity"] for record in records}) > 1


def test_an_interrupted_run_keeps_its_sparsities(tmp_path, monkeypatch):
    method, pattern = SparseGpt(allocation=Owl(2.0, 0.1)), Unstructured(0.5, "layer")
    whole = tiny_with_outliers()
    sparsify(whole, method, pattern, tokens())

    class Killed(Exception):
        pass

    def stop(step):
        if step.index == 1:
            raise Killed

    with pytest.raises(Killed):
        sparsify(tiny_with_outliers(), method, pattern, tokens(), store=FolderStore(tmp_path), progress=stop)
    monkeypatch.setattr(Owl, "sparsities", None)  # not asked again
    resumed = tiny_with_outliers()
    sparsify(resumed, method, pattern, tokens(), store=FolderStore(tmp_path))
    assert all(torch.equal(whole.state_dict()[name], tensor) for name, tensor in resumed.state_dict().items())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Owl(threshold=0.0), "threshold is 0"),
        (lambda: Owl(spread=0.5), "spread is 0.5"),
        (lambda: Sparsify(Wanda(allocation=Owl()), NOfM(2, 4)), "a pattern 2:4 leaves it no choice"),
        (lambda: Sparsify(Magnitude(allocation=ErdosRenyi()), Unstructured(0.5, "global")), "of scope global"),
        (
            lambda: sparsify(
                tiny_with_outliers(), Wanda(allocation=Owl(2.0, 0.4)), Unstructured(0.9, "layer"), tokens()
            ),
            "lower spread",
        ),
        (lambda: sparsify(tiny(), Magnitude(allocation=Owl()), Unstructured(0.5)), "calibrates"),
    ],
)
def test_what_cannot_be_is_refused_in_words(call, words):
    with pytest.raises(UserError, match=words):
        call()


def test_uniform_is_the_default():
    assert Wanda().allocation == UniformSparsity()
    assert UniformSparsity().sparsities(None, SHAPES, 0.3, None) == dict.fromkeys(SHAPES, 0.3)

"""SparseGPT against the update it is derived from; swaps of a mask against trying every pair."""

from dataclasses import replace

import pytest
import torch

from compress.calibration.optimal_brain_surgeon import factorise, output_error
from compress.calibration.statistics import Hessian, InputNorm
from compress.pruning.criteria.magnitude import Magnitude
from compress.pruning.criteria.wanda import Wanda
from compress.pruning.masks import masks_of
from compress.pruning.patterns import NOfM, Unstructured
from compress.pruning.solvers.sparsegpt import SparseGpt, solve
from compress.pruning.solvers.swaps import Swaps
from compress.pruning.sparsify import Sparsify, sparsify
from models.errors import UserError
from tests.compress.test_prune_sparsify import linears, tiny, tokens
from tests.compress.test_quantization_gptq import correlated, hessian

WIDTH = 160  # more than a block of 128
PATTERNS = [Unstructured(0.5, "layer"), Unstructured(0.37, "row"), NOfM(2, 4), NOfM(3, 8), NOfM(1, 5), NOfM(60, 150)]


def oracle(weight, h, pattern, among, damping=0.01):
    """The article's algorithm in fp64, with the explicit inverse of H[i:, i:] at every column and no lazy updates."""
    weight, (rows, width) = weight.double().clone(), weight.shape
    h = h.double() + damping * h.double().diagonal().mean() * torch.eye(width)
    inverses = [torch.linalg.inv(h[i:, i:]) for i in range(width)]
    cost = torch.stack([inverse[0, 0] for inverse in inverses])
    gone, unit = torch.zeros(rows, width, dtype=torch.bool), getattr(pattern, "m", 128)
    for i in range(width):
        if i % unit == 0:
            end = min(i + unit, width)
            last = width if among == "rest" and not isinstance(pattern, NOfM) else end
            scores, chosen = weight[:, i:last].square() / cost[i:last], torch.zeros(rows, last - i, dtype=torch.bool)
            if isinstance(pattern, NOfM):
                chosen.scatter_(1, scores.argsort(1)[:, : pattern.m - pattern.n], True)
            elif pattern.scope == "row":
                for row in range(rows):
                    before = round(pattern.sparsity * i) if among == "block" else int(gone[row].sum())
                    chosen[row, scores[row].argsort()[: round(pattern.sparsity * last) - before]] = True
            else:
                before = round(pattern.sparsity * i * rows) if among == "block" else int(gone.sum())
                for flat in scores.flatten().argsort()[: round(pattern.sparsity * last * rows) - before].tolist():
                    chosen[flat // (last - i), flat % (last - i)] = True
            gone[:, i:end] = chosen[:, : end - i]
        error = weight[:, i] * gone[:, i] / cost[i]
        weight[:, i:] -= error[:, None] * inverses[i][0]
        weight[gone[:, i], i] = 0
    return weight, ~gone


@pytest.mark.parametrize(
    ("pattern", "among"), [*((one, "rest") for one in PATTERNS), *((one, "block") for one in PATTERNS[:2])], ids=str
)
def test_sparsegpt_equals_the_explicit_inverse(pattern, among):
    torch.manual_seed(1)
    width = 150 if pattern == NOfM(60, 150) else WIDTH
    weight, h = torch.randn(12, width), hessian(correlated(600, width))
    ours, mask = solve(weight, factorise(h.double(), 0.01, act_order=False), pattern, among)
    expected, kept = oracle(weight, h, pattern, among)
    assert torch.equal(mask, kept)
    torch.testing.assert_close(ours, expected.float(), rtol=1e-5, atol=1e-6)
    assert not ours[~mask].any()


@pytest.mark.parametrize("among", ["block", "rest"])
@pytest.mark.parametrize("pattern", PATTERNS[:5], ids=str)
def test_counts_are_exact_whatever_the_ties(pattern, among):
    for weight in (torch.ones(12, WIDTH), torch.randn(12, WIDTH)):
        h = hessian(correlated(600, WIDTH))
        new, mask = solve(weight, factorise(h, 0.01, act_order=False), pattern, among)
        gone = ~mask
        assert not new[gone].any()
        if isinstance(pattern, NOfM):
            assert (gone.view(12, -1, pattern.m).sum(2) == pattern.m - pattern.n).all()
        elif pattern.scope == "row":
            assert (gone.sum(1) == round(pattern.sparsity * WIDTH)).all()
        else:
            assert int(gone.sum()) == round(pattern.sparsity * 12 * WIDTH)


def test_inputs_that_never_fire_go_first_and_the_others_keep_their_values():
    torch.manual_seed(0)
    x = correlated(900, 64)
    x[:, 10:20] = 0
    weight = torch.randn(8, 64)
    new, mask = solve(weight, factorise(hessian(x), 0.01, act_order=False), Unstructured(0.125, "row"))
    assert ((~mask).sum(1) == 8).all()
    assert not mask[:, 10:18].any()
    assert torch.equal(new[:, 18:20], weight[:, 18:20])


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Unstructured(0.7, "layer"), NOfM(2, 4)], ids=str)
def test_error_of_sparsegpt_is_below_wandas_and_wandas_below_magnitudes(pattern):
    torch.manual_seed(3)
    weight, x, fresh = torch.randn(64, 192), correlated(1000, 192), correlated(1000, 192, seed=1)
    norm, full = InputNorm(192, x.device), Hessian(192, x.device)
    norm.update(x)
    full.update(x)
    found = [
        Magnitude().solve(weight, None, pattern).weight,
        Wanda().solve(weight, norm, pattern).weight,
        SparseGpt().solve(weight, full, pattern).weight,
    ]
    for inputs in (x, fresh):
        errors = [output_error(weight, one, hessian(inputs)) for one in found]
        assert errors[2] < 0.85 * errors[1] < errors[1] < errors[0]


def errors_of_rows(dense, pruned, h):
    difference = (dense - pruned).double()
    return ((difference @ h.double()) * difference).sum(1)


def best_swap(dense, weight, mask, h, span, refit):
    """The lowest error of a row after one swap, by trying every pair."""
    best = errors_of_rows(dense[None], weight[None], h)[0]
    for p in mask.nonzero().flatten().tolist():
        for u in (~mask).nonzero().flatten().tolist():
            if span and p // span != u // span:
                continue
            tried = weight.clone()
            tried[p], tried[u] = 0, dense[u]
            if refit:
                others = dense - tried
                others[u] = 0
                tried[u] = dense[u] + (h[u] @ others) / h[u, u]
            best = min(best, errors_of_rows(dense[None], tried[None], h)[0])
    return best


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("span", [None, 4])
def test_a_step_is_the_best_of_all_swaps(span, refit):
    torch.manual_seed(4)
    dense, h = torch.randn(6, 24), hessian(correlated(200, 24)) + 0.01 * torch.eye(24)
    pattern = NOfM(2, 4) if span else Unstructured(0.5)
    pruned = Magnitude().solve(dense, None, pattern)
    weight = solve(dense, factorise(h, 0.01, act_order=False), pattern) if refit else pruned[:2]
    for _ in range(3):
        expected = [best_swap(*row, h, span, refit) for row in zip(dense, *weight, strict=True)]
        weight = Swaps(steps=1).refine(dense, *weight, h, span, refit)
        torch.testing.assert_close(errors_of_rows(dense, weight[0], h), torch.stack(expected), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("steps", [1, 7, 60])
@pytest.mark.parametrize("pattern", [Unstructured(0.6), Unstructured(0.5, "layer"), NOfM(2, 4)], ids=str)
@pytest.mark.parametrize("method", [Magnitude(), Wanda(), SparseGpt()], ids=lambda one: one.kind)
def test_swaps_never_raise_the_error_of_a_row_and_keep_its_count(method, pattern, steps):
    torch.manual_seed(5)
    dense, x = torch.randn(40, 96), correlated(300, 96)
    statistic = (InputNorm if method.kind == "wanda" else Hessian)(96, x.device)
    statistic.update(x)
    before, h = method.solve(dense, statistic, pattern), hessian(x)
    weight, mask = Swaps(steps).refine(dense, before.weight, before.mask, h, pattern.span, method.updates)
    errors = errors_of_rows(dense, before.weight, h), errors_of_rows(dense, weight, h)
    assert (errors[1] <= errors[0]).all()
    assert errors[1].sum() < errors[0].sum()
    assert torch.equal(mask.sum(1), before.mask.sum(1))
    assert not weight[~mask].any()
    if pattern.span:
        assert (mask.view(40, -1, 4).sum(2) == 2).all()
    if not method.updates:
        assert torch.equal(weight, dense * mask)


@pytest.mark.parametrize("pattern", [Unstructured(0.5, "layer"), Unstructured(0.3), NOfM(2, 4)], ids=str)
@pytest.mark.parametrize("refine", [None, Swaps(3)], ids=["plain", "swaps"])
def test_sparsegpt_over_a_model(pattern, refine):
    model, dense = tiny(), tiny()
    records = sparsify(model, SparseGpt(refine=refine), pattern, tokens())
    done = {record.name: record for record in records if not record.skipped}
    assert set(done) == set(linears(model))
    for name, module in linears(model).items():
        zeros = module.weight == 0
        assert done[name].achieved["zeros"] == int(zeros.sum())
        assert done[name].achieved["error_of"] == "outputs"
        assert 0 < done[name].error < 1
        assert done[name].note.startswith("swaps: error of the outputs") == (refine is not None)
        if isinstance(pattern, NOfM):
            assert (zeros.view(-1, 4).sum(1) == 2).all()
        elif pattern.scope == "layer":
            assert int(zeros.sum()) == round(pattern.sparsity * zeros.numel())
        else:
            assert (zeros.sum(1) == round(pattern.sparsity * zeros.shape[1])).all()
        assert not torch.equal(module.weight[~zeros], dense.get_submodule(name).weight[~zeros])
    assert {f"{name}.weight" for name in done} == set(masks_of(model))


@pytest.mark.parametrize("method", [SparseGpt(), SparseGpt(refine=Swaps(2)), Wanda(refine=Swaps(2))], ids=str)
def test_padding_has_no_influence(method):
    batch = tokens(count=1)[0]["tokens"]
    documents = torch.zeros(2, 16, dtype=torch.int64)
    documents[:, 12:] = -1
    results = []
    for filler in (3, 7):
        padded, model = batch.clone(), tiny()
        padded[:, 12:] = filler
        sparsify(model, method, Unstructured(0.5), [{"tokens": padded, "documents": documents}])
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_broken_numbers_of_a_layer_fall_back_to_magnitude_with_a_note():
    torch.manual_seed(0)
    linear, statistic = torch.nn.Linear(8, 3, bias=False), Hessian(8, torch.device("cpu"))
    statistic.update(torch.randn(20, 8))
    statistic.sum[0, 1] = 1e9
    smallest = linear.weight.detach().abs().argsort(1)[:, :4]
    _, record = Sparsify(SparseGpt(), Unstructured(0.5)).compress("blocks.0.up", linear, statistic)
    assert "could not be factorised at any damping: pruned by magnitude" in record.note
    assert torch.equal(linear.weight == 0, torch.zeros(3, 8).scatter(1, smallest, 1) > 0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SparseGpt(damping=0.0), "damping"),
        (lambda: SparseGpt(precision="half"), "precision"),
        (lambda: Swaps(0), "steps is 0"),
        (lambda: Sparsify(SparseGpt(), Unstructured(0.5, "global")), "'sparsegpt' cannot be compared"),
        (lambda: replace(SparseGpt(), scope="row").check(None), None),
    ],
)
def test_impossible_options(make, words):
    if words is None:
        make()
        return
    with pytest.raises(UserError, match=words):
        make()

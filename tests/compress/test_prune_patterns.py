"""Patterns: exact counts, ties, N:M along the inputs, and what is refused."""

import pytest
import torch

from compress.pruning.patterns import PATTERNS, NOfM, Unstructured, global_masks, smallest
from models.errors import UserError


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.33, 0.5, 0.9])
def test_every_row_loses_exactly_its_share(sparsity):
    scores = torch.rand(37, 53, generator=torch.Generator().manual_seed(0))
    mask = Unstructured(sparsity, "row").mask(scores)
    assert ((~mask).sum(dim=1) == round(sparsity * 53)).all()


def test_the_smallest_go_and_the_layer_count_is_exact():
    scores = torch.rand(20, 30, generator=torch.Generator().manual_seed(1))
    mask = Unstructured(0.37, "layer").mask(scores)
    assert int((~mask).sum()) == round(0.37 * 600)
    assert scores[~mask].max() < scores[mask].min()


@pytest.mark.parametrize("pattern", [Unstructured(0.5, "row"), Unstructured(0.5, "layer"), NOfM(2, 4)])
def test_ties_keep_the_count_exact_and_the_lowest_index_goes_first(pattern):
    mask = pattern.mask(torch.ones(8, 16))
    assert int((~mask).sum()) == 64
    assert torch.equal(mask, pattern.mask(torch.ones(8, 16)))
    assert not mask[0, 0]


def test_partial_ties_agree_with_a_stable_sort():
    scores = torch.randint(0, 4, (50, 40), generator=torch.Generator().manual_seed(2)).float()
    expected = torch.zeros_like(scores, dtype=torch.bool)
    expected.scatter_(1, scores.argsort(dim=1, stable=True)[:, :17], True)
    assert torch.equal(smallest(scores, 17), expected)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (3, 5), (1, 2)])
def test_n_of_m_keeps_the_n_largest_of_consecutive_inputs(n, m):
    scores = torch.rand(12, 4 * m, generator=torch.Generator().manual_seed(3))
    mask = NOfM(n, m).mask(scores)
    for row in range(12):
        for start in range(0, 4 * m, m):
            kept = set(mask[row, start : start + m].nonzero().flatten().tolist())
            assert kept == set(scores[row, start : start + m].topk(n).indices.tolist())


def test_global_masks_share_one_threshold():
    generator = torch.Generator().manual_seed(4)
    scores = {"a": torch.rand(10, 20, generator=generator), "b": 3 * torch.rand(30, 10, generator=generator)}
    masks = global_masks(scores, 0.4)
    removed = torch.cat([scores[name][~mask] for name, mask in masks.items()])
    kept = torch.cat([scores[name][mask] for name, mask in masks.items()])
    assert len(removed) == round(0.4 * 500)
    assert removed.max() < kept.min()
    assert (~masks["a"]).float().mean() > (~masks["b"]).float().mean()


def test_global_sparsity_that_empties_a_layer_is_refused():
    with pytest.raises(UserError, match="leaves nothing of a"):
        global_masks({"a": torch.zeros(4, 4), "b": torch.ones(4, 4)}, 0.5)


def test_parse():
    assert PATTERNS.parse("2:4", "") == NOfM(2, 4)
    assert PATTERNS.parse("4:8", "").given(0.5) == NOfM(4, 8)
    assert PATTERNS.parse("unstructured", "").given(0.3, "layer") == Unstructured(0.3, "layer")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: PATTERNS.parse("two:four", ""), "unknown pattern"),
        (lambda: PATTERNS.parse("2:4", "").given(0.7), "not 0.7"),
        (lambda: PATTERNS.parse("4:4", ""), "0 < N < M"),
        (lambda: PATTERNS.parse("0:4", ""), "0 < N < M"),
        (lambda: Unstructured(1.0), r"\[0, 1\)"),
        (lambda: Unstructured(-0.1), r"\[0, 1\)"),
        (lambda: PATTERNS.parse({"kind": "unstructured", "scope": "column"}, ""), "one of row, layer, global"),
        (lambda: NOfM(2, 4).check("blocks.0.attention.q", (8, 30)), "blocks.0.attention.q has 30"),
        (lambda: Unstructured(0.99).check("q", (8, 8)), "leaves nothing of q"),
        (lambda: Unstructured(0.5).mask(torch.full((2, 2), float("nan"))), "NaN"),
    ],
)
def test_what_cannot_be_is_refused_in_words(call, words):
    with pytest.raises(UserError, match=words):
        call()

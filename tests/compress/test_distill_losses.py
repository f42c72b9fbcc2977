"""Distillation losses against explicit torch, in gradient, scale and padding."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from compress.distillation.layer_map import Explicit, Last, UniformLayers
from compress.distillation.losses.feature import CosineDistance, Feature, FeatureLoss, MeanSquared
from compress.distillation.losses.logit import logit_terms, logit_terms_reference
from compress.distillation.losses.loss import Combine, parse_losses
from models import projection
from models.errors import UserError


def problem(dtype=torch.float32, tokens=23, vocabulary=31, width=8, teacher_width=12):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    hidden, weight = draw(tokens, width), draw(vocabulary, width)
    teacher_hidden, teacher_weight = draw(tokens, teacher_width), draw(vocabulary, teacher_width)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[[0, 5, -1]] = -100
    return hidden, weight, teacher_hidden, teacher_weight, targets


def chunked(hidden, weight, teacher_hidden, teacher_weight, targets, temperature=2.0, alpha=0.3, beta=0.7):
    project = lambda rows: rows @ teacher_weight.T  # noqa: E731
    return logit_terms(hidden, weight, teacher_hidden, project, targets, temperature, alpha, beta)


@pytest.mark.parametrize("rows", [1, 4, 1000])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_chunked_terms_and_gradients_equal_the_reference(monkeypatch, rows, temperature):
    monkeypatch.setattr(projection, "CPU_CHUNK_BYTES", 8 * 31 * rows)
    hidden, weight, teacher_hidden, teacher_weight, targets = problem(torch.float64)
    results = []
    for chunks in (True, False):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        if chunks:
            terms = chunked(*leaves, teacher_hidden, teacher_weight, targets, temperature)
        else:
            logits = leaves[0] @ leaves[1].T
            terms = logit_terms_reference(logits, teacher_hidden @ teacher_weight.T, targets, temperature, 0.3, 0.7)
        (3 * terms.total).backward()
        results.append([*terms, *(leaf.grad for leaf in leaves)])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_gradients_in_double_precision():
    hidden, weight, teacher_hidden, teacher_weight, targets = problem(torch.float64, tokens=7, vocabulary=9)
    function = lambda h, w: chunked(h, w, teacher_hidden, teacher_weight, targets).total  # noqa: E731
    assert torch.autograd.gradcheck(function, (hidden.requires_grad_(), weight.requires_grad_()))


def test_divergence_is_kl_of_teacher_to_student_per_counted_token():
    hidden, weight, teacher_hidden, teacher_weight, targets = problem(torch.float64)
    terms = chunked(hidden, weight, teacher_hidden, teacher_weight, targets, temperature=3.0)
    expected, counted = 0.0, 0
    for row in range(len(targets)):
        if targets[row] == -100:
            continue
        teacher = torch.softmax(teacher_hidden[row] @ teacher_weight.T / 3.0, dim=0)
        student = torch.softmax(hidden[row] @ weight.T / 3.0, dim=0)
        expected += float((teacher * (teacher / student).log()).sum())
        counted += 1
    assert float(terms.divergence) == pytest.approx(9.0 * expected / counted)
    nll = F.cross_entropy(hidden @ weight.T, targets, ignore_index=-100)
    assert float(terms.cross_entropy) == pytest.approx(float(nll))


def test_t_squared_keeps_the_size_of_the_gradient():
    """At a high temperature the gradient tends to that of half the squared difference of centred logits."""
    hidden, weight, teacher_hidden, teacher_weight, targets = problem(torch.float64)
    norms = {}
    for temperature in (100.0, 1000.0):
        leaf = hidden.clone().requires_grad_()
        chunked(leaf, weight, teacher_hidden, teacher_weight, targets, temperature, 0.0, 1.0).total.backward()
        norms[temperature] = leaf.grad.norm()
    assert float(norms[1000.0] / norms[100.0]) == pytest.approx(1.0, abs=0.02)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn():
    hidden, weight, *_, targets = problem()
    terms = chunked(hidden.clone().requires_grad_(), weight, hidden, weight, targets, alpha=0.0, beta=1.0)
    assert float(terms.divergence) == pytest.approx(0.0, abs=1e-6)
    assert float(terms.agreement) == 1.0


def test_ignored_tokens_have_no_gradient_and_none_counted_gives_zero():
    hidden, weight, teacher_hidden, teacher_weight, targets = problem()
    hidden.requires_grad_()
    chunked(hidden, weight, teacher_hidden, teacher_weight, targets).total.backward()
    ignored = targets == -100
    assert not hidden.grad[ignored].any()
    assert hidden.grad[~ignored].abs().sum(dim=1).min() > 0
    nothing = chunked(hidden, weight, teacher_hidden, teacher_weight, torch.full_like(targets, -100))
    assert float(nothing.total.detach()) == 0.0
    nothing.total.backward()


def test_bfloat16_autocast_stays_near_full_precision():
    hidden, weight, teacher_hidden, teacher_weight, targets = problem(tokens=200, vocabulary=64, width=32)
    targets = targets.clamp(min=0)
    exact = chunked(hidden, weight, teacher_hidden, teacher_weight, targets)
    leaf = hidden.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        rough = chunked(leaf, weight, teacher_hidden, teacher_weight, targets)
    rough.total.backward()
    assert rough.total.dtype == torch.float32
    assert leaf.grad.dtype == torch.float32
    assert float(rough.total) == pytest.approx(float(exact.total), rel=0.02)


FIRST = "blocks.0"


def states(width, blocks, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {f"blocks.{i}": torch.randn(3, 5, width, generator=generator, dtype=dtype) for i in blocks}


@pytest.mark.parametrize("distance", [MeanSquared(), CosineDistance()])
def test_feature_loss_against_an_explicit_loop_and_padding_without_influence(distance):
    loss = FeatureLoss(distance, [(0, 1), (1, 3)], 6, 10).double()
    student, teacher = states(6, (0, 1), 1), states(10, (1, 3), 2)
    counted = torch.ones(3, 5, dtype=torch.bool)
    counted[2, 3:] = False
    expected = []
    for index, (ours, theirs) in enumerate(loss.pairs):
        for row, column in counted.nonzero().tolist():
            projected = loss.projector.maps[index].weight @ student[f"blocks.{ours}"][row, column]
            wanted = teacher[f"blocks.{theirs}"][row, column]
            if isinstance(distance, MeanSquared):
                expected.append(float((projected - wanted).square().mean()))
            else:
                expected.append(1 - float(projected @ wanted / projected.norm() / wanted.norm()))
    value = loss(student, teacher, counted)
    assert float(value) == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    student["blocks.1"][2, 4] = 1e6
    teacher["blocks.3"][2, 3] = -1e6
    assert torch.equal(loss(student, teacher, counted), value)


def test_feature_gradients_reach_student_and_projector_but_not_the_teacher():
    loss = FeatureLoss(MeanSquared(), [(0, 0)], 4, 6).double()
    student = {FIRST: states(4, (0,), 1)[FIRST].requires_grad_()}
    teacher = {FIRST: states(6, (0,), 2)[FIRST].requires_grad_()}
    counted = torch.ones(3, 5, dtype=torch.bool)
    loss(student, teacher, counted).backward()
    assert student[FIRST].grad.abs().sum() > 0
    assert loss.projector.maps[0].weight.grad.abs().sum() > 0
    assert teacher[FIRST].grad is None
    assert float(loss(student, teacher, ~counted)) == 0.0


def test_feature_loss_does_not_grow_with_length_or_width():
    values = []
    for width, length in ((64, 8), (64, 128), (512, 8)):
        torch.manual_seed(0)
        loss = FeatureLoss(CosineDistance(), [(0, 0)], width, width)
        student, teacher = torch.randn(4, length, width), torch.randn(4, length, width)
        values.append(float(loss({FIRST: student}, {FIRST: teacher}, torch.ones(4, length, dtype=torch.bool))))
    assert all(value == pytest.approx(1.0, abs=0.05) for value in values)


def test_equal_widths_start_from_the_identity():
    loss = FeatureLoss(CosineDistance(), [(0, 0)], 8, 8)
    same = torch.randn(2, 3, 8)
    assert float(loss({FIRST: same}, {FIRST: same}, torch.ones(2, 3, dtype=torch.bool))) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [(2, 6, [2, 5]), (3, 6, [1, 3, 5]), (4, 6, [0, 2, 3, 5]), (2, 2, [0, 1])],
)
def test_uniform_layer_map(student, teacher, expected):
    assert UniformLayers().pairs(student, teacher) == list(enumerate(expected))


def test_a_deeper_student_shares_blocks_and_ends_at_the_last():
    pairs = UniformLayers().pairs(5, 2)
    assert [ours for ours, _ in pairs] == list(range(5))
    assert pairs[-1][1] == 1
    assert {theirs for _, theirs in pairs} == {0, 1}


def test_other_maps():
    assert Last().pairs(3, 8) == [(2, 7)]
    assert Explicit([[0, 4], [2, 7]]).pairs(3, 8) == [(0, 4), (2, 7)]
    for wrong in ([[0, 8]], [[3, 0]], [[0]], ["ab"], []):
        with pytest.raises(UserError):
            Explicit(wrong).pairs(3, 8)


def test_losses_are_chosen_by_name():
    losses = parse_losses(["logit", {"kind": "feature", "distance": "mean_squared", "layer_map": "last"}])
    assert losses["logit"].temperature == 2.0
    assert losses["feature"] == Feature(MeanSquared(), Last())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: parse_losses(["logits"]), "did you mean 'logit'"),
        (lambda: parse_losses("logit"), "expected a list"),
        (lambda: parse_losses([]), "at least one"),
        (lambda: parse_losses(["logit", "logit"]), "twice"),
        (lambda: parse_losses([{"kind": "logit", "temperature": 0}]), "above 0"),
        (lambda: parse_losses([{"kind": "feature", "distance": "cosin"}]), "did you mean 'cosine'"),
        (lambda: Combine(alpha=1.5), r"\[0, 1\]"),
        (lambda: Combine(weights={"feature": -1}), "0 or more"),
        (lambda: Combine(weights={"feature": 1}).check(["logit"]), "not used"),
        (lambda: Combine(0.0, {"logit": 0}).check(["logit"]), "nothing to learn"),
    ],
)
def test_wrong_settings_are_refused_in_words(call, words):
    with pytest.raises(UserError, match=words):
        call()


def test_combine_shares_alpha_between_data_and_teacher():
    combine = Combine(alpha=0.25, weights={"logit": 2.0, "feature": 0.1})
    assert combine.weight("logit") == pytest.approx(1.5)
    assert combine.weight("feature") == pytest.approx(0.1)
    assert combine.weight("relation") == 1.0


def test_projector_is_a_module_of_the_objective_only():
    names = [name for name, _ in FeatureLoss(CosineDistance(), [(0, 0), (1, 1)], 4, 6).named_parameters()]
    assert names == ["projector.maps.0.weight", "projector.maps.1.weight"]
    assert isinstance(FeatureLoss(CosineDistance(), [(0, 0)], 4, 6).projector, nn.Module)

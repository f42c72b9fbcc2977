"""The output projection in chunks against whole logits: the fused loss, and what figures are read from."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from models import projection
from models.projection import (
    IGNORED,
    kl_divergence,
    linear_cross_entropy,
    log_probabilities,
    projected_cross_entropy,
    reference_linear_cross_entropy,
)

TOKENS, WIDTH, VOCABULARY = 37, 12, 29
SMALL_CHUNKS = 4 * VOCABULARY * 5  # bytes: about five tokens of fp32 logits, so that the last chunk is ragged


def inputs(dtype=torch.float64, ignored=5, tokens=TOKENS):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(VOCABULARY, (tokens,), generator=generator)
    targets[torch.randperm(tokens, generator=generator)[:ignored]] = IGNORED
    return hidden, weight, targets


def values_and_gradients(function, hidden, weight, targets, coefficient, **options):
    nll, squared = function(hidden, weight, targets, z_loss=coefficient > 0, **options)
    total = 3 * nll if squared is None else 3 * nll + coefficient * squared
    return nll, squared, *torch.autograd.grad(total, (hidden, weight))


@pytest.mark.parametrize("z_loss", [False, True])
def test_gradients_of_the_reference_are_those_of_its_value(z_loss):
    hidden, weight, targets = inputs(tokens=9)

    def values(hidden, weight):
        return tuple(v for v in reference_linear_cross_entropy(hidden, weight, targets, z_loss=z_loss) if v is not None)

    assert torch.autograd.gradcheck(values, (hidden, weight))


@pytest.mark.parametrize("chunk_bytes", [SMALL_CHUNKS, None])
@pytest.mark.parametrize("coefficient", [0.0, 0.7])
@pytest.mark.parametrize("ignored", [0, 5])
def test_equals_the_reference(chunk_bytes, coefficient, ignored):
    given = inputs(ignored=ignored)
    fused = values_and_gradients(linear_cross_entropy, *given, coefficient, chunk_bytes=chunk_bytes)
    plain = values_and_gradients(reference_linear_cross_entropy, *given, coefficient)
    assert (fused[1] is None) == (coefficient == 0)
    for mine, theirs in zip(fused, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_low_precision_stays_near_the_exact_value(dtype, tolerance):
    hidden, weight, targets = inputs(dtype)
    fused = values_and_gradients(linear_cross_entropy, hidden, weight, targets, 0.1, chunk_bytes=SMALL_CHUNKS)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    expected = values_and_gradients(reference_linear_cross_entropy, *exact, targets, 0.1)
    assert fused[0].dtype == fused[1].dtype == torch.float32
    assert fused[2].dtype == fused[3].dtype == dtype
    for mine, theirs in zip(fused, expected, strict=True):
        assert (mine.double() - theirs).norm() <= tolerance * theirs.norm()


def test_bf16_gradient_of_a_confident_model_is_as_good_as_the_reference():
    # p - 1 of a sure target must not be lost in the rounding of p
    hidden, weight, targets = inputs(torch.float32, ignored=0)
    with torch.no_grad():
        hidden += 1.5 * weight[targets]
    exact = values_and_gradients(reference_linear_cross_entropy, hidden, weight, targets, 0.0)
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight)]
    fused = values_and_gradients(linear_cross_entropy, *low, targets, 0.0)
    plain = values_and_gradients(reference_linear_cross_entropy, *low, targets, 0.0)
    for mine, theirs, true in zip(fused[2:], plain[2:], exact[2:], strict=True):
        assert (mine.float() - true).norm() <= 1.2 * (theirs.float() - true).norm() + 1e-6


def test_extreme_logits_stay_finite():
    hidden, weight, targets = inputs(torch.float32)
    with torch.no_grad():
        hidden *= 1e4
    fused = values_and_gradients(linear_cross_entropy, hidden, weight, targets, 0.1)
    plain = values_and_gradients(reference_linear_cross_entropy, hidden, weight, targets, 0.1)
    for mine, theirs in zip(fused, plain, strict=True):
        assert mine.isfinite().all()
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()


def test_no_target_at_all_gives_zero_and_no_gradient():
    hidden, weight, _ = inputs()
    nothing = torch.full((TOKENS,), IGNORED)
    nll, squared, *gradients = values_and_gradients(linear_cross_entropy, hidden, weight, nothing, 1.0)
    assert nll == 0
    assert squared == 0
    assert all(not gradient.any() for gradient in gradients)


def test_no_tokens_give_zero():
    hidden, weight, targets = inputs(tokens=0, ignored=0)
    assert linear_cross_entropy(hidden, weight, targets)[0] == 0


@pytest.mark.parametrize("wrong", [VOCABULARY, -1])
def test_a_target_outside_the_vocabulary_raises(wrong):
    hidden, weight, targets = inputs()
    targets[3] = wrong
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(hidden, weight, targets)


def products(run):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    return sum(event.count for event in profile.key_averages() if event.key in ("aten::mm", "aten::addmm_"))


def test_only_what_is_asked_for_is_computed():
    hidden, weight, targets = inputs()
    fixed = hidden.detach(), weight.detach()

    def no_grad():
        with torch.no_grad():
            linear_cross_entropy(hidden, weight, targets)

    assert products(no_grad) == 1
    assert products(lambda: linear_cross_entropy(*fixed, targets)) == 1
    assert products(lambda: linear_cross_entropy(hidden, fixed[1], targets)) == 2
    assert products(lambda: linear_cross_entropy(fixed[0], weight, targets)) == 2
    assert products(lambda: linear_cross_entropy(hidden, weight, targets)) == 3
    assert products(lambda: linear_cross_entropy(hidden, weight, targets, z_loss=True)) == 4


def test_value_without_gradient_equals_value_with():
    hidden, weight, targets = inputs()
    with torch.no_grad():
        quiet = linear_cross_entropy(hidden, weight, targets, z_loss=True, chunk_bytes=SMALL_CHUNKS)
    loud = linear_cross_entropy(hidden, weight, targets, z_loss=True, chunk_bytes=SMALL_CHUNKS)
    assert not quiet[0].requires_grad
    assert loud[0].requires_grad
    assert torch.equal(quiet[0], loud[0])
    assert torch.equal(quiet[1], loud[1])


def test_gradient_for_one_input_alone():
    hidden, weight, targets = inputs()
    both = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets)[0], (hidden, weight))
    (first,) = torch.autograd.grad(linear_cross_entropy(hidden, weight.detach(), targets)[0], hidden)
    (second,) = torch.autograd.grad(linear_cross_entropy(hidden.detach(), weight, targets)[0], weight)
    assert torch.equal(first, both[0])
    assert torch.equal(second, both[1])


def test_z_term_alone_has_its_own_gradient():
    given = inputs()
    mine, theirs = (
        torch.autograd.grad(function(*given, z_loss=True)[1], given[:2])
        for function in (linear_cross_entropy, reference_linear_cross_entropy)
    )
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_computes_in_bf16_and_gives_fp32_gradients_to_fp32_weights():
    hidden, weight, targets = inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        fused = values_and_gradients(linear_cross_entropy, hidden, weight, targets, 0.0)
    low = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight)]
    expected = values_and_gradients(linear_cross_entropy, *low, targets, 0.0)
    assert fused[2].dtype == fused[3].dtype == torch.float32
    assert torch.equal(fused[0], expected[0])
    assert torch.equal(fused[3], expected[3].float())


def test_weight_used_twice_collects_both_gradients():
    _, weight, targets = inputs(ignored=0)
    tokens = targets.flip(0)

    def tied(function):
        hidden = torch.nn.functional.embedding(tokens, weight)  # (N, D)
        total = function(hidden, weight, targets)[0] + 0.5 * function(hidden.tanh(), weight, tokens)[0]
        return torch.autograd.grad(total, weight)[0]

    torch.testing.assert_close(tied(linear_cross_entropy), tied(reference_linear_cross_entropy))


def test_backward_may_run_twice_and_under_checkpointing():
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden, weight, targets)[0]
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight))
    again = checkpoint(lambda h: linear_cross_entropy(h, weight, targets)[0], hidden, use_reentrant=False)
    third = torch.autograd.grad(again, (hidden, weight))
    for one, two, three in zip(first, second, third, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_non_contiguous_hidden_states():
    hidden, weight, targets = inputs()
    turned = hidden.detach().t().contiguous().t().requires_grad_()
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets)[0], hidden)
    torch.testing.assert_close(torch.autograd.grad(linear_cross_entropy(turned, weight, targets)[0], turned), expected)


@pytest.mark.parametrize("coefficient", [0.0, 0.7])
def test_a_projection_without_a_matrix_is_called_chunk_by_chunk(coefficient, monkeypatch):
    monkeypatch.setattr(projection, "LOGITS_AT_ONCE", 5 * VOCABULARY)
    sizes = []

    def projected(hidden, weight, targets, *, z_loss):
        def project(chunk):
            sizes.append(len(chunk))
            return chunk @ weight.T

        return projected_cross_entropy(project, hidden, targets, VOCABULARY, z_loss=z_loss)

    given = inputs()
    mine = values_and_gradients(projected, *given, coefficient)
    theirs = values_and_gradients(reference_linear_cross_entropy, *given, coefficient)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert max(sizes) == 5
    with torch.no_grad():
        assert projected(given[0], given[1], torch.full((TOKENS,), IGNORED), z_loss=False) == (0, None)


def test_log_probabilities_of_two_models_come_in_chunks_and_give_nll_and_kl(monkeypatch):
    monkeypatch.setattr(projection, "LOGITS_AT_ONCE", 5 * VOCABULARY)
    hidden, weight, targets = (x.detach() for x in inputs(torch.float32, ignored=0))
    other = torch.randn(VOCABULARY, 7, generator=torch.Generator().manual_seed(1))
    projections = [lambda h: h @ weight.T, lambda h: (h @ other.T).double()]
    found = list(log_probabilities(projections, [hidden, hidden[:, :7]], VOCABULARY))
    assert [part.start for part, _ in found] == list(range(0, TOKENS, 5))
    assert all(log.dtype == torch.float32 and len(log) <= 5 for _, logs in found for log in logs)
    p, q = (torch.cat([logs[i] for _, logs in found]) for i in (0, 1))
    nll = -p.gather(1, targets[:, None]).mean()
    torch.testing.assert_close(nll, reference_linear_cross_entropy(hidden, weight, targets)[0])
    expected = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(1)
    torch.testing.assert_close(kl_divergence(p, q), expected)

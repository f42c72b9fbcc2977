"""GPTQ against the update that it is derived from, and against rounding to nearest."""

import pytest
import torch
from torch import nn

from compress.calibration.optimal_brain_surgeon import factor_of, factorise, output_error
from compress.calibration.statistics import Hessian
from compress.pruning.patterns import NOfM, Unstructured
from compress.pruning.solvers import sparsegpt
from compress.pruning.solvers.sparsegpt import Choice
from compress.quantization.affine import IntFormat, encode, fit, fit_matrix, quantize
from compress.quantization.methods import gptq
from compress.quantization.methods.gptq import Gptq, solve
from compress.quantization.quantizer import read_method, title_of
from models.errors import UserError


def correlated(tokens, width, seed=0):
    """Tokens (tokens, width) of one distribution; `seed` draws others from the same."""
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(9)) * torch.linspace(0.05, 1, width)
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)) @ mix


def hessian(x):
    statistic = Hessian(x.shape[1], x.device)
    statistic.update(x)
    return statistic.matrix()


def oracle(weight, hessian, format, damping, order, keep=None):
    """Optimal brain surgeon with the explicit inverse of H[i:, i:] at every column, whole matrix, no blocks."""
    weight, width = weight.double().clone(), weight.shape[1]
    hessian = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(width)
    group = format.group(width)
    dynamic = order is None and not isinstance(format.group_size, str)
    order = torch.arange(width) if order is None else order
    scale, zero = fit_matrix(weight, format)
    scale, zero = scale.expand(len(weight), -1).clone(), zero.expand(len(weight), -1).clone()
    codes = torch.zeros_like(weight)
    for i, column in enumerate(order.tolist()):
        g = 0 if isinstance(format.group_size, str) else column // group
        if dynamic and column % group == 0:
            values = weight[:, column : column + group]
            if keep is not None:
                values = values.masked_fill(keep[:, column : column + group], 0)
            scale[:, g], zero[:, g] = fit(values, format)
        code = encode(weight[:, column], scale[:, g], zero[:, g], format)
        if keep is not None:
            code = torch.where(keep[:, column], zero[:, g], code)
        codes[:, column] = code
        rest = order[i:]
        inverse = torch.linalg.inv(hessian[rest][:, rest])
        error = (weight[:, column] - (code - zero[:, g]) * scale[:, g]) / inverse[0, 0]
        weight[:, rest] -= error[:, None] * inverse[0][None]
    return codes.to(torch.uint8), scale.to(format.dtype)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("pruned", [True, False])
@pytest.mark.parametrize(
    "format",
    [IntFormat(3, 16), IntFormat(4, 24, False), IntFormat(2, "channel"), IntFormat(3, 200), IntFormat(3, "tensor")],
)
def test_equals_the_explicit_inverse_exactly(format, act_order, pruned):
    torch.manual_seed(1)
    weight, h = torch.randn(12, 150), hessian(correlated(600, 150))
    keep = torch.rand(12, 150) < 0.5 if pruned else None
    if pruned:
        weight[keep] = 0
    factor = factorise(h.double(), 0.01, act_order)
    ours = solve(weight, factor, format, keep=keep)
    codes, scales = oracle(weight, h, format, 0.01, factor.order, keep)
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.scales.expand_as(scales), scales)
    if pruned:
        assert (ours.dequantize()[keep] == 0).all()


JOINT = [
    (IntFormat(4, "channel", False), True, Unstructured(0.5, "layer")),
    (IntFormat(3, 32), True, Unstructured(0.6, "row")),
    (IntFormat(4, 16), False, Unstructured(0.5, "row")),
    (IntFormat(4, "channel"), False, NOfM(2, 4)),
    (IntFormat(3, 32, False), False, NOfM(2, 4)),
]


@pytest.mark.parametrize(("format", "act_order", "pattern"), JOINT, ids=str)
def test_pruned_in_the_same_pass_as_with_that_mask_given(format, act_order, pattern, monkeypatch):
    """Given its mask, the joint solve is GPTQ with zeros held; where bits are many, the mask is SparseGPT's."""
    torch.manual_seed(4)
    weight, h = torch.randn(12, 160), hessian(correlated(600, 160))
    made = []
    monkeypatch.setattr(gptq, "Choice", lambda *args, **how: made.append(Choice(*args, **how)) or made[-1])
    factor = factorise(h.double(), 0.01, act_order)
    ours = solve(weight, factor, format, prune=pattern)
    order = torch.arange(160) if factor.order is None else factor.order
    gone = (made[0].free == 0).T[:, order.argsort()]
    assert torch.equal(gone.sum(1).sum(), torch.tensor(round(pattern.sparsity * gone.numel())))
    assert (ours.dequantize()[gone] == 0).all()
    if isinstance(pattern, NOfM):
        assert (gone.view(12, -1, 4).sum(2) == 2).all()
    if not isinstance(pattern, NOfM) or format.group_size == "channel":  # else a grid is fitted before all is chosen
        codes, _ = oracle(weight, h, format, 0.01, factor.order, gone)
        assert torch.equal(ours.codes, codes)
    solve(weight, factor, IntFormat(8, "channel", scale_dtype="float32"), prune=pattern)
    _, mask = sparsegpt.solve(weight[:, order], factor._replace(order=None, dead=factor.dead[order]), pattern)
    assert (~mask == (made[1].free == 0).T).float().mean() > 0.97
    before = magnitude_then_gptq(weight, factor, format, pattern)
    assert output_error(weight, ours.dequantize(), h) < 0.9 * output_error(weight, before, h)


def magnitude_then_gptq(weight, factor, format, pattern):
    mask = pattern.mask(weight.abs())
    return solve(weight * mask, factor, format, keep=~mask).dequantize()


def test_the_record_of_a_layer_pruned_in_the_same_pass():
    torch.manual_seed(0)
    weight, method = torch.randn(8, 64), Gptq(IntFormat(4, 32), prune=Unstructured(0.5))
    new, record = compress(method, correlated(300, 64), weight)
    assert record.achieved["zeros"] == int((new.dequantize() == 0).sum()) >= 8 * 32
    assert record.achieved["sparsity"] == record.achieved["zeros"] / 512
    new, record = compress(method, None, weight.clone())
    assert "rounded to nearest, and pruned by magnitude" in record.note
    assert ((new.dequantize() == 0).sum(1) >= 32).all()
    assert title_of(method).endswith("prune unstructured (sparsity 0.5, scope row)")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prune": "2:4"}, "act_order false"),
        ({"prune": {"kind": "unstructured", "scope": "global"}}, "scope global compares layers"),
        ({"prune": "2:6", "act_order": False, "group_size": 64}, "multiple of 6"),
    ],
)
def test_patterns_that_do_not_go_with_gptq(options, words):
    with pytest.raises(UserError, match=words):
        read_method({"kind": "gptq", **options}, "method").prepare(None, None)


def test_groups_wider_than_a_block_are_fitted_on_updated_columns():
    torch.manual_seed(2)
    weight, h = torch.randn(4, 400), hessian(correlated(900, 400))
    factor = factorise(h.double(), 0.01, act_order=False)
    codes, scales = oracle(weight, h, IntFormat(3, 192), 0.01, None)
    ours = solve(weight, factor, IntFormat(3, 192))
    assert torch.equal(ours.codes, codes)
    assert torch.equal(ours.scales, scales)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [32, "channel"])
def test_better_than_round_to_nearest_on_correlated_inputs(bits, group):
    torch.manual_seed(3)
    weight, x = torch.randn(64, 128), correlated(1000, 128)
    h, fresh = hessian(x), hessian(correlated(1000, 128, seed=1))
    for act_order in (True, False):
        ours = solve(weight, factorise(h, 0.01, act_order), IntFormat(bits, group)).dequantize()
        nearest = quantize(weight, IntFormat(bits, group)).dequantize()
        assert output_error(weight, ours, fresh) < 0.9 * output_error(weight, nearest, fresh)


def test_output_error_is_the_error_of_the_outputs():
    weight, x = torch.randn(8, 16), torch.randn(100, 16)
    other = quantize(weight, IntFormat(3, "channel")).dequantize()
    expected = (x @ (weight - other).T).square().sum() / (x @ weight.T).square().sum()
    assert output_error(weight, other, hessian(x)) == pytest.approx(float(expected), rel=1e-4)


def compress(method, x, weight):
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight
    statistic = Hessian(weight.shape[1], weight.device)
    if x is not None:
        statistic.update(x)
    return method.compress("layer", layer, statistic)


def test_pruned_weights_stay_zero_and_unpruned_ones_are_free():
    weight, x = torch.randn(16, 64), correlated(300, 64)
    weight[torch.rand(16, 64) < 0.5] = 0
    for symmetric in (True, False):
        for act_order in (True, False):
            method = Gptq(IntFormat(3, 16, symmetric), act_order=act_order)
            new, record = compress(method, x, weight)
            assert (new.dequantize()[weight == 0] == 0).all()
            assert "zeros stay zero" in record.note
    few = torch.randn(16, 64)
    few[0, 0] = 0
    assert "zeros" not in compress(Gptq(IntFormat(3, 16)), x, few)[1].note


def test_dead_inputs_get_zero_weights_and_are_counted():
    weight, x = torch.randn(8, 64), correlated(300, 64)
    x[:, [3, 40]] = 0
    new, record = compress(Gptq(IntFormat(4, 32)), x, weight)
    assert (new.dequantize()[:, [3, 40]] == 0).all()
    assert record.note.startswith("2 inputs were zero")
    assert record.error < 0.05


def test_damping_grows_when_the_factorisation_fails_and_the_record_says_so():
    weight, x = torch.randn(8, 64), correlated(4, 64) * torch.logspace(0, 12, 64)
    new, record = compress(Gptq(IntFormat(4, 32), damping=1e-7), x, weight)
    assert "damping grown to" in record.note
    assert new.dequantize().isfinite().all()


@pytest.mark.parametrize(("beside", "damping"), [(0.5, 0.01), (1.05, 0.1), (1.5, 1.0), (6.0, 10.0), (12.0, None)])
def test_damping_grows_tenfold_up_to_ten_times_the_mean_diagonal(beside, damping):
    """The smallest eigenvalue is 1 - beside, the mean diagonal 1."""
    factor = factorise(torch.tensor([[1.0, beside], [beside, 1.0]]), 0.01, act_order=False)
    assert (factor and factor.damping) == (damping and pytest.approx(damping))


def test_a_hessian_that_cannot_be_factorised_falls_back_to_rounding_with_a_note():
    weight, statistic = torch.randn(8, 64), Hessian(64, torch.device("cpu"))
    statistic.tokens, statistic.sum = (
        1,
        torch.eye(64) - 3 * torch.ones(64, 64).triu(1) - 3 * torch.ones(64, 64).tril(-1),
    )
    layer = nn.Linear(64, 8, bias=False)
    layer.weight.data = weight
    new, record = Gptq(IntFormat(4, 32)).compress("layer", layer, statistic)
    assert "rounded to nearest" in record.note
    assert record.requested["method"] == "gptq"
    assert torch.equal(new.dequantize(), quantize(weight, IntFormat(4, 32)).dequantize())


def test_a_layer_that_no_token_reached_is_rounded_with_a_note():
    weight = torch.randn(8, 64)
    new, record = compress(Gptq(IntFormat(4, 32)), None, weight)
    assert "no calibration token reached it" in record.note
    assert torch.equal(new.dequantize(), quantize(weight, IntFormat(4, 32)).dequantize())


def test_maps_with_one_input_share_one_factorisation():
    statistic = Hessian(64, torch.device("cpu"))
    statistic.update(correlated(300, 64))
    factor = factor_of(statistic, 0.01, True, "float32")
    assert factor_of(statistic, 0.01, True, "float32") is factor
    assert factor_of(statistic, 0.01, False, "float32") is not factor


def test_broken_weights_are_refused_by_name():
    weight = torch.randn(8, 64)
    weight[2, 3] = float("nan")
    with pytest.raises(UserError, match="weight of layer holds NaN"):
        compress(Gptq(), correlated(10, 64), weight)


@pytest.mark.parametrize("arguments", [{"damping": 0}, {"damping": 2}, {"pruned_share": 0}, {"precision": "bfloat16"}])
def test_impossible_settings_are_refused(arguments):
    with pytest.raises(UserError, match=next(iter(arguments))):
        Gptq(**arguments)

"""Quantization-aware training: rounded in the forward, trained through the rounding, packed to the bit."""

import copy

import pytest
import torch

from app.evaluation.quality import evaluate_quality, paired
from compress.distillation.losses.loss import Combine, parse_losses
from compress.distillation.objective import Objective
from compress.quantization import Gptq, Nf4, Rtn
from compress.quantization.affine import IntFormat, Quantized
from compress.quantization.plan import quantize_model
from compress.quantization.qat import ORIGINAL, FakeQuantize, check_trainable, pack_again, unpack
from models.errors import UserError
from models.weight_formats import described
from tests.compress.test_allocation import EXPERTS, build, text

FORMATS = [
    IntFormat(2, 7, False),
    IntFormat(3, 8, False),
    IntFormat(2, "channel", True),
    IntFormat(4, "tensor", True),
    IntFormat(8, "channel", True, "float32"),
]


def packed(form, architecture=None):
    model = build() if architecture is None else build(architecture)
    quantize_model(model, Rtn(form), embedding=Rtn(IntFormat(8, "channel")))
    return model


def train(model, steps=3, rate=1e-2):
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0)
    for _ in range(steps):
        for batch in text():
            loss = model(batch["tokens"], targets=batch["targets"], documents=batch["documents"]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_packed_equals_the_fake_quantized_weight_to_the_bit(form):
    model = packed(form)
    before = {name: model.get_submodule(name).dequantize() for name in described(model)}
    names = unpack(model)
    assert set(names) == set(before)
    for name in names:
        assert torch.equal(model.get_submodule(name).weight, before[name])
    train(model.train().requires_grad_(True), rate=0.1)
    after = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    records = {record.name: record for record in pack_again(model)}
    assert set(described(model)) == set(names) == set(records)
    for name in names:
        assert torch.equal(model.get_submodule(name).dequantize(), after[name])
        assert not torch.equal(after[name], before[name])
    assert records["blocks.0.attention.q"].achieved["codes_changed"] > 0
    assert records["blocks.0.attention.q"].achieved["bits"] == pytest.approx(
        8 * model.get_submodule("blocks.0.attention.q").stored_bytes() / 24**2
    )


def test_the_gradient_passes_the_rounding_and_stops_at_the_ends():
    """A group of four at 2 bits, scale 0.5, zero 1: the grid is -0.5, 0, 0.5, 1."""
    codes = torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    scales, zeros = torch.tensor([[0.5]], dtype=torch.bfloat16), torch.tensor([[1]], dtype=torch.uint8)
    fake = FakeQuantize(Quantized(codes, scales, zeros, IntFormat(2, 4, False)))
    weight = torch.tensor([[-0.9, 0.1, 0.6, 3.0]], requires_grad=True)
    value = fake(weight)
    assert value.tolist() == [[-0.5, 0.0, 0.5, 1.0]]
    value.sum().backward()
    assert weight.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]
    slopes = [-1, 0 - 0.2, 1 - 1.2, 2]  # (code - zero) - w / s inside, code - zero at the ends
    expected = 0.5 * sum(slopes) * (4 * 3) ** -0.5  # d s / d shift = s, times LSQ's factor
    assert fake.shift.grad.item() == pytest.approx(expected, rel=1e-5)


def test_experts_are_trained_as_they_are_stored():
    model = packed(IntFormat(2, 8, False), EXPERTS)
    names = unpack(model)
    assert any(".experts.2.down" in name for name in names)
    train(model.train().requires_grad_(True))
    hot = [name for name in names if model.get_parameter(f"{name}.{ORIGINAL}").grad is not None]
    assert len(hot) == len(names)
    pack_again(model)
    assert set(described(model)) == set(names)


def test_other_forms_are_refused():
    model = build()
    quantize_model(model, Nf4())
    with pytest.raises(UserError, match="blocks.0.attention.q is stored as nf4"):
        check_trainable(model)


def test_training_at_two_bits_wins_back_what_gptq_lost(trained):
    student = copy.deepcopy(trained.model)
    quantize_model(student, Gptq(IntFormat(2, 64, False)), trained.calibration)
    start = evaluate_quality(student, trained.held_out)
    unpack(student)
    objective = Objective(parse_losses(["logit"]), Combine(alpha=0.2), student.config, trained.model.config)
    both = torch.nn.ModuleList([student.train().requires_grad_(True), objective])
    trained.fit(both, 60, 2e-3, lambda batch: objective(student, trained.model, batch)["total"])
    pack_again(student)
    after = evaluate_quality(student, trained.held_out)
    assert paired(start, after).high < 0
    assert {student.get_submodule(name).format.bits for name in described(student)} == {2}

"""Methods, criteria and losses that say no more than they must: everything else has a default."""

from dataclasses import dataclass

import pytest
import torch

from compress.distillation.losses.loss import LOSSES, Combine, DistillationLoss, StateLoss, parse_losses
from compress.distillation.objective import Objective
from compress.pruning import METHODS as PRUNING_METHODS
from compress.pruning.patterns import Unstructured
from compress.pruning.sparsify import sparsify
from compress.pruning.structured.importance import IMPORTANCES, Importance
from compress.pruning.structured.sequential import prune_structured
from compress.quantization.plan import quantize_model
from compress.quantization.quantizer import METHODS, read_method, title_of
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer
from tests.toys import Column, Halves

CONFIG = ModelConfig.from_dict(
    {
        "vocab_size": 50,
        "width": 32,
        "depth": 2,
        "attention": {"kind": "full", "heads": 4},
        "feedforward": {"kind": "swiglu", "width": 48},
    }
)


@dataclass(frozen=True)
class Number(Importance):
    """The number of the neuron."""

    def neurons(self, block, feedforward, statistic, expert=None):
        return torch.arange(feedforward.down.in_features, dtype=torch.float32)


@dataclass(frozen=True)
class Two(DistillationLoss):
    def build(self, student, teacher):
        return TwoLoss()


class TwoLoss(StateLoss):
    def forward(self, student, teacher, counted):
        return 2.0 * counted.float().mean()


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    for registry, cls in ((METHODS, Halves), (PRUNING_METHODS, Column), (IMPORTANCES, Number), (LOSSES, Two)):
        monkeypatch.setattr(registry, "_specs", dict(registry._specs))
        registry.register("toy")(cls)


def test_a_method_of_one_function_quantizes_a_model():
    method = read_method({"kind": "toy", "step": 0.25}, "method")
    model = Transformer(CONFIG)
    records = quantize_model(model, method)
    assert {record.requested["step"] for record in records if not record.skipped} == {0.25}
    assert all((m.weight * 4 == (m.weight * 4).round()).all() for m in model.blocks[1].feedforward.children())
    assert title_of(method) == "TOY, step 0.25"
    assert not method.calibrates
    with pytest.raises(UserError, match="how many bytes method toy takes"):
        method.stored_form(torch.nn.Linear, (4, 4))


def test_a_criterion_of_scores_alone_needs_no_data_and_is_not_comparable():
    model = Transformer(CONFIG)
    sparsify(model, "toy", Unstructured(0.25))
    assert not model.blocks[0].attention.q.weight[:, :8].any()
    assert model.blocks[0].attention.q.weight[:, 8:].all()
    with pytest.raises(UserError, match="scores of 'toy' cannot be compared"):
        sparsify(model, "toy", Unstructured(0.25, "global"))


def test_a_structured_criterion_of_neurons_alone():
    model = Transformer(CONFIG)
    last = model.blocks[1].feedforward.up.weight[12:].clone()
    prune_structured(model, ["neurons"], 0.25, "toy")
    assert torch.equal(model.blocks[1].feedforward.up.weight, last)


def test_a_loss_that_needs_no_hidden_states():
    objective = Objective(parse_losses(["logit", "toy"]), Combine(weights={"toy": 3}), CONFIG, CONFIG)
    model, tokens = Transformer(CONFIG), torch.randint(50, (2, 8))
    terms = objective(model, model, {"tokens": tokens, "targets": tokens})
    assert terms["toy"] == 2
    torch.testing.assert_close(terms["total"], 0.5 * terms["cross_entropy"] + 0.5 * terms["logit"] + 6)

"""Optimizers: who decays, who goes through Muon, and that two of them behave as one. Schedules: their closed forms."""

import itertools
import math

import pytest
import torch
from torch import nn

from app.optim import AdamW, Constant, Cosine, Muon, WarmupStableDecay
from app.optim.base import parameters_by_role
from app.tasks.gradients import scale_and_clip
from models.config import ModelConfig
from models.cpu import dispatch
from models.errors import UserError
from models.transformer import Transformer

ARCHITECTURE = {
    "vocab_size": 64,
    "width": 16,
    "depth": 2,
    "attention": {"kind": "full", "heads": 2, "bias": True},
    "feedforward": {"kind": "swiglu", "width": 32},
}


def build(**changes) -> Transformer:
    torch.manual_seed(0)
    return Transformer(ModelConfig.from_dict({**ARCHITECTURE, **changes}))


def names(model: nn.Module, parameters) -> set[str]:
    wanted = {id(parameter) for parameter in parameters}
    return {name for name, parameter in model.named_parameters() if id(parameter) in wanted}


def step(model: nn.Module, optimizer, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()


def test_roles_cover_every_parameter_once():
    model = build(head="untied", position="learned")
    roles = parameters_by_role(model)
    assert sum(len(parameters) for parameters in roles.values()) == len(list(model.parameters()))
    assert names(model, roles["head"]) == {"head.weight"}
    assert names(model, roles["embedding"]) == {"embedding.weight", "positions.0.table.weight"}
    assert all(name.startswith("blocks.") and name.endswith("weight") for name in names(model, roles["hidden"]))
    vectors = names(model, roles["vector"])
    assert "norm.weight" in vectors
    assert "blocks.0.attention.q.bias" in vectors


def test_a_tied_head_belongs_to_the_embedding():
    roles = parameters_by_role(build())
    assert roles["head"] == []
    assert len(roles["embedding"]) == 1


def test_norms_biases_and_embeddings_do_not_decay():
    model = build(head="untied")
    groups = AdamW(weight_decay=0.3).build(model).param_groups
    decay = {name: group["weight_decay"] for group in groups for name in names(model, group["params"])}
    assert all(value == (0.3 if name.endswith("weight") and "norm" not in name and name != "embedding.weight" else 0.0)
               for name, value in decay.items())  # fmt: skip
    assert set(decay) == set(names(model, model.parameters()))
    assert all(group["fused"] for group in groups)


@pytest.mark.parametrize("widens", [False, True])
def test_muon_with_adamw_equals_the_two_apart(widens, monkeypatch):
    monkeypatch.setattr(dispatch, "WIDENS_BF16", widens)
    model, other = build(head="untied"), build(head="untied")
    both = Muon(lr=0.01, adamw_lr=0.02, weight_decay=0.1).build(model)
    roles = parameters_by_role(other)
    muon = torch.optim.Muon(roles["hidden"], lr=0.01, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(
        [
            {"params": roles["head"], "weight_decay": 0.1},
            {"params": roles["embedding"] + roles["vector"], "weight_decay": 0.0},
        ],
        lr=0.02, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    for seed in range(3):
        step(model, both, seed)
        step(other, muon, seed)
        step(other, adamw, seed)
    start, hidden = build(head="untied"), names(model, parameters_by_role(model)["hidden"])
    for (name, mine), theirs, first in zip(
        model.named_parameters(), other.parameters(), start.parameters(), strict=True
    ):
        if widens and name in hidden:  # orthogonalised in fp32, theirs in bf16
            assert (mine - theirs).norm() < 0.03 * (theirs - first).norm(), name
        else:
            assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_a_saved_optimizer_goes_on_exactly(kind, tmp_path):
    model = build()
    optimizer = kind(lr=0.01).build(model)
    step(model, optimizer)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state")
    step(model, optimizer, 2)

    saved = torch.load(tmp_path / "state", weights_only=True)
    copy = build()
    copy.load_state_dict(saved["model"])
    other = kind(lr=0.01).build(copy)
    other.load_state_dict(saved["optimizer"])
    step(copy, other, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))


@pytest.mark.parametrize("kind", [AdamW, Muon])
def test_options_win_over_loaded_ones(kind):
    old, new = kind(lr=0.5, weight_decay=0.5).build(build()), kind(lr=0.01, weight_decay=0.2).build(build())
    new.load_state_dict(old.state_dict())
    assert new.param_groups[0]["lr"] == 0.01
    assert new.param_groups[0]["weight_decay"] == 0.2


def test_muon_refuses_what_is_no_matrix_and_no_stack_of_them():
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 3, 4, 5))

    with pytest.raises(UserError, match=r"\(2, 3, 4, 5\)"):
        Muon().build(Stack())


def test_schedules_in_closed_form():
    cosine = Cosine(warmup_steps=4, floor=0.1)
    assert [cosine.factor(step, 104) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert cosine.factor(4, 104) == pytest.approx(1.0)
    assert cosine.factor(54, 104) == pytest.approx(0.1 + 0.9 * 0.5)
    assert cosine.factor(29, 104) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert cosine.factor(104, 104) == pytest.approx(0.1)
    assert cosine.factor(200, 104) == pytest.approx(0.1)
    stable = WarmupStableDecay(warmup_steps=2, decay=0.25, floor=0.2)
    assert [stable.factor(step, 40) for step in (0, 1, 2, 29, 30)] == [0.5, 1.0, 1.0, 1.0, 1.0]
    assert stable.factor(35, 40) == pytest.approx(0.6)
    assert stable.factor(40, 40) == pytest.approx(0.2)
    late = WarmupStableDecay(warmup_steps=16, decay=0.25, floor=0.2)  # a share of all 40 steps, not of the last 24
    assert [late.factor(step, 40) for step in (30, 31, 35)] == pytest.approx([1.0, 0.92, 0.6])
    short = WarmupStableDecay(warmup_steps=30, decay=0.5, floor=0.0)  # no part of the decay is in the warm-up
    assert [short.factor(step, 40) for step in (29, 30, 31, 40)] == pytest.approx([1.0, 1.0, 0.9, 0.0])
    assert [Constant(2).factor(step, 0) for step in (0, 1, 2, 999)] == [0.5, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("schedule", [Cosine(3), WarmupStableDecay(3), Constant(3)])
def test_schedules_never_leave_their_bounds(schedule):
    factors = [schedule.factor(step, 50) for step in range(60)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert max(factors) == 1.0
    assert all(a >= b for a, b in itertools.pairwise(factors[3:]))


def test_the_rate_moves_on_every_step_and_survives_a_checkpoint():
    model = build()
    optimizer = Muon(lr=0.1, adamw_lr=0.2).build(model)
    schedule = Cosine(2, floor=0.0).build(optimizer, 10)
    rates = []
    for seed in range(5):
        rates.append([group["lr"] for group in optimizer.param_groups])
        step(model, optimizer, seed)
        schedule.step()
    factors = [Cosine(2, floor=0.0).factor(step, 10) for step in range(5)]
    assert rates == [[0.1 * factor, 0.2 * factor] for factor in factors]
    other = Muon(lr=0.1, adamw_lr=0.2).build(build())
    loaded = Cosine(2, floor=0.0).build(other, 10)
    loaded.load_state_dict(schedule.state_dict())
    assert [group["lr"] for group in other.param_groups] == [group["lr"] for group in optimizer.param_groups]


def test_schedules_refuse_what_cannot_be():
    optimizer = AdamW().build(build())
    with pytest.raises(UserError, match="max_steps"):
        Cosine().build(optimizer, float("inf"))
    with pytest.raises(UserError, match="warmup_steps is 20"):
        Cosine(20).build(optimizer, 10)
    with pytest.raises(UserError, match="floor"):
        Cosine(floor=2.0)
    with pytest.raises(UserError, match="decay"):
        WarmupStableDecay(decay=0.0)
    assert Constant().build(optimizer, float("inf")).get_last_lr()[0] == 1e-3


def test_scaling_and_clipping_equal_torchs():
    model, other = build(), build()
    for m in (model, other):
        step(m, torch.optim.SGD(m.parameters(), lr=0.0))
    norm = scale_and_clip(model.parameters(), torch.tensor(0.5), 1.0)
    for parameter in other.parameters():
        parameter.grad.mul_(0.5)
    expected = torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
    assert norm == pytest.approx(float(expected), rel=1e-6)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_gradient_within_the_limit_is_left_alone():
    model = build()
    step(model, torch.optim.SGD(model.parameters(), lr=0.0))
    before = [parameter.grad.clone() for parameter in model.parameters()]
    scale_and_clip(model.parameters(), torch.tensor(1.0), 1e6)
    assert all(torch.equal(a, b.grad) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("max_norm", [-1.0, math.nan])
def test_a_norm_below_zero_is_refused(max_norm):
    with pytest.raises(UserError, match="gradient_clip_val must be at least 0"):
        scale_and_clip(build().parameters(), torch.tensor(1.0), max_norm)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (AdamW, {"lr": -1.0}, "lr of AdamW must be a number of at least 0, not -1.0"),
        (AdamW, {"betas": (0.9, 1.0)}, "betas of AdamW"),
        (AdamW, {"weight_decay": math.nan}, "weight_decay of AdamW"),
        (Muon, {"lr": -1.0}, "lr of Muon"),
        (Muon, {"adamw_lr": -1.0}, "adamw_lr of Muon"),
        (Muon, {"momentum": 1.0}, "momentum of Muon must be below 1"),
    ],
)
def test_numbers_that_no_optimizer_takes_are_refused(kind, options, message):
    with pytest.raises(UserError, match=message):
        kind(**options)

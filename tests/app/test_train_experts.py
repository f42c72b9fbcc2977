"""Training with experts: how their weights move, what is counted, and what TensorBoard shows of them."""

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from training_help import Interrupted, StopAfter, fit, language_model, make_trainer, state_hash, text_data

from app.callbacks import ExpertLoad
from app.callbacks.checkpoints import newest_checkpoint
from app.evaluation.experts import Loads, variation
from app.evaluation.quality import evaluate_quality
from app.evaluation.report.charts import load_picture
from app.evaluation.size import layer_sizes, size_figures
from app.optim import AdamW, Muon
from app.optim.base import parameters_by_role
from app.optim.muon import orthogonalized
from app.tasks.architecture import resolve_architecture
from compress.distillation.losses.loss import Combine
from compress.distillation.objective import Objective
from models.config import ModelConfig
from models.errors import UserError
from models.experts import MixtureOfExperts
from models.transformer import Transformer

EXPERTS = {
    "kind": "experts",
    "count": 4,
    "top_k": 2,
    "expert": {"kind": "swiglu", "width": 16},
    "balance": [{"kind": "bias", "rate": 0.01}, {"kind": "auxiliary", "weight": 0.01}],
}
ARCHITECTURE = {
    "width": 32,
    "depth": 2,
    "attention": {"kind": "full", "heads": 4},
    "feedforward": {"dense": {"kind": "swiglu", "width": 32}, "moe": EXPERTS},
    "layers": ["dense", "moe"],
}


class Stack(nn.Module):
    """Three experts' matrices and biases, as `models.experts.stacked` holds them."""

    def __init__(self, rows=6, columns=10):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(3, rows, columns, generator=generator))
        self.up_bias = nn.Parameter(torch.zeros(3, rows))


@pytest.mark.parametrize(("rows", "columns"), [(6, 10), (10, 6), (8, 8)])
def test_muon_moves_each_matrix_of_a_stack_as_if_it_were_alone(rows, columns):
    stack = Stack(rows, columns)
    apart = [nn.Parameter(matrix.clone()) for matrix in stack.up.detach()]
    ours = Muon(lr=0.1, weight_decay=0.2).build(stack)
    theirs = torch.optim.Muon(apart, lr=0.1, momentum=0.95, weight_decay=0.2, adjust_lr_fn="match_rms_adamw")
    start, sizes = stack.up.detach().clone(), torch.tensor([1.0, 1e-3, 50.0])[:, None, None]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        stack.up.grad = torch.randn(stack.up.shape, generator=generator) * sizes
        for matrix, gradient in zip(apart, stack.up.grad, strict=True):
            matrix.grad = gradient.clone()
        ours.step()
        theirs.step()
    moved, wanted = stack.up.detach() - start, torch.stack([one.detach() for one in apart]) - start
    assert (moved - wanted).norm() < 0.01 * wanted.norm()  # both iterate in bf16


def test_the_matrices_of_a_stack_become_orthogonal_one_by_one():
    stack = torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(1))
    stack[3] = 0  # an expert that saw no token
    values = torch.linalg.svdvals(orthogonalized(stack).float())  # (E, 6)
    assert (values[:3] > 0.4).all()
    assert (values[:3] < 1.6).all()
    assert (values[3] == 0).all()


def test_stacks_decay_as_matrices_do_and_their_biases_as_biases():
    stack = Stack()
    roles = parameters_by_role(stack)
    assert [one.shape for one in roles["hidden"]] == [(3, 6, 10)]
    assert [one.shape for one in roles["vector"]] == [(3, 6)]
    for optimization in (AdamW(weight_decay=0.3), Muon(weight_decay=0.3)):
        groups = optimization.build(stack).param_groups
        decay = {id(one): group["weight_decay"] for group in groups for one in group["params"]}
        assert decay == {id(stack.up): 0.3, id(stack.up_bias): 0.0}


def test_muon_on_stacks_goes_on_exactly_from_what_was_saved(tmp_path):
    stack, other = Stack(), Stack()
    optimizer, again = (Muon(lr=0.1).build(one) for one in (stack, other))

    def step(module, own, seed):
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        own.step()

    step(stack, optimizer, 1)
    torch.save([stack.state_dict(), optimizer.state_dict()], tmp_path / "state")
    step(stack, optimizer, 2)
    weights, state = torch.load(tmp_path / "state", weights_only=True)
    other.load_state_dict(weights)
    again.load_state_dict(state)
    step(other, again, 2)
    assert all(torch.equal(a, b) for a, b in zip(stack.parameters(), other.parameters(), strict=True))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def mixtures(module: nn.Module) -> list[MixtureOfExperts]:
    return [one for one in module.modules() if isinstance(one, MixtureOfExperts)]


def build(**changes) -> Transformer:
    torch.manual_seed(0)
    values = {"vocab_size": 60, "context": 32, **ARCHITECTURE}
    return Transformer(ModelConfig.from_dict(values | changes))


def watched(model, monkeypatch):
    """Every choice that a training forward of `model` makes, and the bias behind each call of `after_step`."""
    choices, biases = [], []
    route, after = MixtureOfExperts._route, MixtureOfExperts.after_step

    def routing(self, x, real, context):
        found = route(self, x, real, context)
        if self.training:
            choices.append(torch.bincount(found[0].chosen.flatten(), minlength=4).double())
        return found

    def stepped(self):
        after(self)
        biases.append(self.router.bias.clone())

    monkeypatch.setattr(MixtureOfExperts, "_route", routing)
    monkeypatch.setattr(MixtureOfExperts, "after_step", stepped)
    return choices, biases


def test_the_bias_moves_once_a_step_by_the_load_of_all_its_batches(tmp_path, cache, monkeypatch):
    data = text_data(cache, cross_documents=True)  # no padding: every choice counts
    model = language_model(architecture=ARCHITECTURE)
    choices, biases = watched(model, monkeypatch)
    fit(make_trainer(tmp_path / "run", max_steps=3, accumulate_grad_batches=2), model, data)
    assert (len(choices), len(biases)) == (6, 3)
    bias = torch.zeros(4)
    for step in range(3):
        load = choices[2 * step] + choices[2 * step + 1]
        bias = bias + 0.01 * (load.mean() - load).sign().float()
        assert torch.equal(biases[step], bias)
    assert bias.any()


def test_a_resumed_run_has_the_same_experts_and_biases(tmp_path, cache):
    def run(name, *callbacks, resume=None):
        model = language_model(architecture=ARCHITECTURE, optimizer=Muon(lr=3e-3), compute_dtype="bfloat16")
        trainer = make_trainer(tmp_path / name, *callbacks, max_steps=8, accumulate_grad_batches=2)
        try:
            fit(trainer, model, text_data(cache), resume)
        except Interrupted:
            return None
        return model

    whole = run("whole")
    assert run("stopped", StopAfter(5)) is None
    checkpoint = newest_checkpoint(tmp_path / "stopped.run" / "checkpoints")
    resumed = run("stopped", resume=checkpoint)
    (mixture,) = mixtures(whole)
    assert mixture.router.bias.dtype == torch.float32
    assert mixture.router.bias.any()
    assert state_hash(resumed) == state_hash(whole)


def test_tensorboard_shows_the_experts(tmp_path, cache):
    fit(make_trainer(tmp_path / "run", ExpertLoad(2)), language_model(architecture=ARCHITECTURE), text_data(cache))
    events = EventAccumulator(str(tmp_path / "run.run"))
    events.Reload()
    for group in ("experts", "validation_experts"):
        for name in ("load_variation", "dropped", "entropy", "balance"):
            assert f"{group}/{name}/block_1" in events.Tags()["scalars"]
    assert [event.step for event in events.Scalars("experts/entropy/block_1")] == [2, 4, 6, 8, 10]
    assert all(0 < event.value < 1.39 for event in events.Scalars("experts/entropy/block_1"))  # ln 4 = 1.386
    assert all(event.value >= 0.98 for event in events.Scalars("experts/balance/block_1"))
    pictures = events.Images("experts/load")
    assert [picture.step for picture in pictures] == [4, 8]
    assert pictures[0].encoded_image_string.startswith(b"\x89PNG")


def test_figures_of_experts_are_read_when_they_are_logged_alone(tmp_path, cache, monkeypatch):
    read = []
    figures = Loads.figures
    monkeypatch.setattr(Loads, "figures", lambda self, *given: read.append(1) or figures(self, *given))
    trainer = make_trainer(tmp_path / "run", ExpertLoad(5), max_steps=10, limit_val_batches=0)
    fit(trainer, language_model(architecture=ARCHITECTURE), text_data(cache))
    assert len(read) == 2


def test_a_model_without_experts_logs_nothing_of_them(tmp_path, cache):
    fit(make_trainer(tmp_path / "run", ExpertLoad(1), max_steps=4), language_model(), text_data(cache))
    events = EventAccumulator(str(tmp_path / "run.run"))
    events.Reload()
    assert not [tag for tag in events.Tags()["scalars"] + events.Tags()["images"] if "experts" in tag]


def blocks(rows=3):
    tokens = torch.randint(60, (rows, 17), generator=torch.Generator().manual_seed(2))
    return [{"tokens": row[:-1], "targets": row[1:]} for row in tokens]


def test_an_evaluation_gathers_the_load_over_all_batches():
    model = build()
    quality = evaluate_quality(model, blocks(), batch_size=2)  # two batches, the second one smaller
    counted = torch.zeros(4)
    for block in blocks():
        model.eval()(block["tokens"][None])
        counted += mixtures(model)[0].statistics.load / 3
    (found,) = quality.experts.values()
    assert list(quality.experts) == ["blocks.1"]
    assert found["load"] == pytest.approx(counted.tolist())
    assert found["load_variation"] == pytest.approx(float(counted.std(correction=0) / counted.mean()))
    assert found["dropped"] == 0
    assert evaluate_quality(build(layers=["dense"]), blocks()).experts == {}


def test_the_load_picture_has_a_row_for_every_layer_and_a_panel_for_every_model():
    figures = {"blocks.1": {"load": [0.5, 0.5, 0.0, 0.0]}, "blocks.3": {"load": [0.25] * 4}}
    assert load_picture({"dense": {}}, "") is None
    chart = load_picture({"dense": {}, "one": figures, "two": {"blocks.0": {"load": [0.5, 0.5]}}}, "Load")
    drawn = chart.svg()
    for text in ("one", "two", "block 1", "block 3", "2.0"):
        assert f">{text}<" in drawn
    assert ">dense<" not in drawn
    assert variation([0.5, 0.5, 0.0, 0.0]) == 1
    assert variation([0.0, 0.0]) == 0


def active(model: Transformer) -> int:
    """The weights that one token meets, counted by their gradients: all others get zeros."""
    model(torch.tensor([[3]]), targets=torch.tensor([[4]])).loss.backward()
    total = 0
    for parameter in model.parameters():
        met = parameter.grad.flatten(1).any(1).float().mean() if parameter.ndim == 3 else 1
        total += round(float(met) * parameter.numel())
    return total


@pytest.mark.parametrize("shared", [None, {"kind": "mlp", "width": 8}])
def test_active_parameters_are_those_that_a_token_meets(shared):
    experts = EXPERTS | {"shared": shared, "balance": []}
    model = build(feedforward=ARCHITECTURE["feedforward"] | {"moe": experts})
    figures = size_figures(model)
    assert figures["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert figures["active_parameters"] == model.count_parameters()["active"] == active(model)
    assert figures["active_parameters"] == figures["parameters"] - 2 * 3 * 16 * 32


def test_a_student_with_experts_is_told_to_balance_them():
    student, teacher = build().train(), build(layers=["dense"]).eval()
    objective = Objective({}, Combine(alpha=1.0), student.config, teacher.config)
    batch = {name: torch.stack([block[name] for block in blocks()]) for name in ("tokens", "targets")}
    terms = objective(student, teacher, batch)
    assert float(terms["balance"]) > 0
    torch.testing.assert_close(terms["total"], terms["cross_entropy"] + terms["balance"])
    assert "balance" not in objective(student.eval(), teacher, batch)


@pytest.mark.parametrize("layout", ["stacked", "separate"])
def test_the_flops_of_the_layers_are_those_of_a_token(layout):
    feedforward = ARCHITECTURE["feedforward"] | {"moe": EXPERTS | {"layout": layout}}
    model = build(feedforward=feedforward, depths=[None, {"kind": "mixture_of_depths", "capacity": 0.25}])
    length = 8
    scores = 4 * 32 * length + 0.25 * 4 * 32 * (0.25 * length)  # of the two attentions, which hold no weights
    assert sum(layer.flops for layer in layer_sizes(model)) == model.flops_per_token(length) - scores


def test_a_step_with_muon_is_the_same_in_both_layouts():
    models = [build(feedforward=ARCHITECTURE["feedforward"] | {"moe": EXPERTS | {"layout": layout}})
              for layout in ("stacked", "separate")]  # fmt: skip
    stacked, separate = (mixtures(model)[0].experts for model in models)
    with torch.no_grad():
        for number, expert in enumerate(separate):
            for name in ("gate", "up", "down"):
                getattr(expert, name).weight.copy_(getattr(stacked, name)[number])
    rest = {name: value for name, value in models[0].state_dict().items() if "experts" not in name}
    models[1].load_state_dict(rest, strict=False)
    before = stacked.up.detach().clone()
    for model in models:
        optimizer = Muon(lr=0.01).build(model)
        model(blocks()[0]["tokens"][None], targets=blocks()[0]["targets"][None]).loss.backward()
        optimizer.step()
    moved = (stacked.up - before).norm()
    apart = torch.stack([expert.up.weight for expert in separate])
    assert moved > 0
    assert (stacked.up - apart).norm() < 0.02 * moved


def test_a_router_that_would_learn_nothing_is_not_trained_anew():
    architecture = ARCHITECTURE | {"feedforward": {**ARCHITECTURE["feedforward"], "moe": EXPERTS | {"top_k": 1}}}
    with pytest.raises(UserError, match="router would learn nothing"):
        resolve_architecture(architecture, 50, 32)
    probability = {"kind": "softmax", "weights": "probability"}
    learning = architecture["feedforward"]["moe"] | {"router": probability}
    resolve_architecture(architecture | {"feedforward": {**architecture["feedforward"], "moe": learning}}, 50, 32)

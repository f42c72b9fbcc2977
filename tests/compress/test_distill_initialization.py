"""What a student starts from, and the objective over two whole models."""

import pytest
import torch

from compress.distillation.initialization import INITIALIZATIONS, Layers
from compress.distillation.layer_map import Explicit
from compress.distillation.losses import logit
from compress.distillation.losses.loss import Combine, parse_losses
from compress.distillation.objective import Objective, check_output, require_same_vocabulary
from models import backbone
from models.config import ModelConfig
from models.errors import UserError
from models.reversible import run_reversible
from models.transformer import Transformer


def tiny(depth=2, width=16, seed=0, **changes):
    torch.manual_seed(seed)
    values = {
        "vocab_size": 40,
        "width": width,
        "depth": depth,
        "attention": {"kind": "full", "heads": 2},
        "feedforward": {"kind": "swiglu", "width": 24},
    }
    return Transformer(ModelConfig.from_dict({**values, **changes}))


def batch(padded=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 40, (2, 13), generator=generator)
    tokens, targets = drawn[:, :-1].clone(), drawn[:, 1:].clone()
    documents = torch.zeros(2, 12, dtype=torch.int32)
    if padded:
        targets[1, 8:], documents[1, 8:] = -100, -1
    return {"tokens": tokens, "targets": targets, "documents": documents}


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_every_k_th_block_is_copied(head):
    student, teacher = tiny(2, seed=1, head=head), tiny(6, head=head)
    done = INITIALIZATIONS.parse("layers", "initialization").apply(student, teacher)
    assert done["blocks"] == [[0, 2], [1, 5]]
    for ours, theirs in done["blocks"]:
        for name, tensor in student.blocks[ours].state_dict().items():
            assert torch.equal(tensor, teacher.blocks[theirs].state_dict()[name])
    assert torch.equal(student.embedding.weight, teacher.embedding.weight)
    assert set(done["copied"]) == {"embedding.weight", "norm.weight"} | ({"head.weight"} if head == "untied" else set())
    with torch.no_grad():
        student.blocks[0].attention.q.weight.zero_()
    assert teacher.blocks[2].attention.q.weight.any()


def test_all_layers_copied_is_the_teacher():
    student, teacher = tiny(3, seed=1), tiny(3)
    Layers().apply(student, teacher)
    data = batch()["tokens"]
    assert torch.equal(student(data).logits, teacher(data).logits)


def test_positions_of_a_layer_follow_the_layer():
    student, teacher = tiny(2, seed=1, position="shaw"), tiny(4, position="shaw")
    done = Layers().apply(student, teacher)
    assert done["blocks"] == [[0, 1], [1, 3]]
    for ours, theirs in done["blocks"]:
        copied, source = student.positions[ours].state_dict(), teacher.positions[theirs].state_dict()
        assert copied
        assert all(torch.equal(tensor, source[name]) for name, tensor in copied.items())


def test_positions_that_all_layers_share_are_copied():
    for position in ("t5", "learned"):
        student, teacher = tiny(1, seed=1, position=position), tiny(3, position=position)
        Layers().apply(student, teacher)
        ours, theirs = student.positions.state_dict(), teacher.positions.state_dict()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_random_changes_nothing():
    student = tiny(seed=1)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    assert INITIALIZATIONS.parse("random", "initialization").apply(student, tiny(4)) == {"kind": "random"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [{"width": 32}, {"feedforward": {"kind": "swiglu", "width": 32}}, {"feedforward": {"kind": "mlp", "width": 24}}],
)
def test_layers_of_another_shape_cannot_be_copied(changes):
    with pytest.raises(UserError, match="use initialisation 'random'"):
        Layers().apply(tiny(2, **changes), tiny(4))


def test_copied_blocks_can_be_chosen():
    student, teacher = tiny(2, seed=1), tiny(4)
    Layers(Explicit([[0, 0], [1, 3]])).apply(student, teacher)
    assert torch.equal(student.blocks[0].attention.q.weight, teacher.blocks[0].attention.q.weight)


@pytest.mark.parametrize("residual", ["standard", "reversible"])
def test_hidden_states_and_taps_are_those_of_the_forward(residual):
    model = tiny(3, residual=residual)
    data = batch(padded=True)
    hidden = model.hidden(data["tokens"], documents=data["documents"], taps=("blocks.0", "blocks.2"))
    output = model(data["tokens"], documents=data["documents"], taps=("blocks.0", "blocks.2"))
    assert torch.equal(model.project(hidden.x), output.logits)
    assert hidden.taps.keys() == output.taps.keys() == {"blocks.0", "blocks.2"}
    assert all(torch.equal(hidden.taps[name], output.taps[name]) for name in hidden.taps)


def objective(student, teacher, losses=("logit", "feature"), **combine):
    torch.manual_seed(3)
    return Objective(parse_losses(list(losses)), Combine(**combine), student.config, teacher.config)


def test_the_objective_is_the_weighted_sum_of_its_terms():
    student, teacher, data = tiny(2, seed=1), tiny(4, width=32), batch(padded=True)
    whole = objective(student, teacher, alpha=0.25, weights={"logit": 2.0, "feature": 0.5})
    terms = whole(student, teacher, data)
    expected = 0.25 * terms["cross_entropy"] + 0.75 * 2.0 * terms["logit"] + 0.5 * terms["feature"]
    assert float(terms["total"].detach()) == pytest.approx(float(expected), rel=1e-6)
    student_logits = student(data["tokens"], documents=data["documents"]).logits.flatten(0, 1)
    teacher_logits = teacher(data["tokens"], documents=data["documents"]).logits.flatten(0, 1)
    reference = logit.logit_terms_reference(student_logits, teacher_logits, data["targets"].flatten(), 2.0, 0.25, 1.5)
    for name in ("cross_entropy", "divergence", "agreement"):
        ours = terms["logit" if name == "divergence" else name]
        assert float(ours) == pytest.approx(float(getattr(reference, name)), rel=1e-4)


def test_a_reversible_student_trains_with_reversible_memory_where_no_loss_looks_inside(monkeypatch):
    runs = []

    def watched(*arguments):
        runs.append(arguments)
        return run_reversible(*arguments)

    monkeypatch.setattr(backbone, "run_reversible", watched)
    student, teacher, data = tiny(3, seed=1, residual="reversible"), tiny(4, width=32), batch(padded=True)
    objective(student, teacher, ["logit"], alpha=0.25)(student, teacher, data)["total"].backward()
    assert len(runs) == 1
    found = [parameter.grad.clone() for parameter in student.parameters()]
    student.zero_grad()
    kept = objective(student, teacher, alpha=0.25, weights={"feature": 0.0})  # features are read inside: all is kept
    kept(student, teacher, data)["total"].backward()
    assert len(runs) == 1
    for mine, parameter in zip(found, student.parameters(), strict=True):
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-6)


def test_padding_changes_neither_terms_nor_gradients():
    results = []
    for filler in (0, 17):
        student, teacher, data = tiny(2, seed=1), tiny(4, width=32), batch(padded=True)
        data["tokens"][1, 8:] = filler
        terms = objective(student, teacher)(student, teacher, data)
        terms["total"].backward()
        results.append((terms, student.blocks[0].attention.q.weight.grad))
    assert all(torch.allclose(results[0][0][name], results[1][0][name], rtol=1e-6) for name in results[0][0])
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_gradients_reach_all_of_the_student_and_nothing_of_the_teacher(head):
    student, teacher = tiny(2, seed=1, head=head), tiny(4, width=32)
    whole = objective(student, teacher)
    whole(student, teacher, batch())["total"].backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in student.parameters())
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in whole.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_alpha_one_is_plain_training():
    student, teacher, data = tiny(2, seed=1), tiny(4), batch(padded=True)
    total = objective(student, teacher, ["logit"], alpha=1.0)(student, teacher, data)["total"]
    total.backward()
    ours = student.embedding.weight.grad.clone()
    student.zero_grad()
    loss = student(data["tokens"], targets=data["targets"], documents=data["documents"]).loss
    loss.backward()
    assert float(total.detach()) == pytest.approx(float(loss.detach()), rel=1e-6)
    torch.testing.assert_close(ours, student.embedding.weight.grad, rtol=1e-4, atol=1e-7)


def test_projectors_belong_to_the_objective_not_to_the_student():
    student, teacher = tiny(2), tiny(4, width=32)
    names = [name for name, _ in objective(student, teacher).named_parameters()]
    assert names == ["states.feature.projector.maps.0.weight", "states.feature.projector.maps.1.weight"]
    assert not any("projector" in name for name in student.state_dict())


def test_another_vocabulary_is_refused():
    with pytest.raises(UserError, match=r"teacher's vocabulary has 50 tokens, the student's 40"):
        objective(tiny(), tiny(vocab_size=50))
    with pytest.raises(UserError, match="differ in 2 entries"):
        require_same_vocabulary(3, 3, {"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 1, "d": 2})
    require_same_vocabulary(3, 3, {"a": 0, "b": 1}, {"a": 0, "b": 1})


def test_a_quantized_head_cannot_be_trained():
    model = tiny(head="untied")
    model.head = torch.nn.Identity()
    with pytest.raises(UserError, match="distil before quantizing"):
        check_output(model)


MIXTURE = {"kind": "experts", "count": 4, "top_k": 2, "expert": {"kind": "swiglu", "width": 24}}


@pytest.mark.parametrize("layout", ["stacked", "separate"])
@pytest.mark.parametrize("biased", [False, True])
def test_an_upcycled_student_computes_what_its_dense_teacher_does(layout, biased):
    dense = {"kind": "swiglu", "width": 24, "bias": biased, "out_bias": biased}
    mixture = MIXTURE | {"layout": layout, "expert": dense}
    student, teacher = tiny(2, seed=1, feedforward=mixture), tiny(4, feedforward=dense)
    router = student.blocks[0].feedforward.router.projection.weight.clone()
    assert INITIALIZATIONS.parse("upcycled", "initialization").apply(student, teacher)["blocks"] == [[0, 1], [1, 3]]
    assert torch.equal(student.blocks[0].feedforward.router.projection.weight, router)
    with torch.no_grad():  # the teacher of the two blocks that were copied
        x, context = teacher.embed(batch()["tokens"])
        for number in (1, 3):
            x = teacher.blocks[number](x, context).y
        expected = teacher.project(teacher.finish(x))
    torch.testing.assert_close(student(batch()["tokens"]).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("feedforward", "message"),
    [
        (MIXTURE | {"expert": {"kind": "swiglu", "width": 12}}, "layers can be copied only between equal shapes"),
        (MIXTURE | {"shared": {"kind": "swiglu", "width": 24}}, "would count twice"),
    ],
)
def test_a_student_whose_experts_cannot_be_copies_is_refused(feedforward, message):
    with pytest.raises(UserError, match=message):
        INITIALIZATIONS.parse("upcycled", "initialization").apply(tiny(2, feedforward=feedforward), tiny(4))


@pytest.mark.parametrize("back", [False, True])
def test_a_dense_teacher_teaches_experts_and_the_other_way_round(back):
    balance = [{"kind": "auxiliary", "weight": 0.1}]
    student, teacher = tiny(2, feedforward=MIXTURE | {"balance": balance}), tiny(4, seed=1, width=24)
    if back:
        student, teacher = teacher, student
    losses = parse_losses(["logit", {"kind": "feature", "layer_map": "uniform"}])
    objective = Objective(losses, Combine(0.3), student.config, teacher.config)
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.Adam([*student.parameters(), *objective.parameters()], lr=0.01)
    data, totals = batch(padded=True), []
    for _ in range(12):
        terms = objective(student.train(), teacher, data)
        optimizer.zero_grad()
        terms["total"].backward()
        optimizer.step()
        totals.append(float(terms["total"].detach()))
    assert totals[-1] < 0.8 * totals[0]
    assert ("balance" in terms) == (not back)
    if not back:
        assert float(terms["balance"]) > 0
        router = student.blocks[0].feedforward.router.projection.weight
        assert router.grad.abs().sum() > 0


def test_positions_that_are_added_to_the_embeddings_are_copied_with_them():
    student, teacher = (tiny(depth, seed=seed, position="learned", context=16) for depth, seed in ((2, 1), (4, 0)))
    done = Layers().apply(student, teacher)
    assert "positions.0.table.weight" in done["copied"]
    assert torch.equal(student.positions[0].table.weight, teacher.positions[0].table.weight)


def test_features_count_every_document_but_padding():
    """The first document, number 0, as any other."""
    student, teacher = tiny(2, seed=1), tiny(2)
    objective = Objective(parse_losses(["feature"]), Combine(0.5), student.config, teacher.config)
    found = []
    for number in (0, 3):
        data = batch()
        data["documents"] += number
        found.append(objective(student, teacher, data)["feature"])
    assert found[0] > 0
    torch.testing.assert_close(found[0], found[1])
    data = batch()
    data["documents"][0] = -1
    other = batch()
    other["documents"][0], other["tokens"][0] = -1, 7
    torch.testing.assert_close(*(objective(student, teacher, one)["feature"] for one in (data, other)))

"""Magnitude and Wanda over whole models: parity with torch, with an explicit loop, records and refusals."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from compress.calibration.statistics import InputNorm
from compress.calibration.store import FolderStore
from compress.pruning.criteria.wanda import Wanda
from compress.pruning.masks import count_violations, masks_of
from compress.pruning.patterns import NOfM, Unstructured
from compress.pruning.solvers.sparsegpt import SparseGpt
from compress.pruning.solvers.swaps import Swaps
from compress.pruning.sparsify import Sparsify, sparsify
from compress.pruning.structured.sequential import prune_structured
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer


def tiny(head="tied", seed=0, **changes):
    torch.manual_seed(seed)
    architecture = {
        "vocab_size": 50,
        "width": 32,
        "depth": 3,
        "head": head,
        "attention": {"kind": "full", "heads": 4, "kv_heads": 2},
        "feedforward": {"kind": "swiglu", "width": 48},
    }
    return Transformer(ModelConfig.from_dict({**architecture, **changes}))


def tokens(count=3, rows=2, length=16, vocabulary=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, vocabulary, (count, rows, length + 1), generator=generator)
    return [{"tokens": row[:, :-1], "targets": row[:, 1:]} for row in drawn]


def linears(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_magnitude_equals_torch_prune(scope):
    ours, theirs = tiny("untied"), tiny("untied")
    sparsify(ours, "magnitude", Unstructured(0.37, scope))
    layers = {name: module for name, module in linears(theirs).items() if name != "head"}
    if scope == "global":
        chosen = [(module, "weight") for module in layers.values()]
        prune.global_unstructured(chosen, pruning_method=prune.L1Unstructured, amount=0.37)
    else:
        for module in layers.values():
            prune.l1_unstructured(module, "weight", amount=0.37)
    for name, module in layers.items():
        assert torch.equal(ours.get_submodule(name).weight, module.weight), name


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NOfM(2, 4)])
def test_wanda_equals_an_explicit_loop_through_the_pruned_blocks(pattern):
    ours, theirs = tiny(), tiny()
    batches = tokens()
    sparsify(ours, "wanda", pattern, batches)
    theirs.eval()
    states = [theirs.embed(batch["tokens"]) for batch in batches]
    with torch.no_grad():
        for block in theirs.blocks:
            inputs = {name: [] for name in linears(block)}
            hooks = [
                module.register_forward_pre_hook(lambda m, args, kept=inputs[name]: kept.append(args[0]))
                for name, module in linears(block).items()
            ]
            for x, context in states:
                block(x, context)
            for hook in hooks:
                hook.remove()
            for name, module in linears(block).items():
                norm = torch.cat([x.flatten(0, 1) for x in inputs[name]]).norm(dim=0)
                for row in module.weight:
                    score = row.abs() * norm
                    if isinstance(pattern, NOfM):
                        for start in range(0, len(row), 4):
                            row[start + score[start : start + 4].argsort()[:2]] = 0
                    else:
                        row[score.argsort()[: len(row) // 2]] = 0
            states = [(block(x, context).y, context) for x, context in states]
    for name, module in linears(theirs).items():
        assert torch.equal(ours.get_submodule(name).weight == 0, module.weight == 0), name


def test_two_of_four_is_exact_everywhere_and_ends_stay_dense():
    model = tiny("untied")
    ends = model.embedding.weight.clone(), model.head.weight.clone()
    records = sparsify(model, "wanda", NOfM(2, 4), tokens())
    for name, module in linears(model).items():
        if name != "head":
            assert ((module.weight.view(-1, 4) == 0).sum(1) == 2).all()
    assert torch.equal(model.embedding.weight, ends[0])
    assert torch.equal(model.head.weight, ends[1])
    skipped = {record.name: record.note for record in records if record.skipped}
    assert set(skipped) == {"embedding", "head"}
    assert all("left dense" in note for note in skipped.values())
    done = {record.name: record for record in records if not record.skipped}
    assert set(done) == set(linears(model)) - {"head"}
    for record in done.values():
        assert record.requested["sparsity"] == 0.5
        assert record.achieved["sparsity"] == 0.5
        assert 0 < record.error < 0.5


def test_every_matrix_is_listed_positions_too():
    model = tiny(position="learned")
    for records in (
        sparsify(model, "magnitude", Unstructured(0.5)),
        prune_structured(model, ["neurons"], 0.5, "magnitude"),
    ):
        named = {f"{record.name}.weight" for record in records}
        assert named == {name for name, parameter in model.named_parameters() if parameter.dim() == 2}
        positions = next(record for record in records if record.name.startswith("positions"))
        assert positions.skipped
        assert "looked up" in positions.note


def test_head_and_embedding_are_pruned_when_asked():
    untied = tiny("untied")
    sparsify(untied, "wanda", Unstructured(0.5), tokens(), include=["head"])
    assert float((untied.head.weight == 0).float().mean()) == 0.5
    assert not (untied.embedding.weight == 0).any()
    tied = tiny()
    sparsify(tied, "wanda", Unstructured(0.5), tokens(), include=["embedding"])
    assert float((tied.embedding.weight == 0).float().mean()) == 0.5


def test_padding_has_no_influence():
    batches = tokens(count=1)
    documents = torch.zeros(2, 16, dtype=torch.int64)
    documents[:, 12:] = -1
    padded = [{"tokens": batches[0]["tokens"].clone(), "documents": documents}]
    other = [{"tokens": batches[0]["tokens"].clone(), "documents": documents}]
    other[0]["tokens"][:, 12:] = 7
    results = []
    for data in (padded, other):
        model = tiny()
        sparsify(model, "wanda", Unstructured(0.5), data)
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_mask_is_recoverable_and_zeros_that_were_there_are_said():
    model = tiny()
    records = sparsify(model, "magnitude", Unstructured(0.5))
    masks = masks_of(model)
    assert {f"{record.name}.weight" for record in records if not record.skipped} == set(masks)
    assert count_violations(model, masks) == 0
    again = sparsify(model, "magnitude", Unstructured(0.25))
    done = [record for record in again if not record.skipped]
    assert all(record.achieved["sparsity"] == 0.5 and "zero before" in record.note for record in done)
    sparsify(model, "magnitude", Unstructured(0.75))
    assert all((~mask <= (model.get_parameter(name) == 0)).all() for name, mask in masks.items())


@pytest.mark.parametrize(
    ("method", "finished"),
    [*(("wanda", finished) for finished in (1, 2, 4)), ("sparsegpt", 2), (SparseGpt(refine=Swaps(2)), 1)],
    ids=str,
)
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path, method, finished):
    whole = tiny()
    sparsify(whole, method, Unstructured(0.5), tokens())

    class Killed(Exception):
        pass

    def stop(step):
        if step.index == finished:
            raise Killed

    store = FolderStore(tmp_path)
    if finished < 4:
        with pytest.raises(Killed):
            sparsify(tiny(), method, Unstructured(0.5), tokens(), store=store, progress=stop)
    else:
        sparsify(tiny(), method, Unstructured(0.5), tokens(), store=store)
    resumed = tiny()
    records = sparsify(resumed, method, Unstructured(0.5), tokens(), store=FolderStore(tmp_path))
    assert len(records) == len(linears(whole)) + 1
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("wanda", Unstructured(0.5, "global"), tokens()), "cannot be compared"),
        (("wanda", Unstructured(0.5)), "calibrates"),
        (("wandb", Unstructured(0.5)), "did you mean 'wanda'"),
        (("magnitude", NOfM(3, 5)), "divisible by 5; blocks.0"),
        (("magnitude", Unstructured(0.995)), "leaves nothing"),
    ],
)
def test_impossible_requests_are_refused_before_anything_changes(arguments, words):
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=words):
        sparsify(model, *arguments)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("head", "include", "words"),
    [
        ("tied", ["head"], "include 'embedding'"),
        ("untied", ["embedding"], "use 'magnitude'"),
        ("tied", ["norm"], "norm"),
    ],
)
def test_ends_that_cannot_be_pruned_are_refused(head, include, words):
    with pytest.raises(UserError, match=words):
        sparsify(tiny(head), "wanda", Unstructured(0.5), tokens(), include=include)


@pytest.mark.parametrize("statistic", [None, InputNorm(8, torch.device("cpu"))], ids=["none", "empty"])
def test_a_layer_that_no_token_reached_is_pruned_by_magnitude_with_a_note(statistic):
    torch.manual_seed(0)
    linear = nn.Linear(8, 3, bias=False)
    smallest = linear.weight.detach().abs().argsort(1)[:, :4]
    _, record = Sparsify(Wanda(), Unstructured(0.5)).compress("blocks.0.up", linear, statistic)
    assert "no calibration token reached this layer: pruned by magnitude" in record.note
    assert torch.equal(linear.weight == 0, torch.zeros(3, 8).scatter(1, smallest, 1) > 0)

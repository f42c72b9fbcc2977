"""Activation checkpointing: the gradients of a step are those without it, to the bit, and less is kept."""

import pytest
import torch

from app.activation_checkpointing import KEPT, CheckpointBlocks, CheckpointOperations
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer

VARIETY = {
    "full": {},
    "dropout": {"dropout": 0.2},
    "selective": {"attention": {"kind": "selective", "heads": 2, "memory_loss": 0.1, "carry": 0.5}},
    "lsh": {"attention": {"kind": "lsh", "heads": 2, "buckets": 4, "chunk": 8}},
    "mixture of depths": {"depths": [{"kind": "mixture_of_depths", "capacity": 0.5}]},
    "early exit": {"exits": {"layers": [1]}},
    "experts": {
        "feedforward": {
            "kind": "experts",
            "count": 4,
            "expert": {"kind": "swiglu", "width": 16},
            "balance": ["auxiliary", "bias"],
            "capacity": {"factor": 1.0},
        }
    },
}


def build(**changes):
    values = {"vocab_size": 50, "width": 32, "depth": 3, "context": 24}
    values |= {"attention": {"kind": "full", "heads": 2}, "feedforward": {"kind": "swiglu", "width": 48}}
    torch.manual_seed(0)
    return Transformer(ModelConfig.from_dict(values | changes)).double()


def step(model):
    """Loss, the losses of the mechanisms and all gradients of two steps."""
    tokens = torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(1))
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        model.zero_grad()
        output = model(tokens, targets=tokens)
        (output.loss + sum(output.losses.values())).backward()
        found += [output.loss, *output.losses.values(), *(p.grad.clone() for p in model.parameters())]
        model.after_step()
    return found


@pytest.mark.parametrize("kind", [CheckpointBlocks, CheckpointOperations])
@pytest.mark.parametrize("changes", VARIETY.values(), ids=VARIETY)
def test_gradients_are_equal_to_the_bit(kind, changes):
    expected, model = step(build(**changes)), build(**changes)
    kind().apply(model, compiled=False)
    assert all(torch.equal(a, b) for a, b in zip(step(model), expected, strict=True))


@pytest.mark.parametrize(("kind", "products"), [(None, 0), (CheckpointOperations, 0), (CheckpointBlocks, 1)])
def test_what_is_computed_again(kind, products):
    """Kept products are computed once in the forward; checkpointed blocks compute theirs a second time."""
    model, calls = build(), []
    if kind is not None:
        kind().apply(model, compiled=False)

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), options=None):
            calls.append(operation)
            return operation(*arguments, **(options or {}))

    with Counting():
        step(model)
    mine = sum(operation in KEPT for operation in calls)
    calls.clear()
    with Counting():
        step(build())
    theirs = sum(operation in KEPT for operation in calls)
    assert (mine > theirs) == bool(products)


def test_evaluation_and_a_cache_compute_nothing_again():
    model = build()
    CheckpointBlocks().apply(model, compiled=False)
    model.recompute = None if model.recompute is None else pytest.fail
    model.eval()(torch.zeros(1, 4, dtype=torch.int64))
    with torch.no_grad():
        model.train()(torch.zeros(1, 4, dtype=torch.int64), cache=model.new_cache(1, 4))


def test_what_cannot_be_checkpointed_is_refused():
    with pytest.raises(UserError, match="keeps no activations"):
        CheckpointBlocks().apply(build(residual="reversible"), compiled=False)
    with pytest.raises(UserError, match="not compiled"):
        CheckpointOperations().apply(build(), compiled=True)

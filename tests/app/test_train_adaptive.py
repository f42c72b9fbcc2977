"""Training models that spend less on some tokens: mixture-of-depths and early exits, through the LightningModule."""

import pytest
import torch
from training_help import ARCHITECTURE, fit, language_model, make_trainer, state_hash, text_data

from app.tasks.compile import CompileBlocks
from models.checkpoint import load
from models.generation import generate

ROUTED = {**ARCHITECTURE, "dropout": 0.0, "depths": [None, {"kind": "mixture_of_depths", "capacity": 0.25}]}
EXITING = {**ARCHITECTURE, "depth": 3, "dropout": 0.0, "exits": {"layers": [1, 2], "weight": 1.0}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def share_that_takes_part(model, batch):
    with torch.no_grad():
        model.eval()(batch["tokens"], documents=batch.get("documents"))
    counted = batch["tokens"].numel() if "documents" not in batch else (batch["documents"] >= 0).sum()
    return float(model.blocks[1].depth.kept.sum() / counted)


def test_the_share_that_takes_part_becomes_the_capacity(tmp_path, cache):
    data = text_data(cache)
    trainer = make_trainer(tmp_path / "model", max_steps=100, val_check_interval=100)
    task = language_model(architecture=ROUTED, compute_dtype="bfloat16")
    fit(trainer, task, data)
    batches = list(data.val_dataloader())[:4]
    share = sum(share_that_takes_part(task.model, batch) for batch in batches) / len(batches)
    assert share == pytest.approx(0.25, abs=0.06)
    assert task.model.blocks[1].depth.threshold != 0
    stored = load(tmp_path / "model")
    kept, trained = (model.blocks[1].depth.threshold.item() for model in (stored, task.model))
    assert kept == pytest.approx(trained, rel=0.01)  # stored as bf16


def test_a_killed_run_ends_with_the_same_thresholds(tmp_path, cache):
    hashes = []
    for name, stops in (("whole", [8]), ("halves", [4, 8])):
        for steps in stops:
            trainer = make_trainer(tmp_path / name, max_steps=steps, every=4)
            task = language_model(architecture=ROUTED)
            found = sorted((tmp_path / f"{name}.run").rglob("*.ckpt"))
            fit(trainer, task, text_data(cache), resume=found[-1] if steps != stops[0] else None)
        hashes.append(state_hash(task.model))
    assert hashes[0] == hashes[1]


def test_compiled_training_is_eager_training(tmp_path, cache):
    thresholds = []
    for name, compiling in (("eager", None), ("compiled", CompileBlocks(backend="eager"))):
        torch.compiler.reset()
        task = language_model(architecture=ROUTED, compile=compiling)
        fit(make_trainer(tmp_path / name, max_steps=3), task, text_data(cache))
        thresholds.append(task.model.blocks[1].depth.threshold)
    torch.testing.assert_close(*thresholds, atol=1e-5, rtol=1e-4)


def test_early_exits_learn(tmp_path, cache):
    data = text_data(cache)
    task = language_model(architecture=EXITING)
    fit(make_trainer(tmp_path / "model", max_steps=40, val_check_interval=40), task, data)
    batch = next(iter(data.val_dataloader()))
    model = task.model.eval()
    with torch.no_grad():
        output = model(
            batch["tokens"], targets=batch["targets"], documents=batch.get("documents"), taps=["blocks.0", "blocks.1"]
        )
        losses = [model.loss(model.exits(i, output.taps[f"blocks.{i}"]), batch["targets"])[0] for i in (0, 1)]
    assert output.losses == {}
    assert all(loss < 5.0 for loss in (*losses, output.loss))  # ln 300 = 5.7 says nothing
    used = []
    generate(load(tmp_path / "model"), [[5, 6, 7]], max_new_tokens=8, exit_confidence=0.3, layers_used=used)
    assert len(used) == 8

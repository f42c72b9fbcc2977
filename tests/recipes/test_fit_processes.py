"""Runs in processes of their own: killed at any moment, spread over two ranks, and moved between them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from test_fit import write

import models
from app.callbacks.checkpoints import newest_checkpoint
from models.checkpoint import hash_weights
from recipes import cli

DDP = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
FSDP2 = ("--trainer.devices", "2", "--trainer.strategy", "fsdp2")


def command(recipe, out, *arguments):
    return [
        sys.executable,
        "-m",
        "recipes.cli",
        "--debug",
        "fit",
        "-c",
        str(recipe),
        "--out",
        str(out),
        *map(str, arguments),
    ]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def run(recipe, out, *arguments):
    done = subprocess.run(
        command(recipe, out, *arguments), env=environment(), capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def undisturbed(recipe, out, *arguments):
    """As `run`, in this process and without its start, for recipes that need no `--trust`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert cli.main(command(recipe, out, *arguments)[3:]) == 0
    finally:
        torch.set_num_threads(threads)


def kill_when(recipe, out, ready, *arguments):
    """Start a run and kill it, with every process that it started, as soon as `ready(run folder)` holds."""
    process = subprocess.Popen(
        command(recipe, out, *arguments), env=environment(), stderr=subprocess.DEVNULL, start_new_session=True
    )
    folder = out.with_name(f"{out.name}.run")
    end = time.monotonic() + 120
    while not ready(folder) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    alive = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert alive, "the run was over before it could be killed"


def has_checkpoint(folder):
    return newest_checkpoint(folder / "checkpoints") is not None


def is_writing(folder):
    """A checkpoint is being written, and an earlier one is there."""
    return has_checkpoint(folder) and any((folder / "checkpoints").glob(".*.writing"))


def test_a_killed_run_ends_with_the_same_weights(tmp_path):
    """kill -9 after a checkpoint and while one is being written; loader workers and dropout on."""
    recipe = write(tmp_path / "recipe.yaml", trainer__max_steps=30, trainer__val_check_interval=15)
    options = ("--data.workers", 1, "--checkpoint.every_n_steps", 1)  # as without: neither changes a weight
    undisturbed(recipe, tmp_path / "whole")
    kill_when(recipe, tmp_path / "killed", has_checkpoint, *options)
    kill_when(recipe, tmp_path / "killed", is_writing, *options)
    assert not (tmp_path / "killed").exists()
    said = run(recipe, tmp_path / "killed", *options)
    assert "continuing from" in said
    assert hash_weights(tmp_path / "killed") == hash_weights(tmp_path / "whole")
    assert not list((tmp_path / "killed.run" / "checkpoints").glob(".*"))


RECORDING = """
import hashlib, json
from pathlib import Path
from lightning.pytorch import Callback

class Recording(Callback):
    def __init__(self, folder: str):
        self.folder = Path(folder)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        self.folder.mkdir(exist_ok=True)
        rows = [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:12] for row in batch["tokens"]]
        with (self.folder / f"{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps([trainer.fit_loop.epoch_loop.total_batch_idx, rows]) + "\\n")
"""


def recording(folder):
    """Arguments with which every rank writes down the rows that it trains on."""
    callback = [{"class_path": "recording.Recording", "init_args": {"folder": str(folder)}}]
    return "--trust", "--trainer.callbacks", json.dumps(callback)


def batches(folder):
    """The rows of every global batch in order, whichever number of ranks trained on it last."""
    seen: dict[int, list[str]] = {}
    for rank, path in enumerate(sorted(folder.glob("*.jsonl"))):
        own = dict(json.loads(line) for line in path.read_text().splitlines())  # a repeated batch: the last time counts
        for number, rows in own.items():
            seen[number] = rows if rank == 0 else seen[number] + rows
    return [seen[number] for number in sorted(seen)]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe of 12 steps, in a folder that the processes import `recording` from."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "recording.py").write_text(RECORDING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        yield write(
            folder / "recipe.yaml", model__architecture__dropout=0.0, model__compute_dtype="float32",
            trainer__max_steps=12, trainer__accumulate_grad_batches=2, samples__prompts=[],
        )  # fmt: skip


ADAMW = ("--model.optimizer", "AdamW", "--model.optimizer.lr", "3e-3")


@pytest.fixture(scope="module")
def one_process(recipe, tmp_path_factory):
    """A folder with a run on one process, `alone`, and the same killed on its way, `moved`, with the rows of both."""
    folder = tmp_path_factory.mktemp("one-process")
    run(recipe, folder / "alone", *ADAMW, *recording(folder / "seen-alone"))
    kill_when(recipe, folder / "moved", has_checkpoint, *ADAMW, *recording(folder / "seen-moved"))
    return folder


def assert_near(folder, other, tolerance):
    """Compare the weights of two model folders by absolute difference."""
    mine, theirs = models.load(folder), models.load(other)
    for (name, a), (_, b) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance, msg=f"{name}: {(a - b).abs().max()}")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_a_run_moves_from_one_process_to_two(tmp_path, recipe, one_process, strategy):
    """Killed on one process, finished on two: the same rows in the same batches, and the same weights to 1e-5."""
    shutil.copytree(one_process / "moved.run", tmp_path / "moved.run")
    shutil.copytree(one_process / "seen-moved", tmp_path / "seen-moved")
    said = run(recipe, tmp_path / "moved", *ADAMW, *recording(tmp_path / "seen-moved"), *strategy)
    assert "continuing from" in said
    assert "trainer.devices: auto -> 2" in said
    assert len(list((tmp_path / "seen-moved").glob("*.jsonl"))) == 2
    alone = batches(one_process / "seen-alone")
    assert len(alone) == 24
    assert batches(tmp_path / "seen-moved") == alone
    assert_near(one_process / "alone", tmp_path / "moved", 1e-5)


EXPERTS = {
    "kind": "experts",
    "count": 4,
    "expert": {"kind": "swiglu", "width": 16},
    "balance": [{"kind": "bias", "rate": 0.01}],
}


@pytest.mark.parametrize("strategy", [DDP, pytest.param(FSDP2, marks=pytest.mark.slow)], ids=["ddp", "fsdp2"])
def test_two_processes_balance_experts_by_the_load_of_both(tmp_path, recipe, strategy):
    content = yaml.safe_load(recipe.read_text())
    content["model"]["architecture"]["feedforward"] = EXPERTS
    content["trainer"] |= {"max_steps": 3, "limit_val_batches": 0}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    undisturbed(path, tmp_path / "alone", *ADAMW)
    run(path, tmp_path / "both", *ADAMW, *strategy)
    biases = [
        [value for key, value in models.load(tmp_path / name).state_dict().items() if key.endswith("router.bias")]
        for name in ("alone", "both")
    ]
    assert len(biases[0]) == 2
    assert any(bias.any() for bias in biases[0])
    assert all(torch.equal(a, b) for a, b in zip(*biases, strict=True))
    assert_near(tmp_path / "alone", tmp_path / "both", 1e-5)


@pytest.mark.slow
def test_shards_move_to_one_process_and_back(tmp_path, recipe):
    """A sharded checkpoint (a folder) goes on on one process, and a killed FSDP2 run on two.

    Muon orthogonalises in bf16, so a sum in another order moves a weight by up to 1e-3 in these 12 steps.
    """
    undisturbed(recipe, tmp_path / "alone")
    for name, second in (("to-one", ()), ("to-two", FSDP2)):
        kill_when(recipe, tmp_path / name, has_checkpoint, *FSDP2)
        assert newest_checkpoint(tmp_path / f"{name}.run" / "checkpoints").is_dir()
        run(recipe, tmp_path / name, *second)
        assert_near(tmp_path / "alone", tmp_path / name, 3e-3)

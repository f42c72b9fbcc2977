"""`kill -9` in the middle of a stage, then the same command again: the same weights as an undisturbed run."""

import fcntl
import os
import signal
import subprocess
import sys

import pytest

import models.folder
from compress.quantization import METHODS
from tests.recipes.conftest import QUICK

# Runs a command and kills the process when METHOD of CLASS has ended for the COUNTth time.
KILLER = """
import importlib, os, signal, sys
from recipes import cli
place, count, *argv = sys.argv[1:]
module, owner, method = place.split(":")
owner = getattr(importlib.import_module(module), owner)
original, calls = getattr(owner, method), []

def dying(*args, **kwargs):
    result = original(*args, **kwargs)
    calls.append(1)
    if len(calls) == int(count):
        os.kill(os.getpid(), signal.SIGKILL)
    return result

setattr(owner, method, dying)
sys.exit(cli.main(argv))
"""
STORE = "compress.store:FolderStore:save"
CHECKPOINT = "app.strategies.checkpoint_io:WholeCheckpoints:save_checkpoint"
FINISH = "recipes.stages.stage:Stage:_measure"  # everything is written, nothing renamed

MIDDLE = "compress.calibration:BlockStep:replace"  # a layer is quantized, its block is not yet

QUANTIZE = ["quantize", "TEACHER", "--group_size", "16", "--samples", "8", "--embedding_bits", "8"]
PRUNE = ["prune", "TEACHER", "--method", "structured", "--ratio", "0.5", "--samples", "8"]
DISTILL = ["distill", "--teacher", "TEACHER", "--student_layers", "2", "--max_steps", "8", "--train_batch_size", "4"]
DISTILL += ["--warmup_steps", "2", "--checkpoint_every", "3"]


def kill(place, count, argv):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLER, place, str(count), *map(str, argv)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == -signal.SIGKILL, done.stderr


@pytest.mark.parametrize(
    ("argv", "place", "count"),
    [
        pytest.param(QUANTIZE, STORE, 4, id="quantize, in the third block"),
        pytest.param(QUANTIZE, FINISH, 1, id="quantize, before the rename", marks=pytest.mark.slow),
        pytest.param(PRUNE, STORE, 3, id="prune, in the second block"),
        pytest.param(DISTILL, CHECKPOINT, 2, id="distill, after step 6"),
        pytest.param(DISTILL, CHECKPOINT, 3, id="distill, after the last step", marks=pytest.mark.slow),
    ],
)
def test_killed_and_started_again(argv, place, count, teacher, espalier, tmp_path):
    argv = [str(teacher) if word == "TEACHER" else word for word in argv] + QUICK
    status, output = espalier(*argv, "--out", tmp_path / "undisturbed")
    assert status == 0, output.err
    out = tmp_path / "out"
    kill(place, count, [*argv, "--out", out])
    assert not out.exists()
    assert (tmp_path / "out.partial").exists()
    status, output = espalier(*argv, "--out", out)
    assert status == 0, output.err
    assert "going on" in output.err
    assert models.folder.hash_weights(out) == models.folder.hash_weights(tmp_path / "undisturbed")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "undisturbed"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(METHODS))
def test_killed_again_and_again(name, teacher, espalier, tmp_path):
    """Once before anything is kept, then inside a block, between a block and its activations, and before the rename."""
    argv = ["quantize", str(teacher), "--method", name, "--samples", "8", "--embedding_bits", "8", *QUICK]
    if 3 in METHODS[name].bits:
        argv += ["--bits", "3"]
    status, output = espalier(*argv, "--out", tmp_path / "undisturbed")
    assert status == 0, output.err
    out = tmp_path / "out"
    for place, count in ((MIDDLE, 3), (STORE, 1), (MIDDLE, 9), (STORE, 2), (FINISH, 1)):
        kill(place, count, [*argv, "--out", out])
        assert not out.exists()
    status, output = espalier(*argv, "--out", out)
    assert status == 0, output.err
    assert "going on" in output.err
    assert models.folder.hash_weights(out) == models.folder.hash_weights(tmp_path / "undisturbed")


def test_another_recipe_starts_anew(teacher, espalier, tmp_path):
    argv = [str(teacher) if word == "TEACHER" else word for word in QUANTIZE] + QUICK
    out = tmp_path / "out"
    kill(STORE, 4, [*argv, "--out", out])
    status, output = espalier(*argv, "--bits", 3, "--out", out)
    assert status == 0, output.err
    assert "starting anew" in output.err
    status, output = espalier(*argv, "--bits", 3, "--out", tmp_path / "undisturbed")
    assert status == 0, output.err
    assert models.folder.hash_weights(out) == models.folder.hash_weights(tmp_path / "undisturbed")


def test_killed_after_the_rename(teacher, espalier, tmp_path):
    """The folder is complete and its state was not cleaned up: the same command only cleans up."""
    argv = [str(teacher) if word == "TEACHER" else word for word in PRUNE] + QUICK
    out = tmp_path / "out"
    kill("recipes.stages.stage:Stage:_finish", 1, [*argv, "--out", out])
    weights = models.folder.hash_weights(out)
    assert (tmp_path / "out.partial").exists()
    status, output = espalier(*argv, "--out", out)
    assert status == 0, output.err
    assert "complete already" in output.err
    assert models.folder.hash_weights(out) == weights
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_two_processes_one_output(teacher, refused, tmp_path):
    """A live process holds the lock of OUT.partial."""

    folder = tmp_path / "out.partial"
    folder.mkdir()
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused("prune", teacher, "--out", tmp_path / "out", *QUICK, "--samples", 8, words=["another process"])
    finally:
        os.close(lock)

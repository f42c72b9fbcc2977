"""Runs that end before they are done: SIGTERM in every verb, a time limit, a process of a sweep that was killed."""

import json
import os
import signal
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from test_fit import write
from test_fit_processes import DDP, command, environment, has_checkpoint
from test_stages_sweep import recipe as sweep_file

from app.callbacks import Metrics
from app.callbacks.termination import KeepTermination
from compress.calibration.store import FolderStore
from models.checkpoint import hash_weights
from recipes import cli
from recipes.commands import sweep
from recipes.termination import Terminated, terminable
from tests.recipes.conftest import QUICK

__all__ = ["sweep_file"]


@pytest.fixture
def terminated(monkeypatch):
    """Let a method send SIGTERM to this process at its call of the given number."""

    def arrange(owner, method, number):
        original, calls = getattr(owner, method), Counter()

        def sending(*args, **kwargs):
            calls[method] += 1
            if calls[method] == number:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, method, sending)

    return arrange


def ended(espalier, *argv, words=()):
    """Check the status and the last sentence of a command that is terminated on its way."""
    before = signal.getsignal(signal.SIGTERM)
    status, output = espalier(*argv)
    assert status == 143, output.err
    last = output.err.strip().splitlines()[-1]
    assert last.startswith("espalier: error: terminated; the same command")
    assert "Traceback" not in output.err
    for word in words:
        assert word in last
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_terminated_fit_goes_on_and_ends_with_the_same_weights(terminated, espalier, tmp_path):
    recipe = write(tmp_path / "recipe.yaml", ckpt_path=None, samples__prompts=[])
    fit = ["fit", "-c", recipe, "--out", tmp_path / "model"]
    terminated(Metrics, "on_train_batch_end", 5)
    ended(espalier, *fit, words=["--ckpt_path last"])
    assert not (tmp_path / "model").exists()
    status, output = espalier(*fit, "--ckpt_path", "last")
    assert (status, "step-00000004.ckpt" in output.err) == (0, True)
    assert espalier("fit", "-c", recipe, "--out", tmp_path / "whole")[0] == 0
    assert hash_weights(tmp_path / "model") == hash_weights(tmp_path / "whole")
    terminated(Metrics, "on_validation_end", 1)
    ended(espalier, "validate", "-c", recipe, "--out", tmp_path / "model")


STAGES = {
    "quantize": (FolderStore, "save", 2, ["quantize", "TEACHER", "--group_size", 16, "--samples", 8]),
    "prune": (FolderStore, "save", 2, ["prune", "TEACHER", "--method", "structured", "--samples", 8]),
    "distill": (
        *(Metrics, "on_train_batch_end", 6),
        ["distill", "--teacher", "TEACHER", "--max_steps", 8, "--train_batch_size", 4, "--checkpoint_every", 3],
    ),
}


@pytest.mark.parametrize("verb", STAGES)
def test_a_terminated_stage_goes_on(verb, teacher, terminated, espalier, tmp_path):
    owner, method, number, argv = STAGES[verb]
    argv = [teacher if word == "TEACHER" else word for word in argv] + [*QUICK, "--out", tmp_path / "out"]
    terminated(owner, method, number)
    ended(espalier, *argv, words=["goes on from what is finished"])
    assert {path.name for path in tmp_path.iterdir()} == {"out.partial"}
    status, output = espalier(*argv)
    assert (status, "going on from" in output.err) == (0, True), output.err
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_terminated_pipeline_goes_on(terminated, espalier, tmp_path):
    write(tmp_path / "fit.yaml", samples__prompts=[])
    stages = [{"stage": "pretrain", "config": "fit.yaml"}]
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump({"stages": stages}))
    run = ["run", tmp_path / "pipeline.yaml", "--out", tmp_path / "out"]
    terminated(Metrics, "on_train_batch_end", 5)
    ended(espalier, *run, words=["goes on from what is finished"])
    status, output = espalier(*run)
    assert (status, "continuing from" in output.err) == (0, True), output.err


@pytest.mark.slow
def test_a_terminated_sweep_leaves_nobody_at_work(sweep_file, espalier, tmp_path):
    """The pool would train what it has begun, and what it has taken, before it lets go."""
    log = tmp_path / "out" / "runs" / "the-base-s1.log"

    def send():
        while not log.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    ended(espalier, "sweep", sweep_file[0], "--out", tmp_path / "out", words=["goes on from what is finished"])
    assert sweep.multiprocessing.active_children() == []
    assert [path.name for path in (tmp_path / "out" / "runs").glob("*.log")] == [log.name]


def die(*arguments):
    """A training whose process is killed."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_of_a_sweep_is_a_sentence_and_no_success(sweep_file, espalier, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "train_one", die)
    status, output = espalier("sweep", sweep_file[0], "--out", tmp_path / "out")
    assert status == 1
    assert "the-base-s1 failed: its process, or one beside it, was killed (out of memory?)" in " ".join(
        output.err.split()
    )
    assert "Traceback" not in output.err


def test_a_time_limit_is_said_and_a_longer_one_goes_on(espalier, refused, tmp_path):
    recipe = write(
        tmp_path / "recipe.yaml", trainer__max_steps=10**6, trainer__limit_val_batches=0, samples__prompts=[]
    )
    fit = ["fit", "-c", recipe, "--out", tmp_path / "model", "--checkpoint.monitor", "null"]
    refused(*fit, "--trainer.max_time", "00:00:00:00", words=["before its first step", "max_time"])
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml"}
    status, output = espalier(*fit, "--trainer.max_time", "00:00:00:01")
    (entry,) = json.loads((tmp_path / "model" / "history.json").read_text())["stages"]
    assert status == 0
    assert entry["stopped_early"]
    assert f"stopped after {entry['steps']} of 1000000 steps: trainer.max_time is over" in output.err
    status, output = espalier(*fit, "--trainer.max_time", "00:01:00:00", "--trainer.max_steps", entry["steps"] + 1)
    assert (status, "stopped after" in output.err) == (0, False), output.err


def endless_on_two_processes(tmp_path):
    """A fit on two processes that goes on until it is ended."""
    recipe = write(
        tmp_path / "recipe.yaml", trainer__max_steps=10**6, trainer__limit_val_batches=0, samples__prompts=[]
    )
    arguments = ("--checkpoint.monitor", "null", "--model.optimizer", "AdamW", *DDP)
    return subprocess.Popen(
        command(recipe, tmp_path / "model", *arguments), env=environment(), stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_are_terminated_together(tmp_path):
    """Only the first gets the signal, as from docker stop, while both go through collectives."""
    process = endless_on_two_processes(tmp_path)
    end = time.monotonic() + 120
    while not has_checkpoint(tmp_path / "model.run") and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]  # until nobody holds stderr any more
    assert process.returncode == 143, said
    assert said.strip().splitlines()[-1].startswith("espalier: error: terminated; the same command with --ckpt_path")


@pytest.mark.parametrize(
    "begun", [pytest.param(False, marks=pytest.mark.slow), True], ids=["before its first step", "on its way"]
)
def test_a_lost_process_ends_the_run_with_a_sentence(begun, tmp_path):
    process = endless_on_two_processes(tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    end = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < end:
        if (pids := children.read_text().split()) and (not begun or has_checkpoint(tmp_path / "model.run")):
            break
        time.sleep(0.05)
    os.kill(int(pids[0]), signal.SIGKILL)
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 1, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("espalier: error: a process of this run was killed by SIGKILL")
    assert "--ckpt_path last" in last
    assert "Traceback" not in said


def test_what_wraps_the_signal_does_not_hide_it(monkeypatch, capsys):
    def wrapping(argv):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Terminated as error:
            raise RuntimeError("the file could not be written") from error

    monkeypatch.setattr(cli, "_run", wrapping)
    assert cli.main(["evaluate", "x"]) == 143
    assert "terminated; the same command starts anew" in capsys.readouterr().err


def test_a_second_signal_ends_at_once():
    with terminable():
        with pytest.raises(Terminated):
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_loop_that_is_left_without_a_status_is_no_success(monkeypatch):
    monkeypatch.setattr(cli, "_run", lambda argv: (_ for _ in ()).throw(SystemExit()))
    assert cli.main(["fit"]) == 1


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_the_handler_in_a_loop_is_the_one_from_before(verb):
    """The Trainer's goes through a collective, which never ends where the other processes are in another."""
    found = []

    class Look(Callback):
        def look(self, *_):
            found.append(signal.getsignal(signal.SIGTERM))

        on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = look

    def mine(number, frame):
        raise AssertionError

    before = signal.signal(signal.SIGTERM, mine)
    try:
        trainer = Trainer(
            accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=1, callbacks=[KeepTermination(), Look()],
        )  # fmt: skip
        getattr(trainer, verb)(BoringModel())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert found
    assert set(found) == {mine}

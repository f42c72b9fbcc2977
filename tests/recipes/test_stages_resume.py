"""`kill -9` in the middle of a stage, then the same command again: the same weights as an undisturbed run."""

import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import models.checkpoint
from app.tasks.causal_lm import CausalLM
from compress.quantization import METHODS
from models.errors import UserError
from recipes.commands import options, resume
from recipes.commands.distill import Distill
from recipes.commands.prune import Prune
from recipes.commands.quantize import Quantize
from recipes.commands.stage import inherited_baselines
from recipes.commands.stage_data import Text
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
STORE = "compress.calibration.store:FolderStore:save"
CHECKPOINT = "app.strategies.checkpoint_io:WholeCheckpoints:save_checkpoint"
FINISH = "recipes.commands.stage:Stage:_measure"  # everything is written, nothing renamed

MIDDLE = "compress.calibration.sequential:BlockStep:replace"  # a layer is quantized, its block is not yet

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
        pytest.param(PRUNE, STORE, 3, id="prune, in the second block", marks=pytest.mark.slow),
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
    assert models.checkpoint.hash_weights(out) == models.checkpoint.hash_weights(tmp_path / "undisturbed")
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
    assert models.checkpoint.hash_weights(out) == models.checkpoint.hash_weights(tmp_path / "undisturbed")


@pytest.mark.slow
def test_another_recipe_starts_anew(teacher, espalier, tmp_path):
    argv = [str(teacher) if word == "TEACHER" else word for word in QUANTIZE] + QUICK
    out = tmp_path / "out"
    kill(STORE, 4, [*argv, "--out", out])
    status, output = espalier(*argv, "--bits", 3, "--out", out)
    assert status == 0, output.err
    assert "starting anew" in output.err
    status, output = espalier(*argv, "--bits", 3, "--out", tmp_path / "undisturbed")
    assert status == 0, output.err
    assert models.checkpoint.hash_weights(out) == models.checkpoint.hash_weights(tmp_path / "undisturbed")


@pytest.mark.slow
def test_killed_after_the_rename(teacher, espalier, tmp_path):
    """The folder is complete and its state was not cleaned up: the same command only cleans up."""
    argv = [str(teacher) if word == "TEACHER" else word for word in PRUNE] + QUICK
    out = tmp_path / "out"
    kill("recipes.commands.stage:Stage:_finish", 1, [*argv, "--out", out])
    weights = models.checkpoint.hash_weights(out)
    assert (tmp_path / "out.partial").exists()
    status, output = espalier(*argv, "--out", out)
    assert status == 0, output.err
    assert "complete already" in output.err
    assert models.checkpoint.hash_weights(out) == weights
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


class Words:
    """What a fingerprint reads of the text."""

    def __init__(self, **described):
        self.described = described

    def describe(self):
        return self.described


def fingerprint(stage, weights="a", files=None, **described):
    parents = {"model": SimpleNamespace(source=SimpleNamespace(weights_sha256=weights))}
    words = Words(**described)
    words.tokenizer = SimpleNamespace(files=files or {"tokenizer.json": b"{}"})
    return stage.fingerprint(parents, words)


STAGES = {
    "quantize": lambda: Quantize(options.Quantize(model="m", out="o")),
    "prune": lambda: Prune(options.Prune(model="m", out="o")),
    "distill": lambda: Distill(options.Distill(teacher="t", student_layers=1, out="o")),
}
# what changes no weights, or is told by the hash of the weights
FREE = {"model", "teacher", "student", "out", "overwrite", "batch_size", "speed_rounds"}


@pytest.mark.parametrize("verb", STAGES)
def test_a_fingerprint_changes_with_each_option_that_decides_about_the_result_and_no_other(verb, tmp_path):
    stage = STAGES[verb]()
    chosen, before = stage.options, fingerprint(stage)
    assert fingerprint(STAGES[verb]()) == before
    for name in (field.name for field in dataclasses.fields(chosen)):
        another = str(tmp_path) if name == "student" else "another"  # a folder: a file is read
        stage.options = dataclasses.replace(chosen, **{name: another})
        assert (fingerprint(stage) == before) == (name in FREE), name


@pytest.mark.parametrize("verb", STAGES)
def test_a_fingerprint_changes_with_all_that_is_no_option(verb, monkeypatch):
    """The weights that go in, the files beside them, the text, files that options name, the device, the versions."""
    stage = STAGES[verb]()
    found = [fingerprint(stage), fingerprint(stage, weights="b"), fingerprint(stage, fingerprint="c")]
    for beside in ({"chat_template.jinja": b"{}"}, {"chat_template.jinja": b"{}\n"}):
        found.append(fingerprint(stage, files={"tokenizer.json": b"{}"} | beside))
    with monkeypatch.context() as patch:
        patch.setattr(stage, "inputs", lambda: {"student": "another"})
        found.append(fingerprint(stage))
    with monkeypatch.context() as patch:
        patch.setattr(stage, "device", torch.device("cuda"))
        found.append(fingerprint(stage))
    for package in ("espalier-lm", "torch"):
        with monkeypatch.context() as patch:
            patch.setattr("recipes.commands.stage.version", lambda name, own=package: "0" if name == own else "1")
            found.append(fingerprint(stage))
    stage.verb = "another"
    found.append(fingerprint(stage))
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("changed", [None, "data", "context", "blocks"])
def test_baselines_are_inherited_only_where_they_were_measured_on_the_same_blocks(changed, tmp_path, monkeypatch):
    class Blocks(list):
        fingerprint, sequence_length = "text", 64

    how = {"data": "text", "context": 64, "blocks": 3} | ({changed: 2} if changed else {})
    report = {"format": "espalier-report", "measurement": how, "baselines": {"unigram": {}}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    monkeypatch.setattr("recipes.commands.stage.read_report", lambda folder: report)
    found = inherited_baselines(tmp_path, Blocks("abc"))
    assert found == (None if changed else {"unigram": {}})
    assert inherited_baselines(tmp_path / "nowhere", Blocks("abc")) is None


@pytest.mark.parametrize(
    ("name", "stays"),
    [("part-0.safetensors", True), ("step-1.ckpt", True), (".part-0.safetensors", False), ("tokenizer.json", False)],
)
def test_only_finished_work_is_kept_for_the_next_run(name, stays, tmp_path):
    said = []
    with pytest.raises(KeyboardInterrupt), resume.resumable(tmp_path / "out", "a" * 64, said.append) as state:
        (state / name).touch()
        (state / "cut.safetensors.partial").touch()
        raise KeyboardInterrupt
    assert (tmp_path / "out.partial").exists() == stays
    with resume.resumable(tmp_path / "out", "a" * 64, said.append) as state:
        assert (state / name).exists() == stays
        assert not (state / "cut.safetensors.partial").exists()
    assert any("going on" in sentence for sentence in said) == stays


def words_of(config):
    """What a text asks of a loaded model: its config, a tokenizer, and a task."""
    tokenizer = SimpleNamespace(vocab_size=9)
    return SimpleNamespace(model=SimpleNamespace(config=config), text_tokenizer=lambda: tokenizer, task=CausalLM())


def test_what_is_known_of_the_text_says_both_sources(monkeypatch):
    """What is calibrated on counts as much as what is measured on, and is drawn with the seed."""
    drawn = []

    class Source(str):
        left_out = ()

    class Blocks(list):
        def batches(self, rows):
            return []

    def blocks(corpus, tokenizer, split, length, samples=None, seed=0):
        drawn.append((corpus, split, samples, seed))
        found = Blocks(range(samples or 0))
        found.fingerprint = f"{corpus}-{split}"
        return found

    monkeypatch.setattr("app.tasks.tokens.open_source", lambda source, column: Source(source))
    monkeypatch.setattr("app.tasks.tokens.token_blocks", blocks)
    monkeypatch.setattr("recipes.commands.stage_data.fingerprint_of", lambda corpus, tokenizer: f"{corpus}-whole")
    config = SimpleNamespace(context=64, width=8, vocab_size=9, position=SimpleNamespace(acts="rotation"))
    loaded = words_of(config)
    text = Text(options.Measure(data="mine", seed=7), loaded)
    assert text.describe() == {"source": "mine", "held_out": "its test split", "fingerprint": "mine-test"}
    text.calibration(5, torch.device("cpu"), "validation")
    assert drawn[-1] == ("mine", "validation", 5, 7)
    text = Text(options.Measure(data="mine", evaluation_data="theirs"), loaded)
    described = {"source": "mine", "held_out": "theirs", "fingerprint": "theirs-all"}
    assert text.describe() == described | {"training_fingerprint": "mine-whole"}


@pytest.mark.parametrize("batch_size", [None, 2**16])
def test_blocks_that_do_not_fit_into_memory_are_refused(batch_size, monkeypatch):
    """Calibration holds all of its blocks, an evaluation those of a batch."""

    class Many:
        def __len__(self):
            return 10**9

    monkeypatch.setattr("app.tasks.tokens.open_source", lambda source, column: SimpleNamespace(left_out=(), name="x"))
    monkeypatch.setattr("app.tasks.tokens.token_blocks", lambda *arguments, **options: Many())
    config = SimpleNamespace(context=64, width=2**20, vocab_size=9, position=SimpleNamespace(acts="rotation"))
    loaded = words_of(config)
    text = Text(options.Measure(batch_size=batch_size), loaded)
    if batch_size is None:
        assert len(text.held_out) == 10**9
        with pytest.raises(UserError, match=r"calibration on 1000000000 blocks of 64 tokens takes [\d,]+ bytes"):
            text.calibration(10**9, torch.device("cpu"))
    else:
        with pytest.raises(UserError, match=r"a batch of 65536 blocks of 64 tokens \(batch_size\) takes"):
            _ = text.held_out

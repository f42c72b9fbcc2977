"""Wrong input from the outside: one clear sentence, exit status 2, nothing half-written."""

import errno
import json
import os
import shutil
import subprocess

import pytest
import torch
from safetensors import SafetensorError

import compress.calibration.store
import models.io
from app.strategies import checkpoint_io
from tests.recipes.conftest import QUICK

PRUNE = [*QUICK, "--method", "magnitude"]


@pytest.fixture
def copy(teacher, tmp_path):
    """A copy of the teacher that a test may damage."""
    return shutil.copytree(teacher, tmp_path / "model")


def assert_nothing_written(tmp_path, *expected):
    assert {path.name for path in tmp_path.iterdir()} == set(expected)


def test_no_model(refused, tmp_path):
    refused("prune", tmp_path / "nothing", "--out", tmp_path / "out", *PRUNE, words=["there is no model", "nothing"])
    assert_nothing_written(tmp_path)


def test_a_folder_that_is_no_model(refused, tmp_path):
    (tmp_path / "model").mkdir()
    refused("inspect", tmp_path / "model", words=["config.json"])


@pytest.mark.parametrize("size", [0, 5, 100, 5000], ids=lambda size: f"{size} bytes left")
def test_truncated_weights(size, copy, refused, tmp_path):
    os.truncate(copy / "model.safetensors", size)
    refused("prune", copy, "--out", tmp_path / "out", *PRUNE, words=["model.safetensors", "corrupt or truncated"])
    assert_nothing_written(tmp_path, "model")


def test_corrupt_weights(copy, refused, tmp_path):
    (copy / "model.safetensors").write_bytes(os.urandom(4096))
    refused("evaluate", copy, *QUICK, words=["model.safetensors", "corrupt or truncated"])


def test_missing_weights(copy, refused):
    (copy / "model.safetensors").unlink()
    refused("inspect", copy, words=["model.safetensors"])


def test_another_format_version(copy, refused):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"format_version": 99}))
    refused("inspect", copy, words=["version 99", "version 1"])


def test_config_that_is_no_json(copy, refused):
    (copy / "config.json").write_text("{")
    refused("inspect", copy, words=["config.json", "JSON"])


def test_no_tokenizer(copy, refused, tmp_path):
    (copy / "tokenizer.json").unlink()
    refused("prune", copy, "--out", tmp_path / "out", *PRUNE, words=["tokenizer.json"])
    assert_nothing_written(tmp_path, "model")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["x.ckpt"]),
        (b"not a checkpoint", ["x.ckpt"]),
        (os.urandom(512), ["x.ckpt"]),
    ],
    ids=["empty", "text", "noise"],
)
def test_checkpoint_that_is_none(content, words, refused, tmp_path):
    (tmp_path / "x.ckpt").write_bytes(content)
    refused("inspect", tmp_path / "x.ckpt", words=words)


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_checkpoint_that_would_run_code(refused, tmp_path):
    torch.save({"state_dict": Payload(tmp_path / "owned")}, tmp_path / "x.ckpt")
    refused("inspect", tmp_path / "x.ckpt", words=["never done"])
    assert_nothing_written(tmp_path, "x.ckpt")


def test_checkpoint_of_another_version(refused, tmp_path):
    torch.save({"espalier": {"format_version": 99}, "state_dict": {}}, tmp_path / "x.ckpt")
    refused("inspect", tmp_path / "x.ckpt", words=["version 99", "version 1"])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", ["empty"]),
        ("binary.txt", bytes(range(256)) * 64, ["binary.txt"]),
        ("short.txt", b"A few words.\n", ["short.txt"]),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n', ["broken.jsonl"]),
    ],
)
def test_text_that_is_none(name, content, words, teacher, refused, tmp_path):
    (tmp_path / name).write_bytes(content)
    argv = [tmp_path / name if word == "synthetic" else word for word in PRUNE]
    refused("prune", teacher, "--out", tmp_path / "out", *argv, words=words)
    assert_nothing_written(tmp_path, name)


def full(*args, **kwargs):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def full_checkpoint(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", [models.io, compress.calibration.store], ids=["the folder", "the state"])
def test_no_space_left(place, teacher, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(place, "save_file", full)
    refused("prune", teacher, "--out", tmp_path / "deep" / "out", *PRUNE, words=["no space left"])
    assert not (tmp_path / "deep" / "out").exists()


def test_no_space_left_for_a_checkpoint(teacher, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_io.torch, "save", full_checkpoint)
    argv = ["--teacher", teacher, "--student_layers", 2, "--max_steps", 4, "--warmup_steps", 1, "--train_batch_size", 4]
    refused("distill", *argv, "--checkpoint_every", 2, "--out", tmp_path / "out", *QUICK, words=["no space left"])
    assert_nothing_written(tmp_path)


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 300 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_no_space_left_on_a_real_disk(teacher, refused, tiny_disk):
    refused("prune", teacher, "--out", tiny_disk / "out", *PRUNE, words=["no space left"])
    assert not (tiny_disk / "out").exists()


def test_output_below_a_file(teacher, refused, tmp_path):
    (tmp_path / "file").write_text("")
    refused("prune", teacher, "--out", tmp_path / "file", *PRUNE, words=["is a file"])
    refused("prune", teacher, "--out", tmp_path / "file" / "out", *PRUNE, words=["file"])


@pytest.mark.parametrize("verb", ["prune", "evaluate", "generate"])
def test_cuda_where_there_is_none(verb, teacher, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    argv = {"prune": ["--out", tmp_path / "out"], "evaluate": [], "generate": ["--prompt", "a"]}[verb]
    refused(verb, teacher, *argv, "--device", "cuda", words=["device cuda", "--device cpu"])
    assert_nothing_written(tmp_path)


def test_models_of_different_tokenizers(teacher, copy, refused):
    (copy / "tokenizer.json").write_text((copy / "tokenizer.json").read_text().replace("ĠB", "ĠX"))
    text = json.loads((copy / "tokenizer.json").read_text())
    text["model"]["merges"] = text["model"]["merges"][:-1]
    (copy / "tokenizer.json").write_text(json.dumps(text))
    refused("compare", teacher, copy, *QUICK, words=["tokenizer"])


@pytest.mark.parametrize("verb", ["prune", "evaluate", "compare"])
@pytest.mark.parametrize(("option", "value"), [("batch_size", -1), ("batch_size", 0), ("seed", -1), ("seed", 2**32)])
def test_numbers_out_of_range(verb, option, value, teacher, refused, tmp_path):
    models = [teacher, teacher] if verb == "compare" else [teacher]
    argv = [verb, *models, "--out", tmp_path / "out", *QUICK, f"--{option}", value]
    refused(*argv, words=[f"{option} is {value}", "at least"])
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize("verb", ["inspect", "evaluate"])
def test_json_where_nothing_can_be_written(verb, teacher, refused, tmp_path, monkeypatch):
    """Said before anything is loaded."""
    monkeypatch.setattr(f"recipes.commands.{verb}.load_model", None)
    (tmp_path / "file").write_text("")
    refused(verb, teacher, "--out", tmp_path / "file" / "new" / "x.json", words=["x.json cannot be written"])
    assert_nothing_written(tmp_path, "file")


def test_json_in_a_new_folder_is_whole_or_not_there(teacher, espalier, refused, tmp_path, monkeypatch):
    out = tmp_path / "new" / "folder" / "layers.json"
    status, output = espalier("inspect", teacher, "--out", out)
    assert status == 0, output.err
    before = json.loads(out.read_text())
    assert before["layers"]

    def cut_off(path, content):
        path.write_text("{")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("recipes.commands.evaluate.write_json", cut_off)
    refused("inspect", teacher, "--out", out, "--overwrite", words=["layers.json cannot be written", "No space left"])
    assert json.loads(out.read_text()) == before
    assert [path.name for path in out.parent.iterdir()] == ["layers.json"]


def test_json_file_that_exists(teacher, refused, tmp_path):
    (tmp_path / "figures.json").write_text("{}")
    refused("evaluate", teacher, *QUICK, "--out", tmp_path / "figures.json", words=["exists already", "--overwrite"])
    assert (tmp_path / "figures.json").read_text() == "{}"


def test_report_over_a_folder_without_one(teacher, refused, tmp_path):
    refused("report", teacher, "--out", tmp_path / "out", words=["report.json"])
    assert_nothing_written(tmp_path)

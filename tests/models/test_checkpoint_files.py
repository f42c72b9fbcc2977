"""Folders written whole or not at all, and safetensors files read and written, against every way that they break."""

import json
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from models.errors import UserError
from models.io import (
    INDEX,
    WEIGHTS,
    TensorFiles,
    clean_leftovers,
    inside,
    read_json,
    weight_files,
    write_tensors,
    writing,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def interrupted(target):
    with writing(target, overwrite=True) as directory:
        (directory / "a").write_text("new")
        raise KeyboardInterrupt


def test_writing_renames_a_finished_folder(tmp_path):
    with writing(tmp_path / "new" / "out") as directory:
        assert not (tmp_path / "new" / "out").exists()
        (directory / "a").write_text("a")
    assert names(tmp_path / "new") == ["out"]
    assert (tmp_path / "new" / "out" / "a").read_text() == "a"
    assert (tmp_path / "new" / "out").stat().st_mode == (tmp_path / "new").stat().st_mode


@pytest.mark.parametrize("old", [False, True])
def test_writing_that_fails_leaves_what_was_there(tmp_path, old):
    target = tmp_path / "deep" / "out"
    if old:
        target.mkdir(parents=True)
        (target / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        interrupted(target)
    assert names(tmp_path) == (["deep"] if old else [])
    if old:
        assert (target / "a").read_text() == "old"


def test_writing_replaces_only_when_asked(tmp_path):
    (tmp_path / "out").mkdir()
    with writing(tmp_path / "out") as directory:  # an empty folder is nobody's loss
        (directory / "a").write_text("1")
    with pytest.raises(UserError, match=r"already holds something.*--overwrite"), writing(tmp_path / "out"):
        pass
    with writing(tmp_path / "out", overwrite=True) as directory:
        (directory / "b").write_text("2")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["b"]


def test_writing_never_replaces_the_working_directory_or_a_repository(tmp_path, monkeypatch):
    (tmp_path / "here" / "inner").mkdir(parents=True)
    (tmp_path / "repository" / ".git").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "inner")
    (tmp_path / "here" / "inner" / "a").write_text("a")
    for place in ("here", "here/inner", "repository"):
        with pytest.raises(UserError, match="never replaced"), writing(tmp_path / place, overwrite=True):
            pass
    with pytest.raises(UserError, match="is a file"), writing(tmp_path / "here" / "inner" / "a", overwrite=True):
        pass


def test_writing_follows_a_link_to_the_folder_behind_it(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with writing(tmp_path / "link") as directory:
        (directory / "a").write_text("a")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "real") == ["a"]


KILLED = """
import sys, time
from models.io import writing
with writing(sys.argv[1], overwrite=True) as directory:
    (directory / "half").write_text("half")
    print(directory, flush=True)
    time.sleep(60)
"""


def test_a_writer_killed_between_the_two_renames_is_ended_by_the_next(tmp_path):
    """Its result was whole and flushed: it takes its place, and the repeated run finds it there."""
    for name, content in ((".out.replaced-abcd_123", "old"), (".out.writing-abcd_123", "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(content)
    clean_leftovers(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "x").read_text() == "new"


def test_leftovers_are_cleaned_before_a_refusal_and_nothing_of_another_name(tmp_path):
    own = [".out.writing-mine", ".out.replaced-2026-11-30", "out.writing-abcdefgh", ".other.writing-abcdefgh"]
    for name in ("out", *own, ".out.writing-abcdefgh"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    with pytest.raises(UserError, match="already holds something"), writing(tmp_path / "out"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"out", *own}


def test_a_killed_writer_leaves_the_old_folder_and_its_leftover_is_cleaned(tmp_path):
    target = tmp_path / "out"
    with writing(target) as directory:
        (directory / "a").write_text("old")
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(target)], stdout=subprocess.PIPE, text=True)
    leftover = child.stdout.readline().strip()
    with writing(target, overwrite=True) as directory:  # a second writer beside a living one leaves it alone
        (directory / "a").write_text("second")
    assert os.path.exists(leftover)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert names(target) == ["a"]
    with writing(target, overwrite=True) as directory:
        assert not os.path.exists(leftover)
        (directory / "a").write_text("third")
    assert names(tmp_path) == ["out"]


def test_a_folder_that_stepped_aside_comes_back_if_its_successor_never_arrived(tmp_path):
    aside = tmp_path / ".out.replaced-abcdefgh"
    aside.mkdir()
    (aside / "a").write_text("old")
    with pytest.raises(RuntimeError), writing(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "a").read_text() == "old"


FULL = """
import sys, torch
from pathlib import Path
from models.errors import UserError
from models.io import write_tensors, writing
try:
    with writing(Path(sys.argv[1]) / "new" / "out") as directory:
        write_tensors(directory, [("a", torch.zeros(1 << 21))])
except UserError as error:
    print(error)
print(list(Path(sys.argv[1]).iterdir()))
"""


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    """On a real file system of 1 MB where the kernel lets us mount one, else by a limit on the size of files."""
    mount = f'mount -t tmpfs -o size=1m tmpfs {tmp_path} && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh"]
    python = [sys.executable, "-c", FULL, str(tmp_path)]
    try:
        mountable = subprocess.run([*command, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        mountable = False
    limit = None if mountable else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    done = subprocess.run(
        [*command, *python] if mountable else python, capture_output=True, text=True, preexec_fn=limit
    )
    assert done.stdout.splitlines() == [
        f"no space left on the device for {tmp_path}/new/out; nothing was kept of it",
        "[]",
    ], done.stderr


def test_tensors_survive_whole_and_in_shards(tmp_path):
    tensors = {
        "b": torch.arange(6).reshape(2, 3),
        "a": torch.randn(4, 5, dtype=torch.bfloat16).T,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "big": torch.randn(100),
    }
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]  # `big` alone in the second
    for shard_bytes, files in ((10**9, [WEIGHTS]), (100, shards)):
        folder = tmp_path / str(shard_bytes)
        folder.mkdir()
        written = write_tensors(folder, tensors.items(), shard_bytes)
        assert [path.name for path in written] == [path.name for path in weight_files(folder)] == files
        assert (len(files) > 1) == (folder / INDEX).exists()
        read = TensorFiles(folder)
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read.shape(name) == tuple(tensor.shape)
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor)
        read.check({name: tuple(tensor.shape) for name, tensor in tensors.items()})


def write_sharded(folder):
    folder.mkdir(exist_ok=True)
    write_tensors(folder, [(name, torch.randn(10)) for name in "abc"], shard_bytes=50)
    return folder


def test_reading_is_mapped_not_copied(tmp_path):
    write_tensors(tmp_path, [("big", torch.zeros(1 << 26))])  # 256 MiB
    script = """
import sys, resource
from pathlib import Path
from models.io import TensorFiles
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tensor = TensorFiles(Path(sys.argv[1]))["big"]
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, tensor.numel())
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    grown, count = map(int, done.stdout.split())
    assert count == 1 << 26
    assert grown < 64  # MiB


@pytest.mark.parametrize("cut", [0, 4, 100, -7])
def test_a_truncated_file_is_refused(tmp_path, cut):
    write_tensors(tmp_path, [("a", torch.randn(100))])
    content = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(content[:cut])
    with pytest.raises(UserError, match=r"model.safetensors is corrupt or truncated"):
        TensorFiles(tmp_path)


def test_a_corrupt_header_is_refused(tmp_path):
    (tmp_path / WEIGHTS).write_bytes(b"\xff" * 4096)
    with pytest.raises(UserError, match="corrupt or truncated"):
        TensorFiles(tmp_path)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        TensorFiles(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="never unpickled"):
        TensorFiles(tmp_path)


def test_a_wrong_index_is_refused(tmp_path):
    folder = write_sharded(tmp_path / "missing")
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="has no model-00002-of-00003"):
        TensorFiles(folder)

    folder = write_sharded(tmp_path / "disagrees")
    index = read_json(folder / INDEX)
    del index["weight_map"]["b"]
    index["weight_map"]["d"] = "model-00002-of-00003.safetensors"
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="disagree about b, d"):
        TensorFiles(folder)

    folder = write_sharded(tmp_path / "twice")
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, folder / "model-00002-of-00003.safetensors")
    with pytest.raises(UserError, match="tensor a in two files"):
        TensorFiles(folder)

    folder = write_sharded(tmp_path / "shapeless")
    for content in ("[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        (folder / INDEX).write_text(content)
        with pytest.raises(UserError, match=r"index\.json"):
            TensorFiles(folder)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "link.safetensors", "a/../../secret"])
def test_no_name_leads_out_of_the_folder(tmp_path, name):
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    folder = write_sharded(tmp_path / "model")
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    index = read_json(folder / INDEX)
    index["weight_map"]["a"] = name
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside the folder"):
        TensorFiles(folder)


def test_a_snapshot_of_the_hub_cache_may_link_to_its_blobs(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "f00").write_text("x")
    snapshot = tmp_path / "snapshots" / "1"
    snapshot.mkdir(parents=True)
    (snapshot / "a").symlink_to("../../blobs/f00")
    assert inside(snapshot, "a").read_text() == "x"


def test_weights_that_are_a_link_to_another_disk_are_refused_with_a_way_out(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").mkdir()
    write_tensors(tmp_path / "disk", [("a", torch.zeros(1))])
    (tmp_path / "model" / WEIGHTS).symlink_to(tmp_path / "disk" / WEIGHTS)
    with pytest.raises(UserError, match=r"is a link to .*/disk/model\.safetensors, .* move the whole folder"):
        TensorFiles(tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "disk")  # the way out
    assert list(TensorFiles(tmp_path / "link")) == ["a"]


def test_check_names_what_differs(tmp_path):
    write_tensors(tmp_path, [("a", torch.zeros(2, 3)), ("b", torch.zeros(1))])
    read = TensorFiles(tmp_path)
    with pytest.raises(UserError, match=r"lack c, d, e and 2 more, which config.json calls for"):
        read.check(dict.fromkeys("abcdefg", (1,)))
    with pytest.raises(UserError, match=r"hold b, which config\.json does not know"):
        read.check({"a": (2, 3)})
    with pytest.raises(UserError, match=r"tensor a .* has shape \[2, 3\]; config.json calls for \[3, 2\]"):
        read.check({"a": (3, 2), "b": (1,)})


def test_read_json_says_what_is_wrong(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        read_json(tmp_path / "config.json")
    for content in (b"{", b"\xff\xfe", b"[1]", b"[" * 100_000):
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(UserError, match=r"config\.json"):
            read_json(tmp_path / "config.json")


def test_weights_are_readable_by_whom_the_umask_lets(tmp_path):
    with writing(tmp_path / "out") as directory:
        write_tensors(directory, [("a", torch.ones(2))])
    umask = os.umask(0o022)
    os.umask(umask)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask

"""Checkpoints from anybody: nothing is unpickled, and damage is said, in files and in sharded folders."""

import os
import pickle
import zipfile

import pytest
import torch
from torch.distributed import checkpoint as sharded

from app.loading import load_model, read_checkpoint
from app.strategies.checkpoint_io import METADATA, SHARDS
from models.errors import UserError
from models.io import sha256_of
from recipes.fit_state import Trained, describe_checkpoint

RECORD = {
    "espalier": {"format_version": 1, "recipe": {"a": 1}},
    "hyper_parameters": {"architecture": {"width": 4}},
    "loops": {"fit_loop": {"epoch_loop.batch_progress": {"current": {"ready": 5}}}},
}


class Touch:
    """An object whose unpickling makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "ran"


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return {f"model.{name}": torch.randn(8, 16) for name in ("a", "b.c")}


@pytest.fixture
def file(tmp_path, weights):
    path = tmp_path / "step-00000001.ckpt"
    torch.save(RECORD | {"state_dict": weights}, path)
    return path


@pytest.fixture
def folder(tmp_path, weights):
    """A sharded checkpoint of one rank."""
    path = tmp_path / "sharded.ckpt"
    path.mkdir()
    moments = {f"optimizer_0/state/{name}/exp_avg": 2 * tensor for name, tensor in weights.items()}
    tensors = {f"state_dict/{name}": tensor for name, tensor in weights.items()} | moments
    sharded.save(tensors, storage_writer=sharded.HuggingFaceStorageWriter(str(path), save_distributed=True))
    state = {name: {"step": torch.tensor(3.0)} for name in weights}
    groups = [{"params": list(weights), "lr": 0.1}]
    shards = {found.name: sha256_of(found) for found in path.iterdir()}
    rest = RECORD | {"state_dict": {}, "optimizer_0": {"state": state, "param_groups": groups}, SHARDS: shards}
    torch.save(rest, path / METADATA)
    return path


def refused(path, mark, match=""):
    for read in (read_checkpoint, load_model, describe_checkpoint):
        with pytest.raises(UserError, match=match):
            read(path)
    assert not mark.exists()


def test_a_sharded_checkpoint_is_read_as_one_process_would_have_written_it(folder, weights):
    content = read_checkpoint(folder)
    torch.testing.assert_close(content["state_dict"], weights, rtol=0, atol=0)
    (optimizer,) = content["optimizer_states"]
    assert optimizer["param_groups"] == [{"params": [0, 1], "lr": 0.1}]
    assert torch.equal(optimizer["state"][1]["exp_avg"], 2 * weights["model.b.c"])
    assert optimizer["state"][0]["step"] == 3
    assert describe_checkpoint(folder) == Trained({"a": 1}, {"width": 4}, 5)


def test_pickled_shards_are_never_read(tmp_path, mark):
    """The form of torch's own: `.metadata` is a pickle."""
    folder = tmp_path / "hostile.ckpt"
    folder.mkdir()
    (folder / ".metadata").write_bytes(pickle.dumps(Touch(mark)))
    torch.save(RECORD, folder / METADATA)
    refused(folder, mark, "names no files")


def test_a_pickle_beside_the_shards_is_refused(folder, mark):
    (folder / ".metadata").write_bytes(pickle.dumps(Touch(mark)))
    refused(folder, mark, r"disagree about .metadata")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_pickle_in_an_archive_is_refused(kind, folder, file, mark):
    torch.save(RECORD | {"more": Touch(mark)}, folder / METADATA if kind == "folder" else file)
    refused(folder if kind == "folder" else file, mark, "without unpickling objects")


def test_a_bare_pickle_is_refused(file, folder, mark):
    for path in (file, folder / METADATA):
        path.write_bytes(pickle.dumps(Touch(mark)))
    refused(file, mark, "no checkpoint")
    refused(folder, mark, "no checkpoint")


def test_a_shard_outside_of_the_folder_is_refused(folder, mark, tmp_path):
    shard = next(folder.glob("*.safetensors"))
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    refused(folder, mark, "outside the folder")


@pytest.mark.parametrize("content", [[], {"shards": 3}, {"shards": {"a": 3}}, {"shards": {}, "state_dict": 3}])
def test_metadata_of_another_form_is_refused(content, folder, mark):
    torch.save(content, folder / METADATA)
    refused(folder, mark)


def test_a_changed_byte_of_a_shard_is_noticed(folder, mark):
    shard = next(folder.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    refused(folder, mark, "is damaged")


def test_a_changed_byte_of_a_file_is_noticed_or_changes_nothing(file, weights):
    whole = file.read_bytes()
    caught = 0
    for place in range(7, len(whole), 37):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            content = read_checkpoint(file)
        except UserError:
            caught += 1
            continue
        torch.testing.assert_close(content, RECORD | {"state_dict": weights}, rtol=0, atol=0)
    assert caught > 20


def test_a_compressed_archive_holds_the_same_weights(file, weights):
    records = {}
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            records[name] = archive.read(name)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    torch.testing.assert_close(read_checkpoint(file)["state_dict"], weights, rtol=0, atol=0)


def test_a_truncated_file_is_refused(file, mark):
    file.write_bytes(file.read_bytes()[:700])
    refused(file, mark, "no checkpoint")

"""A model folder's history.json holds a checksum of each file of its weights, and `inspect --verify` compares."""

import hashlib
import json

import pytest
import torch

from app.history import HISTORY, read_history, verify, write_history
from models import checkpoint
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer
from recipes import cli

LAYERS = {"attention": {"kind": "full", "heads": 4}, "feedforward": {"kind": "swiglu", "width": 64}}


@pytest.fixture(params=[2**30, 20_000], ids=["one file", "shards"])
def written(request, tmp_path):
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_dict({"width": 32, "depth": 2, "vocab_size": 64} | LAYERS))
    checkpoint.save_model(model, tmp_path, shard_bytes=request.param)
    write_history(tmp_path, [{"stage": "pretrain", "weights": checkpoint.hash_weights(tmp_path)}])
    return tmp_path


def test_whole_files_are_confirmed(written, capsys):
    names = verify(written)
    assert names == sorted(path.name for path in written.glob("*.safetensors"))
    recorded = json.loads((written / HISTORY).read_text())["files"]
    assert recorded == {name: hashlib.sha256((written / name).read_bytes()).hexdigest() for name in names}
    assert cli.main(["inspect", str(written), "--verify"]) == 0
    said = capsys.readouterr().err
    assert all(f"{name}: the SHA-256 is that of the file that was written" in said for name in names)


@pytest.mark.parametrize("old", [False, True], ids=["a checksum a file", "of before"])
def test_a_flipped_bit_is_found(written, old, capsys):
    history = json.loads((written / HISTORY).read_text())
    if old:
        del history["files"]
        (written / HISTORY).write_text(json.dumps(history))
        assert verify(written)
        assert read_history(written) == history["stages"]
    path = sorted(written.glob("*.safetensors"))[-1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert cli.main(["inspect", str(written)]) == 0  # a weight may have any bits
    capsys.readouterr()
    assert cli.main(["inspect", str(written), "--verify"]) == 2
    said = capsys.readouterr().err
    assert "SHA-256 differs" in said
    assert old or path.name in said


def test_nothing_to_compare_with(written):
    (written / HISTORY).unlink()
    with pytest.raises(UserError, match="no history.json with checksums"):
        verify(written)


@pytest.mark.parametrize(
    "entry",
    [None, [], 3, "x", {}, {"stage": None}, {"stage": "prune", "data": []}, {"stage": "prune", "data": None}]
    + [{"stage": "prune", key: 4} for key in ("title", "time", "recipe", "parents", "weights")],
    ids=str,
)
def test_a_history_of_other_types_is_refused(written, entry):
    (written / HISTORY).write_text(json.dumps({"format_version": 1, "stages": [{"stage": "pretrain"}, entry]}))
    with pytest.raises(UserError, match=r"history\.json: .*stages\[1\]"):
        read_history(written)
    assert cli.main(["inspect", str(written)]) == 2

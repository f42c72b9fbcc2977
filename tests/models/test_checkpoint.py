"""The model folder: what is saved comes back bit for bit, and what is wrong with a folder is said in a sentence."""

import hashlib
import json
import pickle
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from models.checkpoint import fill, hash_weights, load, read_config, save_model, skeleton, writing
from models.config import ModelConfig
from models.errors import UserError
from models.io import INDEX, WEIGHTS
from models.transformer import Transformer

BASE = {
    "vocab_size": 50,
    "width": 16,
    "depth": 2,
    "context": 32,
    "attention": {"kind": "full", "heads": 4, "kv_heads": 2},
    "feedforward": {"kind": "swiglu", "width": 24},
}
VARIANTS = {
    "plain": {},
    "untied": {"head": "untied"},
    "learned": {"position": "learned", "norm": {"kind": "layer", "position": "sandwich"}},
    "mlp": {"feedforward": {"kind": "mlp", "width": 20}, "norm": {"kind": "rms", "position": "post"}},
    "sub-layers": {"order": "sfsf", "depth": 2},
    "parallel": {"order": "parallel"},
    "attention only": {"order": "sssf", "depth": 2},
}


def build(**changes):
    torch.manual_seed(0)
    return Transformer(ModelConfig.from_dict(BASE | changes)).eval()


def saved(folder, model=None, **arguments):
    with writing(folder) as directory:
        save_model(model or build(), directory, **arguments)
    return folder


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_comes_back_bit_for_bit(tmp_path, variant):
    model = build(**VARIANTS[variant])
    loaded = models.load(saved(tmp_path / "m", model))
    assert loaded.config == model.config
    assert not loaded.training
    before, after = model.state_dict(), loaded.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    tokens = torch.randint(50, (2, 9))
    assert torch.equal(model(tokens).logits, loaded(tokens).logits)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_saving_a_loaded_model_gives_the_same_file(tmp_path):
    saved(tmp_path / "a")
    saved(tmp_path / "b", load(tmp_path / "a"))
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    assert (tmp_path / "a" / "config.json").read_text() == (tmp_path / "b" / "config.json").read_text()


def test_tied_weights_are_stored_once(tmp_path):
    assert "head.weight" not in load_file(saved(tmp_path / "tied") / WEIGHTS)
    assert "head.weight" in load_file(saved(tmp_path / "untied", build(head="untied")) / WEIGHTS)


def test_a_hidden_tie_is_not_saved_as_if_it_were_none(tmp_path):
    model = build()
    model.blocks[1].feedforward.up.weight = model.blocks[0].feedforward.up.weight
    with pytest.raises(ValueError, match="shares its memory"):
        save_model(model, tmp_path)


def test_dtypes_on_the_way_in_and_out(tmp_path):
    model = build()
    half = load(saved(tmp_path / "half", model, dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    full = load(tmp_path / "half", dtype=torch.float32)
    assert torch.equal(full.embedding.weight, model.embedding.weight.bfloat16().float())
    assert model.embedding.weight.dtype == torch.float32


def test_shards_hold_the_same_model(tmp_path):
    model = build()
    saved(tmp_path / "one", model)
    folder = saved(tmp_path / "many", model, shard_bytes=2000)
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    assert (folder / INDEX).exists()
    before, after = load(tmp_path / "one").state_dict(), load(folder).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_hash_is_that_of_the_bytes(tmp_path):
    model = build()
    folder = saved(tmp_path / "one", model)
    assert hash_weights(folder) == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert hash_weights(saved(tmp_path / "two", model)) == hash_weights(folder)
    many = saved(tmp_path / "many", model, shard_bytes=2000)
    first = hash_weights(many)
    with torch.no_grad():
        model.norm.weight[0] += 1
    assert hash_weights(saved(tmp_path / "other", model, shard_bytes=2000)) != first


def test_training_a_loaded_model_leaves_the_file_alone(tmp_path):
    folder = saved(tmp_path / "m")
    before = hash_weights(folder)
    model = load(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert hash_weights(folder) == before
    assert torch.equal(load(folder).norm.weight, model.norm.weight - 1)


def test_loading_does_not_hold_the_weights_twice(tmp_path):
    saved(tmp_path / "m", build(vocab_size=1 << 20, width=64))  # 256 MiB
    script = """
import sys, resource, torch, models, models.transformer
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
model = models.load(sys.argv[1])
mapped = peak() - before
model = models.load(sys.argv[1], dtype=torch.bfloat16)
print(mapped, peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "m"], capture_output=True, text=True, check=True)
    mapped, converted = map(int, done.stdout.split())
    assert mapped < 64
    assert converted < 256 + 128 + 64  # the mapped pages of the file and the converted copy


def test_computed_buffers_are_computed_when_loading():
    class Table(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("squares", torch.empty(4), persistent=False)
            self.reset_parameters()

        def reset_parameters(self):
            self.squares.copy_(torch.arange(4.0) ** 2)

    config = build().config
    model = skeleton(config)
    with torch.device("meta"):
        model.positions.append(Table())
    filled = fill(model, iter(build().state_dict().items()))
    assert filled.positions[-1].squares.tolist() == [0, 1, 4, 9]
    assert not any(tensor.is_meta for tensor in [*filled.parameters(), *filled.buffers()])


def edit(folder, change):
    content = json.loads((folder / "config.json").read_text())
    change(content)
    (folder / "config.json").write_text(json.dumps(content))


def put(*path, value):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("format", value="other"), "has format 'other'"),
        (put("format_version", value=2), "has format version 2; this installation reads version 1"),
        (put("architcture", value={}), r"unknown key 'architcture' \(did you mean 'architecture'\?\)"),
        (lambda content: content.pop("architecture"), "has no architecture"),
        (put("architecture", value=[1]), "architecture"),
        (put("architecture", "widht", value=16), r"unknown key 'widht' \(did you mean 'width'\?\)"),
        (put("architecture", "width", value="16"), "width"),
        (put("architecture", "width", value=32), r"shape \[50, 16\]; config.json calls for \[50, 32\]"),
        (put("architecture", "head", value="untied"), "lack head.weight"),
        (put("architecture", "layers", value=[]), "layer"),
        (put("architecture", "layers", 0, "attention", "kind", value="fulll"), "did you mean 'full'"),
        (put("architecture", "layers", 0, "attention", "heads", value=0), "at least one head"),
        (put("architecture", "layers", 1, "feedforward", value=None), "hold blocks.1.feedforward"),
        (put("architecture", "norm", value={"kind": "rms", "eps": None}), "eps"),
        (put("architecture", "compression", value={"blocks.9.x": {"form": "packed_int"}}), "'blocks.9.x' is no linear"),
        (put("architecture", "compression", value={"norm": {"form": "packed_int"}}), "'norm' is no linear"),
        (
            put("architecture", "compression", value={"blocks.0.attention.q": {"form": "os:system"}}),
            "unknown stored form 'os:system'",
        ),
        (put("architecture", "compression", value={"blocks.0.attention.q": 3}), "names with their stored forms"),
    ],
)
def test_a_wrong_config_is_refused(tmp_path, change, message):
    folder = saved(tmp_path / "m")
    edit(folder, change)
    with pytest.raises(UserError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_folders_and_files_are_named(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"there is no model folder {tmp_path / 'none'}")):
        load(tmp_path / "none")
    with pytest.raises(UserError, match=r"has no config\.json"):
        load(tmp_path)
    folder = saved(tmp_path / "m")
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        load(folder)


def test_a_hugging_face_folder_is_recognised(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match=r"Hugging Face folder \(llama\).*espalier import"):
        read_config(tmp_path)


def test_a_truncated_file_is_refused(tmp_path):
    folder = saved(tmp_path / "m")
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="corrupt or truncated"):
        load(folder)


def test_a_pickle_in_place_of_weights_is_not_unpickled(tmp_path):
    folder = saved(tmp_path / "m")

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    (folder / WEIGHTS).write_bytes(pickle.dumps(Bomb()) + b"\0" * 100)
    with pytest.raises(UserError, match="corrupt or truncated"):
        load(folder)
    assert not (tmp_path / "exploded").exists()


def test_integers_are_no_dense_weights(tmp_path):
    folder = saved(tmp_path / "m")
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"norm.weight": torch.ones(16, dtype=torch.int8)}, folder / WEIGHTS)
    with pytest.raises(UserError, match=r"norm\.weight is stored as torch\.int8"):
        load(folder)


def test_importing_models_is_cheap():
    script = "import sys, models, models.errors; print(sorted({'torch', 'safetensors'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

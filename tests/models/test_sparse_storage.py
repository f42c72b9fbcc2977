"""Weights with many zeros are stored without them, and come back to the bit."""

import json

import pytest
import torch

from models.checkpoint import load, read_sparse, save_model
from models.config import ModelConfig
from models.errors import UserError
from models.io import TensorFiles, write_tensors
from models.sparse_storage import MASK, VALUES, is_sparse, pack, unpack
from models.transformer import Transformer

PRUNED = "blocks.0.feedforward.up.weight"


def build(**options):
    torch.manual_seed(0)
    base = {"vocab_size": 40, "width": 32, "depth": 2, "context": 24}
    sublayers = {"attention": {"kind": "full", "heads": 4}, "feedforward": {"kind": "swiglu", "width": 36}}
    return Transformer(ModelConfig.from_dict({**base, **sublayers, **options})).eval()


@torch.no_grad()
def pruned(sparsity, **options):
    """A model whose matrices in the blocks have this share of zeros."""
    model = build(**options)
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and parameter.dim() > 1:
            parameter.masked_fill_(torch.rand(parameter.shape) < sparsity, 0.0)
    return model


def written(model, folder, **how):
    folder.mkdir(exist_ok=True)
    save_model(model, folder, **how)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5), (8, 16), (2, 7, 9)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_what_is_packed_comes_back(dtype, shape, sparsity):
    tensor = torch.randn(shape).masked_fill_(torch.rand(shape) < sparsity, 0.0).to(dtype)
    tensors = dict(pack("w", tensor))
    assert tensors["w" + MASK].shape == (-(-tensor.numel() // 8),)
    back = unpack(tensors["w" + MASK], tensors["w" + VALUES], shape)
    assert back.dtype == dtype
    assert torch.equal(back, tensor)


@pytest.mark.parametrize("shard_bytes", [2**30, 4000])
def test_a_sparse_folder_is_smaller_and_loads_the_same(shard_bytes, tmp_path):
    model = pruned(0.5).to(torch.bfloat16)
    folder = written(model, tmp_path / "sparse", shard_bytes=shard_bytes)
    assert PRUNED in read_sparse(folder)
    assert "embedding.weight" not in read_sparse(folder)
    again = load(folder)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
    files = TensorFiles(folder)
    stored = sum(files[name].nbytes for name in files)
    dense = sum(tensor.nbytes for tensor in model.state_dict().values())
    blocks = sum(model.state_dict()[name].nbytes for name in read_sparse(folder))
    zeros = sum(int((model.state_dict()[name] == 0).sum()) for name in read_sparse(folder))
    assert abs(stored - (dense - 2 * zeros + blocks / 16)) <= len(read_sparse(folder))


def test_from_a_fifth_of_zeros_on():
    weight = torch.ones(10, 10)
    weight.view(-1)[:19] = 0
    assert not is_sparse(weight)
    weight.view(-1)[19] = 0
    assert is_sparse(weight)
    assert not is_sparse(torch.zeros(10))  # a norm or a bias
    stored = sum(tensor.nbytes for _, tensor in pack("w", weight.to(torch.bfloat16)))
    assert stored < 0.9 * 2 * weight.numel()


def test_a_dense_folder_says_nothing_of_it(tmp_path):
    content = json.loads((written(build(), tmp_path / "dense") / "config.json").read_text())
    assert "sparse" not in content


def test_stacked_experts_are_stored_so_too(tmp_path):
    experts = {"kind": "experts", "count": 4, "top_k": 2, "expert": {"kind": "swiglu", "width": 16}}
    model = pruned(0.6, feedforward=experts)
    folder = written(model, tmp_path / "experts")
    assert any(".experts." in name for name in read_sparse(folder))
    again = load(folder)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def changed(folder, change):
    """The folder with its tensors, by name, changed."""
    files = TensorFiles(folder)
    tensors = {name: files[name].clone() for name in files}
    change(tensors)
    write_tensors(folder, tensors.items())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({PRUNED + VALUES: t[PRUNED + VALUES][1:]}), "the mask keeps"),
        (lambda t: t.update({PRUNED + MASK: t[PRUNED + MASK][1:]}), "has shape"),
        (lambda t: t.update({PRUNED + MASK: t[PRUNED + MASK].float()}), "a mask is torch.uint8"),
        (lambda t: t.update({PRUNED + VALUES: t[PRUNED + VALUES].view(-1, 1)}), "has shape"),
        (lambda t: t.pop(PRUNED + MASK), "lack"),
        (lambda t: t.pop(PRUNED + VALUES), "lack"),
        (lambda t: t.update({PRUNED: torch.zeros(36, 32)}), "hold"),
    ],
    ids=["fewer values", "a shorter mask", "a mask of floats", "values in rows", "no mask", "no values", "twice"],
)
def test_damaged_ones_are_refused(change, words, tmp_path):
    folder = written(pruned(0.5), tmp_path / "sparse")
    changed(folder, change)
    with pytest.raises(UserError, match=words):
        load(folder)


@pytest.mark.parametrize(
    ("sparse", "words"),
    [
        (["blocks.9.x"], "no tensor of this architecture"),
        ("embedding.weight", "must be a list"),
        ([1], "must be a list"),
    ],
)
def test_a_wrong_list_is_refused(sparse, words, tmp_path):
    folder = written(pruned(0.5), tmp_path / "sparse")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"sparse": sparse}))
    with pytest.raises(UserError, match=words):
        load(folder)

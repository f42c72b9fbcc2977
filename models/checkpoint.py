"""The model folder: what passes between stages and what a person keeps.

    config.json          {"format": "espalier", "format_version": 1, "architecture": {...}, "task": {"kind": ...}},
                         and under "sparse" the names of weights that are stored without their zeros
    model.safetensors    the weights as stored: packed where quantized; in shards with an index when large

The config says all that is needed to rebuild the model, and names no Python class.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.config import ModelConfig
from models.errors import UserError, did_you_mean
from models.finite import check_finite, converted
from models.io import (
    SHARD_BYTES,
    TensorFiles,
    inside,
    read_json,
    sha256_of,
    weight_files,
    write_json,
    write_tensors,
    writing,
)
from models.memory import check_memory
from models.mixture_of_depths import EXACT
from models.sparse_storage import DenseTensors, is_sparse, pack
from models.transformer import Transformer, outline
from models.weight_formats import described, install

__all__ = ["FORMAT_VERSION", "hash_weights", "load", "read_config", "save_model", "writing"]

FORMAT = "espalier"
FORMAT_VERSION = 1
CONFIG = "config.json"
DENSE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # what a weight that is not packed may be
_KEYS = ("format", "format_version", "architecture", "task", "sparse")


def save_model(
    model: Transformer,
    directory: Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    task: Mapping[str, Any] | None = None,
) -> None:
    """Write `config.json` and the weights of `model` into an existing `directory` (usually from `writing`).

    Args:
        dtype: of the dense floating-point tensors; by default each as it is. Packed tensors are never converted, nor
            are the buffers that a model keeps in fp32.
        shard_bytes: largest size of one file; more go into shards with an index.
        task: what the model was trained for, as plain values with a `kind`; None leaves it out.
    """
    packed = described(model)
    config = replace(model.config, compression=packed)
    content = {"format": FORMAT, "format_version": FORMAT_VERSION, "architecture": config.to_dict()}
    content |= {} if task is None else {"task": dict(task)}
    sparse: list[str] = []
    write_tensors(directory, _converted(model, packed, dtype, sparse), shard_bytes)
    write_json(directory / CONFIG, content | ({"sparse": sparse} if sparse else {}))


def _converted(
    model: nn.Module, packed: dict, dtype: torch.dtype | None, sparse: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """The state dict as (name, tensor), dense floating-point tensors in `dtype`; a tensor that is shared comes once.

    Weights with many zeros come without them, and their names are added to `sparse`.
    """
    seen: set[int] = set()
    for name, tensor in model.state_dict().items():
        if tensor.numel() and tensor.data_ptr() in seen:
            raise ValueError(f"{name} shares its memory with an earlier tensor, so a reload would separate them")
        seen.add(tensor.data_ptr())
        dense = tensor.is_floating_point() and not _is_exact(name) and name.rpartition(".")[0] not in packed
        stored = converted(name, tensor, dtype if dense else None)
        if dense and is_sparse(stored):
            check_finite([(name, stored)], "to be written")
            sparse.append(name)
            yield from pack(name, stored)
        else:
            yield name, stored


def read_config(folder: str | Path) -> ModelConfig:
    """The architecture in a model folder's `config.json`. Raises UserError if that is missing or wrong."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"there is no model folder {folder}")
    content = read_json(inside(folder, CONFIG))
    if "model_type" in content and "format" not in content:
        kind = content["model_type"]
        raise UserError(f"{folder} is a Hugging Face folder ({kind}); turn it into a model folder with espalier import")
    if content.get("format") != FORMAT:
        raise UserError(f"{folder / CONFIG} has format {content.get('format')!r}, not {FORMAT!r}")
    if content.get("format_version") != FORMAT_VERSION:
        version = content.get("format_version")
        raise UserError(f"{folder} has format version {version!r}; this installation reads version {FORMAT_VERSION}")
    for key in content:
        if key not in _KEYS:
            raise UserError(f"{folder / CONFIG}: unknown key {key!r}{did_you_mean(key, _KEYS)}")
    if "architecture" not in content:
        raise UserError(f"{folder / CONFIG} has no architecture")
    try:
        return ModelConfig.from_dict(content["architecture"])
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None


def read_sparse(folder: Path) -> list[str]:
    """The names of the tensors that a model folder holds without their zeros. Raises UserError for anything else."""
    names = read_json(inside(folder, CONFIG)).get("sparse", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{folder / CONFIG}: sparse must be a list of names of tensors, got {names!r:.100}")
    return names


def read_task(folder: str | Path) -> Any:
    """The entry `task` of `config.json`, unchecked; None where there is none."""
    return read_json(inside(Path(folder).expanduser(), CONFIG)).get("task")


def load(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Transformer:
    """Load the model in `folder`, in evaluation mode. On the CPU its weights stay memory-mapped, and are never copied.

    Args:
        device: where the model goes.
        dtype: of the dense floating-point weights; by default each as stored. Packed tensors stay as they are.

    Raises:
        UserError: the folder is missing, of another version or corrupt, or its tensors do not fit its config.
    """
    folder = Path(folder).expanduser()
    config = read_config(folder)
    files, sparse = TensorFiles(folder), read_sparse(folder)
    try:
        model = skeleton(config, dtype or stored_dtype(files, config))
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        check_memory(tensor for name, tensor in model.state_dict().items() if name in sparse)
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    return fill(model, DenseTensors(files, sparse, shapes).items(), device, dtype)


def stored_dtype(files: Mapping[str, Tensor], config: ModelConfig) -> torch.dtype:
    """The dtype that holds every dense weight in `files` without loss, which is what packed modules compute in."""
    dense = (files[name] for name in files if name.rpartition(".")[0] not in config.compression and not _is_exact(name))
    return _widest(tensor.dtype for tensor in dense if tensor.dtype in DENSE) or torch.get_default_dtype()


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype | None:
    found = list(set(dtypes))
    return reduce(torch.promote_types, found) if found else None


def skeleton(config: ModelConfig, dtype: torch.dtype | None = None) -> Transformer:
    """The model of `config` on the meta device: shapes without memory, and packed modules where it is compressed."""
    model = outline(config)
    with torch.device("meta"):
        model = model.to(dtype)
        install(model, config.compression)
    return model


def fill(
    model: Transformer,
    tensors: Iterator[tuple[str, Tensor]],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> Transformer:
    """Give a meta-device model its weights without copying those that are already right, and set evaluation mode.

    `tensors` must be the whole state dict in shapes that fit. Dense weights of several dtypes become the one that holds
    them all. Raises UserError for a dtype that no dense weight has, or other than a packed one's, and for numbers that
    `dtype` cannot hold.
    """
    own = model.state_dict()
    check_memory(buffer for name, buffer in model.named_buffers() if name not in own)
    for module in model.modules():  # what no file holds: buffers that are computed from the config
        if any(buffer.is_meta for name, buffer in module.named_buffers(recurse=False) if _computed(module, name)):
            module.to_empty(device=device, recurse=False)
            module.reset_parameters()
    packed = model.config.compression
    state = {}
    for name, tensor in tensors:
        if name.rpartition(".")[0] in packed:
            wanted = own[name].dtype
            if tensor.dtype != wanted and not (tensor.dtype in DENSE and wanted in DENSE):
                raise UserError(f"the tensor {name} is stored as {tensor.dtype}; its form calls for {wanted}")
            state[name] = tensor.to(device)
        elif tensor.dtype not in DENSE:
            raise UserError(f"the tensor {name} is stored as {tensor.dtype}, which is no dense weight")
        else:
            state[name] = converted(name, tensor.to(device), None if _is_exact(name) else dtype)
    dense = [name for name in state if name.rpartition(".")[0] not in packed and not _is_exact(name)]
    widest = _widest(state[name].dtype for name in dense)
    state |= {name: state[name].to(widest) for name in dense}
    model.load_state_dict(state, assign=True)
    return model.eval()


def _is_exact(name: str) -> bool:
    """Whether the tensor is a buffer that is fp32 in every dtype (models/mixture_of_depths.py, models/experts)."""
    owner, _, buffer = name.rpartition(".")
    return (owner.endswith(".depth") and buffer in EXACT) or name.endswith(".feedforward.router.bias")


def _computed(module: nn.Module, buffer: str) -> bool:
    return buffer in module._non_persistent_buffers_set


def hash_weights(folder: str | Path) -> str:
    """SHA-256 of the weights: of `model.safetensors` as `sha256sum` gives it, of shards one after another by name."""
    return sha256_of(*weight_files(Path(folder).expanduser()))


def hash_files(folder: str | Path) -> dict[str, str]:
    """SHA-256 of each file of the weights, by its name, as `sha256sum` gives it."""
    return {path.name: sha256_of(path) for path in weight_files(Path(folder).expanduser())}

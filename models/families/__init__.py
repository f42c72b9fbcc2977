"""Hugging Face file formats, a family a file: a folder of `config.json` and safetensors becomes a model, and back.

A family maps the *file* format, which is what people have, not the module tree of `transformers`. To add one, write its
file and list it in `FAMILIES`.
"""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.checkpoint import CONFIG, fill, skeleton
from models.config import ModelConfig
from models.errors import Notice, UserError, did_you_mean
from models.experts import StackedExperts
from models.experts.layout import stack
from models.families.bert import Bert
from models.families.gemma import Gemma
from models.families.gpt2 import Gpt2
from models.families.gpt_neox import GptNeoX
from models.families.labels import class_labels, class_names
from models.families.llama import Llama
from models.families.mixtral import Mixtral
from models.families.modernbert import ModernBert
from models.families.phi3 import Phi3
from models.families.protocol import Family, Transform
from models.families.qwen3_moe import Qwen3Moe
from models.io import SHARD_BYTES, TensorFiles, inside, read_json, write_json, write_tensors, writing
from models.sidecars import GENERATION, read_sidecars, special_tokens, write_sidecars
from models.transformer import Transformer
from models.weight_formats import described

__all__ = ["FAMILIES", "Family", "Transform", "export_folder", "import_folder", "is_family_folder", "write_folder"]

FAMILIES: dict[str, Family] = {
    "llama": Llama("llama"),
    "mistral": Llama("mistral"),
    "mixtral": Mixtral(),
    "qwen3_moe": Qwen3Moe(),
    "phi3": Phi3("phi3"),
    "gemma": Gemma("gemma"),
    "gpt2": Gpt2(),
    "gpt_neox": GptNeoX(),
    "bert": Bert(),
    "modernbert": ModernBert(),
}


def is_family_folder(folder: str | Path) -> bool:
    """Whether `folder` is a Hugging Face model folder (of any family), not one of Espalier's."""
    path = Path(folder).expanduser() / CONFIG
    return path.is_file() and "model_type" in (content := read_json(path)) and "format" not in content


def import_folder(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Transformer:
    """Load a Hugging Face folder of a supported family as a model, in evaluation mode; no code of the folder is run.

    Args:
        folder: holds `config.json` and safetensors, sharded or not. models/sidecars.py brings its tokenizer along.
        device: where the model goes.
        dtype: of the weights; by default each as stored.

    Raises:
        UserError: an unknown family, an option of the family that has no counterpart here, pickled or quantized
            weights, or tensors that do not fit the config.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    values = read_json(inside(folder, CONFIG))
    model_type = str(values.get("model_type"))
    if model_type not in FAMILIES:
        hint = did_you_mean(model_type, FAMILIES)
        raise UserError(f"{folder / CONFIG}: model_type {model_type!r} is not supported{hint}")
    for key, what in (("quantization_config", "quantized weights"), ("auto_map", "its own code, which is never run")):
        if values.get(key):
            raise UserError(f"{folder / CONFIG}: {key} says that the model has {what}; import the plain one")
    family = FAMILIES[model_type]
    if family.segmented:
        values["sep_token_id"] = special_tokens(folder).get("sep_token_id")
    try:
        config = family.read_config(values)
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    model, files = skeleton(config), TensorFiles(folder)
    tensors = _grouped(_names_in(files, config, family))
    own = model.state_dict()  # without memory yet
    how = {name: family.transform(name, config) for name in tensors}
    files.check({name: tuple(how[name].join([own[one] for one in ours]).shape) for name, ours in tensors.items()})

    def parts() -> Iterator[tuple[str, Tensor]]:
        for name, ours in tensors.items():
            yield from zip(ours, how[name].split(files[name], [len(own[one]) for one in ours]), strict=True)

    fill(model, parts(), device, dtype)
    stack(model)  # the files hold an expert's matrices one by one
    return model


def _grouped(names: dict[str, str]) -> dict[str, list[str]]:
    """Name in the file -> our names of what it holds, from our name -> name in the file."""
    found: dict[str, list[str]] = {}
    for ours, theirs in names.items():
        found.setdefault(theirs, []).append(ours)
    return found


def _names_in(files: TensorFiles, config: ModelConfig, family: Family) -> dict[str, str]:
    """Our name -> name in these very files, which may be those of a model without its head, or of an older version.

    What they hold beside the weights is forgotten: rotary tables, masks, and the head of a tied model.
    """
    names, head = family.names(config), family.head
    for name in list(files):
        for old, new in family.old_leaves:
            if name.endswith(old):
                files.rename(name, name.removesuffix(old) + new)
    prefix = names["embedding.weight"].partition(".")[0] + "."
    if not any(name.startswith(prefix) for name in files):  # a model that was saved without its head
        names = {ours: theirs.removeprefix(prefix) for ours, theirs in names.items()}
    if head not in files and family.old_head in files:
        head = family.old_head
        names = {ours: head if theirs == family.head else theirs for ours, theirs in names.items()}
    for name in [name for name in files if name.endswith(family.buffers)]:
        files.drop(name)
    unused = [name for name in files if name.startswith(family.unused) and name not in names.values()]
    for name in unused:
        files.drop(name)
    if told := [name for name in unused if name not in chain(*family.copies)]:
        listed = ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in told))
        warnings.warn(f"{files.folder}: this model does not use {listed}, which is left out", Notice, stacklevel=3)
    embedding = names["embedding.weight"]
    if config.head.tied and head in files:
        if embedding not in files:
            names["embedding.weight"] = head  # the file has the one matrix under its other name
        elif not torch.equal(files[head], files[embedding]):
            raise UserError(
                f"{files.folder} ties its head to the embedding (tie_word_embeddings), "
                f"yet holds a {head} that differs from {embedding}"
            )
        else:
            files.drop(head)
    if not config.head.tied and head in names.values() and head not in files:
        raise UserError(
            f"{files.folder} has no {head}, and its {CONFIG} says no tie_word_embeddings: true, which would take "
            f"{embedding} for it"
        )
    return names


def export_folder(
    model: Transformer, out: str | Path, source: str | Path | None = None, overwrite: bool = False
) -> None:
    """Write `model` as a dense Hugging Face folder; packed weights are written as the dense ones that they stand for.

    Args:
        model: of an architecture that a supported family can hold.
        out: the folder to write; it appears whole or not at all.
        source: the folder whose files beside the weights (models/sidecars.py) go along, and whose special tokens are
            named in the configs.
        overwrite: whether `out` may be replaced.

    Raises:
        UserError: no family can hold the architecture, with the reason; or `out` cannot be written.
    """
    family, values = family_of(model.config)
    with writing(out, overwrite) as directory:
        dtype = next(model.parameters()).dtype  # packed weights are buffers
        write_folder(directory, values, file_tensors(model, family), dtype, source)


def family_of(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The first family that can hold `config`, and its `config.json`. Raises UserError with each family's reason."""
    reasons = {}
    for model_type, family in FAMILIES.items():
        try:
            return family, family.write_config(config)
        except UserError as error:
            reasons.setdefault(str(error), model_type)
    listed = "; ".join(f"{model_type}: {reason}" for reason, model_type in reasons.items())
    raise UserError(f"no Hugging Face family can hold this model ({listed})")


Packing = Callable[[str, Sequence[nn.Module], Transform, torch.dtype], Iterable[tuple[str, Tensor]]]


def dense(
    name: str, modules: Sequence[nn.Module], transform: Transform, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The weights of packed modules as the one dense tensor `name` that they stand for."""
    yield name, transform.join([module.dequantize().to(dtype) for module in modules])


def file_tensors(model: Transformer, family: Family, weight: Packing = dense) -> Iterator[tuple[str, Tensor]]:
    """(name in the file, tensor) of every weight, and zeros for a bias that only the file format has.

    `weight` says what the weights of packed modules become that are one tensor of the file:
    (name in the file, modules, how it holds them, dtype of the model) -> tensors.

    Raises:
        UserError: of the weights that are one tensor of the file some are packed and others not.
    """
    packed, dtype, copies = described(model), next(model.parameters()).dtype, dict(family.copies)
    for theirs, ours in _grouped(family.names(model.config)).items():
        transform = family.transform(theirs, model.config)
        tensors = [_tensor(model, name, packed, dtype) for name in ours]
        if all(tensor is not None for tensor in tensors):
            yield theirs, (whole := transform.join(tensors))
            if theirs in copies:
                yield copies[theirs], whole.clone()
        elif any(tensor is not None for tensor in tensors):
            listed = ", ".join(ours)
            raise UserError(f"{theirs} of the file holds {listed}, of which some are packed and some not: pack all")
        else:
            yield from weight(theirs, [model.get_submodule(name.rpartition(".")[0]) for name in ours], transform, dtype)


def _tensor(model: Transformer, name: str, packed: Collection[str], dtype: torch.dtype) -> Tensor | None:
    """Our tensor `name`, zeros for a bias that is not there; None for the weight of a packed module."""
    path, _, leaf = name.rpartition(".")
    if (tensor := _of_stack(model, path)) is not None:
        return tensor
    module = model.get_submodule(path)
    tensor = getattr(module, leaf, None)
    if tensor is not None:
        return tensor.to(dtype) if path in packed else tensor
    if leaf != "bias":
        return None
    norm = isinstance(module, nn.LayerNorm)
    return torch.zeros(module.normalized_shape if norm else module.out_features, dtype=dtype)


def _of_stack(model: Transformer, path: str) -> Tensor | None:
    """The weight of the map called `path` if it is an expert's whose layer keeps them in one tensor, else None."""
    block, _, rest = path.partition(".experts.")
    experts = model.get_submodule(f"{block}.experts") if rest else None
    if not isinstance(experts, StackedExperts):
        return None
    number, _, part = rest.partition(".")
    return getattr(experts, part)[int(number)]


def write_folder(
    directory: Path,
    values: dict[str, Any],
    tensors: Iterator[tuple[str, Tensor]],
    dtype: torch.dtype,
    source: str | Path | None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write configs, tensors and the files beside the weights of `source` into an existing `directory`.

    `values` is the family's `config.json`, to which the dtype and the special tokens are added.
    """
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if source is not None:
        write_sidecars(read_sidecars(source), directory)
        tokens |= special_tokens(source)
        if "id2label" in values:
            values |= class_labels(class_names(source, len(values["id2label"])))
    write_json(directory / CONFIG, values | tokens | {"dtype": str(dtype).removeprefix("torch.")})
    generation = directory / GENERATION
    if not generation.exists():
        write_json(generation, {name: token for name, token in tokens.items() if token is not None})
    write_tensors(directory, tensors, shard_bytes)

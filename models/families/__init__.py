"""Hugging Face file formats, a family a file: a folder of `config.json` and safetensors becomes a model, and back.

A family maps the *file* format, which is what people have, not the module tree of `transformers`. To add one, write its
file and list it in `FAMILIES`.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.checkpoint import CONFIG, fill, skeleton
from models.config import ModelConfig
from models.errors import UserError, did_you_mean
from models.experts import StackedExperts
from models.experts.layout import stack
from models.families.llama import Llama
from models.families.mixtral import Mixtral
from models.families.protocol import Family
from models.families.qwen3_moe import Qwen3Moe
from models.io import SHARD_BYTES, TensorFiles, inside, read_json, write_json, write_tensors, writing
from models.sidecars import GENERATION, read_sidecars, special_tokens, write_sidecars
from models.transformer import Transformer
from models.weight_formats import described

__all__ = ["FAMILIES", "Family", "export_folder", "import_folder", "is_family_folder", "write_folder"]

HEAD = "lm_head.weight"

FAMILIES: dict[str, Family] = {
    "llama": Llama("llama"),
    "mistral": Llama("mistral"),
    "mixtral": Mixtral(),
    "qwen3_moe": Qwen3Moe(),
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
    try:
        config = FAMILIES[model_type].read_config(values)
    except UserError as error:
        raise UserError(f"{folder / CONFIG}: {error}") from None
    model = skeleton(config)
    names = FAMILIES[model_type].names(config)
    files = TensorFiles(folder)
    if config.head == "tied" and HEAD in files and names["embedding.weight"] not in files:
        names["embedding.weight"] = HEAD  # the file has the one matrix under its other name
    _drop_copies(files, config, names)
    files.check({names[name]: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    fill(model, ((name, files[names[name]]) for name in model.state_dict()), device, dtype)
    stack(model)  # the files hold an expert's matrices one by one
    return model


def _drop_copies(files: TensorFiles, config: ModelConfig, names: dict[str, str]) -> None:
    """Forget what some files hold beside the weights: rotary tables, and the head of a tied model."""
    for name in [name for name in files if name.endswith("rotary_emb.inv_freq")]:
        files.drop(name)
    embedding = names["embedding.weight"]
    if config.head == "tied" and HEAD in files and embedding != HEAD:
        if not torch.equal(files[HEAD], files[embedding]):
            raise UserError(
                f"{files.folder} ties its head to the embedding (tie_word_embeddings), "
                f"yet holds a {HEAD} that differs from {embedding}"
            )
        files.drop(HEAD)
    if config.head == "untied" and HEAD not in files:
        raise UserError(
            f"{files.folder} has no {HEAD}, and its {CONFIG} says no tie_word_embeddings: true, which would take "
            f"{embedding} for it"
        )


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
        write_folder(directory, values, file_tensors(model, family), model.norm.weight.dtype, source)


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


def dense(name: str, module: nn.Module, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The weight of a packed module as the one dense tensor `name` that it stands for."""
    yield name, module.dequantize().to(dtype)


def file_tensors(
    model: Transformer,
    family: Family,
    weight: Callable[[str, nn.Module, torch.dtype], Iterable[tuple[str, Tensor]]] = dense,
) -> Iterator[tuple[str, Tensor]]:
    """(name in the file, tensor) of every weight, and zeros for a bias that only the file format has.

    `weight` says what a packed module's weight becomes: (name in the file, module, dtype of the model) -> tensors.
    """
    packed, dtype = described(model), model.norm.weight.dtype
    for name, theirs in family.names(model.config).items():
        path, _, leaf = name.rpartition(".")
        if (tensor := _of_stack(model, path)) is not None:
            yield theirs, tensor
            continue
        module = model.get_submodule(path)
        tensor = getattr(module, leaf, None)
        if tensor is not None:
            yield theirs, tensor.to(dtype) if path in packed else tensor
        elif leaf == "bias":
            yield theirs, torch.zeros(module.out_features, dtype=dtype)
        else:
            yield from weight(theirs, module, dtype)


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
    write_json(directory / CONFIG, values | tokens | {"dtype": str(dtype).removeprefix("torch.")})
    generation = directory / GENERATION
    if not generation.exists():
        write_json(generation, {name: token for name, token in tokens.items() if token is not None})
    write_tensors(directory, tensors, shard_bytes)

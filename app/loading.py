"""A model from what a person may have: a model folder, a Lightning checkpoint, or a Hugging Face folder."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from app.data.tokenizer import Tokenizer, load_tokenizer
from app.history import read_history
from app.tasks import TASKS, CausalLM, Classify, MaskedLM, Task
from models import checkpoint, families
from models.config import ModelConfig
from models.errors import UserError
from models.families.labels import class_names
from models.finite import check_finite
from models.heads.classifier import Classifier
from models.io import sha256_of
from models.shapes import EACH, VALUES, Leaf, check_shape
from models.transformer import Transformer

SHARDED = "meta.pt"  # a file of every sharded checkpoint
CHECKPOINT = {  # what a checkpoint holds, where it holds it
    "espalier?": {"recipe?": VALUES},
    "hyper_parameters?": VALUES,
    "state_dict?": {EACH: Leaf("a tensor", lambda value: isinstance(value, torch.Tensor))},
}
Kind = Literal["folder", "checkpoint", "hugging face"]


@dataclass(frozen=True)
class Source:
    """Origin of a model.

    Attributes:
        weights_sha256: of the files that hold the weights (models.checkpoint.hash_weights), or of the checkpoint file.
        history: the stages so far, oldest first, as app.history has them; empty where nothing is known.
    """

    path: Path
    kind: Kind
    weights_sha256: str
    history: list[dict[str, Any]]

    @property
    def tokenizer_folder(self) -> Path | None:
        """Where the tokenizer lies that came with it; None where none did."""
        at = self.path.absolute()
        places = (at.parent, at.parent.parent) if self.kind == "checkpoint" else (at,)
        return next((place for place in places if (place / "tokenizer.json").exists()), None)

    @property
    def folder(self) -> Path | None:
        """The folder with the weight files; None for a checkpoint, which holds more than weights."""
        return None if self.kind == "checkpoint" else self.path


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, its tokenizer (None where none came with it), where both came from, and its task."""

    model: Transformer
    tokenizer: Tokenizer | None
    source: Source
    task: Task = field(default_factory=CausalLM)

    def text_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            UserError: none came with the model, or the tokens that begin and end its texts have no embedding. Other
                tokens above the embedding's rows (a `<pad>`) are refused where a text holds one.
        """
        if self.tokenizer is None:
            raise UserError(f"{self.source.path} has no tokenizer.json, and text cannot be read without one")
        rows = self.model.config.vocab_size
        for name, number, use in (
            (self.tokenizer.begin_of_text, self.tokenizer.begin, "begins or ends texts with"),
            (self.tokenizer.end_of_text, self.tokenizer.eot, "begins or ends texts with"),
            *([(self.tokenizer.mask_token, self.tokenizer.mask, "masks with")] if self.task.needs_mask else []),
        ):
            if number >= rows:
                raise UserError(
                    f"the tokenizer in {self.source.path} {use} {name!r}, its token {number}, "
                    f"but the model has embeddings for {rows} tokens"
                )
        return self.tokenizer


def resolve_device(name: str) -> torch.device:
    """Return the device that `auto`, `cpu` or `cuda` stands for.

    Raises:
        UserError: CUDA is asked for where there is none.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not available:
        built = "this machine has no usable CUDA device" if torch.version.cuda else "this torch was built without CUDA"
        raise UserError(f"device {name}: {built}; use --device cpu")
    return device


def resolve_dtype(name: str) -> torch.dtype | None:
    """Return the dtype of that name; None for `auto`, which keeps the stored one."""
    return None if name == "auto" else getattr(torch, name)


def load_model(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Loaded:
    """Load a model folder, a Lightning checkpoint (.ckpt, with weights_only=True) or a Hugging Face folder.

    Args:
        path: folder or file.
        device: where the model goes.
        dtype: of the dense floating-point weights; by default each as stored.

    Raises:
        UserError: nothing there, neither of the three, another version, corrupt or truncated files, weights that are
            not finite.
    """
    path = Path(path).expanduser()
    loaded = _load(path, device, dtype)
    check_finite(loaded.model.state_dict().items(), f"of {path}")
    return loaded


def _load(path: Path, device: str | torch.device, dtype: torch.dtype | None) -> Loaded:
    if not path.exists():
        raise UserError(f"there is no model at {path}")
    if path.is_file() or (path / SHARDED).exists():
        return _load_checkpoint(path, device, dtype)
    if not (path / checkpoint.CONFIG).exists():
        raise UserError(f"{path} is no model folder: it has no {checkpoint.CONFIG}")
    foreign = families.is_family_folder(path)
    model = families.import_folder(path, device, dtype) if foreign else checkpoint.load(path, device, dtype)
    kind: Kind = "hugging face" if foreign else "folder"
    where = path / checkpoint.CONFIG
    task = foreign_task(path, model.config) if foreign else _task(checkpoint.read_task(path), where, model.config)
    source = Source(path, kind, checkpoint.hash_weights(path), read_history(path))
    return Loaded(model, _tokenizer_of(source), source, task)


def foreign_task(folder: Path, config: ModelConfig) -> Task:
    """The task of a model in a Hugging Face folder, by its head and its direction."""
    if isinstance(config.head, Classifier):
        return Classify(labels=class_names(folder, config.outputs))
    return CausalLM() if config.direction == "causal" else MaskedLM()


def _task(value: Any, where: Path, config: ModelConfig) -> Task:
    """The task that a config names; where it names none it was written before there were others than causal_lm."""
    if value is None:
        return CausalLM()
    task = TASKS.parse(value, f"{where}: task")
    try:
        task.check(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return task


def _load_checkpoint(path: Path, device: str | torch.device, dtype: torch.dtype | None) -> Loaded:
    from app.callbacks.record import FORMAT_VERSION, KEY  # imports Lightning, which takes seconds; folders need none

    content = read_checkpoint(path)
    check_shape(content, CHECKPOINT, str(path))
    record = content.get(KEY, {})
    if record and record.get("format_version") != FORMAT_VERSION:
        version = record.get("format_version")
        raise UserError(f"{path} has format version {version!r}; this installation reads version {FORMAT_VERSION}")
    architecture = content.get("hyper_parameters", {}).get("architecture")
    weights = content.get("state_dict")
    if not isinstance(architecture, Mapping) or not isinstance(weights, Mapping):
        raise UserError(f"{path} is no checkpoint of a pretraining run: it holds no architecture with its weights")
    model = checkpoint.skeleton(ModelConfig.from_dict(architecture))
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = "model."
    found = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    found = {name: tensor for name, tensor in found.items() if name in wanted}
    for name, shape in wanted.items():
        if name not in found or tuple(found[name].shape) != shape:
            held = list(found[name].shape) if name in found else "nothing"
            raise UserError(f"{path}: the weights of {name} should have shape {list(shape)}, but it holds {held}")
    model = checkpoint.fill(model, iter(found.items()), device, dtype)
    source = Source(path, "checkpoint", _hash(path), _history_of(record))
    task = _task(content["hyper_parameters"].get("task"), path, model.config)
    return Loaded(model, _tokenizer_of(source), source, task)


def read_checkpoint(path: Path, sharded: bool = True) -> dict[str, Any]:
    """Return the content of a Lightning checkpoint, a file or a sharded folder, loaded with weights_only=True.

    Args:
        path: file or folder.
        sharded: whether to read what a folder holds of sharded tensors; its files are checked anyhow.

    Raises:
        UserError: it is corrupt, truncated, no checkpoint, or holds objects that would have to be unpickled.
    """
    from app.strategies import checkpoint_io  # imports Lightning

    try:
        whole = sharded or path.is_file()
        content = checkpoint_io.read_checkpoint(path) if whole else checkpoint_io.read_metadata(path)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is no checkpoint that can be read without unpickling objects, which is never done"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no readable checkpoint: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no Lightning checkpoint: it holds {type(content).__name__}, not a mapping")
    return content


def _tokenizer_of(source: Source) -> Tokenizer | None:
    """The tokenizer beside the weights, or in the folder of the run, which holds the folder of the checkpoints."""
    return None if source.tokenizer_folder is None else load_tokenizer(source.tokenizer_folder)


def _history_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pretraining that a checkpoint's own record tells of."""
    if not record:
        return []
    return [{"stage": "pretrain", "recipe": record.get("recipe", {})}]


def _hash(path: Path) -> str:
    """SHA-256 of a file, or of the files of a folder one after another by name."""
    return sha256_of(*(sorted(path.rglob("*")) if path.is_dir() else [path]))

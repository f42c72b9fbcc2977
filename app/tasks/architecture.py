"""An architecture as a recipe writes it (mapping, preset name or file) made whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.config import ModelConfig
from models.errors import UserError
from models.experts import Experts
from models.parsing import Malformed, parse_json, parse_yaml, read_plain
from models.presets import PRESETS, preset


def read_architecture(architecture: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return the mapping that an architecture stands for: itself, a preset's, or that of a YAML or JSON file.

    A file may hold the keys themselves or have them under `architecture`, as a recipe's model or a `config.json` has.

    Raises:
        UserError: neither a preset nor a file, or a file that holds no mapping.
    """
    if isinstance(architecture, Mapping):
        return dict(architecture)
    if architecture in PRESETS:
        return dict(PRESETS[architecture])
    path = Path(architecture).expanduser()
    if not path.is_file():
        if path.suffix in (".yaml", ".yml", ".json"):
            raise UserError(f"there is no architecture file {path}")
        preset(architecture)  # raises, naming the nearest preset
    return read_architecture_file(path)


def read_architecture_file(path: Path) -> dict[str, Any]:
    """Return the architecture in a YAML or JSON file. Raises UserError when there is none."""
    try:
        content = read_plain(path, parse_json if path.suffix == ".json" else parse_yaml)
    except (OSError, Malformed) as error:
        raise UserError(f"{path} cannot be read as YAML or JSON: {error}") from None
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if isinstance(content, dict) and isinstance(content.get("architecture"), dict | str):
        content = content["architecture"]
        if isinstance(content, str):
            return read_architecture(content)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold the keys of an architecture, not {type(content).__name__}")
    return content


def resolve_architecture(
    architecture: str | Mapping[str, Any], vocab_size: int | None = None, context: int | None = None
) -> ModelConfig:
    """Return the config of an architecture, with the vocabulary and context of the data where it names none.

    Args:
        architecture: as `read_architecture` takes it.
        vocab_size: rows that the tokenizer needs; an architecture may have more, never fewer.
        context: tokens of a training sequence; an architecture may have more, never fewer.

    Raises:
        UserError: as `ModelConfig.from_dict`, an architecture that is too small for the data, or one with a router that
            would learn nothing (which models from elsewhere may have).
    """
    values = read_architecture(architecture)
    for key, needed, why in (
        ("vocab_size", vocab_size, "the tokenizer has {} tokens"),
        ("context", context, "the data has sequences of {} tokens (data.sequence_length)"),
    ):
        if needed is None:
            continue
        given = values.get(key)
        if given is None:
            values[key] = needed
        elif isinstance(given, int) and given < needed:
            raise UserError(f"model.architecture.{key} is {given}, but {why.format(needed)}; leave it out or raise it")
    config = ModelConfig.from_dict(values)
    mixtures = [layer.feedforward for layer in config.layers if isinstance(layer.feedforward, Experts)]
    if not all(mixture.router.learns(mixture.top_k) for mixture in mixtures):
        raise UserError(
            "model.architecture: the renormalised weight of a single expert is always 1, and the router would learn "
            "nothing from it; give the router weights: probability, or a top_k of at least 2"
        )
    return config

"""Helpers of the families: typed values of a foreign config, and the one shape that all layers must share."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from models.config import ModelConfig
from models.errors import UserError
from models.heads.language_model import Tied, Untied
from models.inputs.tokens import Tokens
from models.norms import Layer, Rms
from models.positions import Rope

_REQUIRED = object()
# a file format with biases has them in every layer, and a missing one is written as zeros
_FREE = ("bias", "out_bias")


def refuse(values: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse a config whose flags are not as `expected`; a missing or null one is."""
    for key, wanted in expected.items():
        if flag(values, key, wanted) != wanted:
            raise UserError(f"{key}: {str(values[key]).lower()} is not supported")


def one_dropout(values: Mapping[str, Any], embedding: str, residual: str, default: float) -> float:
    """The dropout of the embeddings and of the residual branches, which is one here."""
    first, second = (number(values, key, default) for key in (embedding, residual))
    if first != second:
        raise UserError(
            f"{embedding} {first} and {residual} {second} differ, and a model here has one dropout for both"
        )
    return first


def integer(values: Mapping[str, Any], key: str, default: Any = _REQUIRED) -> int:
    """The whole number above zero at `key`; `default` where it is missing or null."""
    value = _typed(values, key, default, (int,), "a whole number above zero")
    if value < 1:
        raise UserError(f"{key} must be a whole number above zero, got {value}")
    return value


def number(values: Mapping[str, Any], key: str, default: Any = _REQUIRED) -> float:
    """The number at `key`; `default` where it is missing or null."""
    return float(_typed(values, key, default, (int, float), "a number"))


def flag(values: Mapping[str, Any], key: str, default: Any = False) -> bool:
    """The truth value at `key`; `default` where it is missing or null."""
    return _typed(values, key, default, (bool,), "true or false")


def word(values: Mapping[str, Any], key: str, default: Any = _REQUIRED) -> str:
    """The text at `key`; `default` where it is missing or null."""
    return _typed(values, key, default, (str,), "a word")


def _typed(values: Mapping[str, Any], key: str, default: Any, types: tuple[type, ...], what: str) -> Any:
    value = values.get(key)
    if value is None and default is not _REQUIRED:
        return default
    if type(value) not in types:
        raise UserError(f"{key} must be {what}, got {value!r}" if key in values else f"{key} is missing")
    return value


def frame(config: ModelConfig, norm: type[Rms] | type[Layer], position: str = "pre", direction: str = "causal") -> None:
    """Refuse what the family does not have around its layers; a decoder has nothing but matrices at its ends."""
    if config.direction != direction:
        kind = "a decoder" if direction == "causal" else "an encoder"
        raise UserError(f"it is {kind}, and this model is {config.direction}")
    if direction == "causal":
        _plain_ends(config)
    if not isinstance(config.norm, norm) or config.norm.position != position:
        has = f"{config.norm.kind} {config.norm.position}"
        raise UserError(f"it has {norm.kind} norms in position {position}, not {has}")
    if isinstance(config.norm, Rms) and config.norm.offset:
        raise UserError(f"its norms have no offset, and this model's is {config.norm.offset}")
    if config.residual != "standard":
        raise UserError(f"its residual stream is standard, not {config.residual}")
    if config.exits is not None:
        raise UserError("it has one norm before the head, and this model has early exits with norms of their own")


def _plain_ends(config: ModelConfig) -> None:
    if config.outputs != config.vocab_size:
        raise UserError(f"its head predicts tokens, and this model's is a {config.head.kind}")
    if config.head not in (Tied(), Untied()):
        raise UserError("its head is a matrix, and this model's has a bias or a transform")
    if not config.first_norm:
        raise UserError("its first layer has a norm before each sub-layer, and this model first_norm: false")
    if config.input != Tokens():
        raise UserError("its layers read the embeddings as they are, and this model normalises them")


def one_position(config: ModelConfig, attention: Mapping[str, Any], kind: type = Rope) -> None:
    """Refuse another position encoding than this kind, and layers with one of their own."""
    exceptions = "" if attention["position"] in (None, config.position) else " with exceptions"
    if exceptions or not isinstance(config.position, kind):
        raise UserError(f"it has one {kind.kind} position in all layers, not {config.position.kind}{exceptions}")


def common(
    config: ModelConfig, attentions: tuple[type, ...], feedforward: type, order: str = "attention_first"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of the attention and of the feed-forward that every layer has.

    Raises:
        UserError: a layer without one of the two, of another kind or order, or layers whose numbers differ; tokens that
            leave early or pass a layer by; scaled embeddings.
    """
    if config.embedding_scale != 1:
        raise UserError(f"it has no embedding_scale, and this model's is {config.embedding_scale}")
    for i, layer in enumerate(config.layers):
        for name, kinds in (("attention", attentions), ("feedforward", (feedforward,))):
            spec, first = getattr(layer, name), getattr(config.layers[0], name)
            if type(spec) not in kinds or type(spec) is not type(first):
                has = "none" if spec is None else spec.kind
                wanted = type(first).kind if type(first) in kinds else kinds[0].kind
                raise UserError(f"every layer has a {wanted} {name}, and layer {i} has {has}")
        if layer.depth is not None:
            raise UserError(f"every token takes part in every layer, and layer {i} has a {layer.depth.kind}")
        if layer.order != order:
            wanted = "its attention first" if order == "attention_first" else f"order {order}"
            raise UserError(f"every layer has {wanted}, and layer {i} is {layer.order}")
    return _same(config, "attention"), _same(config, "feedforward")


def _same(config: ModelConfig, name: str) -> dict[str, Any]:
    specs = [getattr(layer, name).__dict__ for layer in config.layers]
    shared = {}
    for key in specs[0]:
        counted = Counter(spec[key] for spec in specs)
        usual = counted.most_common(1)[0][0]
        if len(counted) > 1 and key not in _FREE:
            odd = [f"layer {i} has {spec[key]}" for i, spec in enumerate(specs) if spec[key] != usual]
            listed = ", ".join(odd[:4]) + (f" and {len(odd) - 4} more differ" if len(odd) > 4 else "")
            raise UserError(f"all layers have one {name} {key}, and here most have {usual} but {listed}")
        shared[key] = usual
    return shared

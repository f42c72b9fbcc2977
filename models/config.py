"""Architecture: one frozen dataclass tree in which every layer has its own widths and head counts.

`ModelConfig.from_dict` reads two forms. The short one, for people, names sub-layers and tiles a pattern:

    {width: 256, depth: 6, vocab_size: 4096, position: rope, order: attention_first, norm: {kind: rms, position: pre},
     attention: {kind: full, heads: 4, kv_heads: 2}, feedforward: {kind: swiglu, width: 688}}

with `attention: {local: {...}, global: {...}}`, `feedforward: {dense: {...}}` and
`layers: [local/dense, global/dense]` where layers differ; `depths: [null, {kind: mixture_of_depths}]` says in which of
them only some tokens take part. The canonical form, which `to_dict` writes, lists each layer:
`layers: [{attention: {...}, feedforward: {...}, order: ...}, ...]`. A pruned model is an ordinary config.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from models import catalog  # noqa: F401  fills the registries
from models.early_exit import EXITS
from models.errors import UserError, did_you_mean
from models.registry import dump_dataclass, read_dataclass
from models.specs import (
    AFTER,
    ATTENTIONS,
    DEPTHS,
    FEEDFORWARDS,
    HEADS,
    INPUTS,
    NORMS,
    POSITIONS,
    AttentionSpec,
    PositionSpec,
)

SUBLAYERS = ("attention", "feedforward")  # that a layer may have, in the order of their weights
ORDERS = {  # how a layer is wired -> its sub-layers, in their order
    "attention_first": ("attention", "feedforward"),
    "feedforward_first": ("feedforward", "attention"),
    "parallel": ("attention", "feedforward"),
}
RESIDUALS = ("standard", "reversible")
DIRECTIONS = ("causal", "bidirectional")
SQRT_WIDTH = "sqrt_width"  # of an embedding_scale
MOST_LAYERS = 10_000


@dataclass(frozen=True)
class LayerConfig:
    """One layer: its attention and its feed-forward sub-layer (either may be absent) and how they are wired.

    Args:
        attention: spec of the attention, or nothing.
        feedforward: spec of the feed-forward, or nothing.
        order: `attention_first`, `feedforward_first` or `parallel`.
        depth: which tokens take part (models/mixture_of_depths.py); nothing: all of them.
    """

    attention: Any = field(default=None, metadata={"registry": ATTENTIONS})
    feedforward: Any = field(default=None, metadata={"registry": FEEDFORWARDS})
    order: str = "attention_first"
    depth: Any = field(default=None, metadata={"registry": DEPTHS})

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise UserError(f"unknown order {self.order!r}{did_you_mean(self.order, ORDERS)}")
        if self.attention is None and self.feedforward is None:
            raise UserError("a layer needs an attention or a feedforward")
        if self.order == "parallel" and (self.attention is None or self.feedforward is None):
            raise UserError("a parallel layer needs both an attention and a feedforward")

    @property
    def sublayers(self) -> dict[str, Any]:
        """The specs of those that the layer has, in their order."""
        return {name: spec for name in ORDERS[self.order] if (spec := getattr(self, name)) is not None}

    @property
    def share(self) -> float:
        """The share of the tokens that take part, on average."""
        return 1 if self.depth is None else self.depth.capacity


@dataclass(frozen=True)
class ModelConfig:
    """A Transformer: a decoder or, with direction `bidirectional`, an encoder.

    Args:
        vocab_size: rows of the token embedding.
        width: channels of the residual stream.
        layers: the layers from the input to the output.
        context: tokens of the longest training sequence; a hard limit for learned positions.
        norm: kind and position of the normalisation.
        first_norm: whether the first sub-layer normalises what it reads; false where the input does (ModernBERT).
        position: position encoding of every attention that names none of its own.
        input: what becomes the stream (models/inputs): `tokens`.
        head: what is read from it (models/heads): `tied` (the embedding is also the output projection) or `untied`.
        embedding_scale: what token embeddings are multiplied by on their way into the stream: a number, or `sqrt_width`
            (arXiv 1706.03762, section 3.4). The tied head reads them as they are.
        dropout: on the embeddings and on every residual branch, in training.
        direction: `causal`, where a token sees itself and those before it, or `bidirectional`, an encoder.
        residual: `standard`, or `reversible`: two streams, of which training keeps no layer's (models/reversible.py).
        exits: after which layers a token may leave early (models/early_exit.py), or nothing.
        compression: module name -> stored form, for modules that are not plain dense weights.
    """

    vocab_size: int
    width: int
    layers: tuple[LayerConfig, ...]
    context: int = 1024
    norm: Any = field(default_factory=lambda: NORMS["rms"](), metadata={"registry": NORMS})
    first_norm: bool = True
    position: Any = field(default_factory=lambda: POSITIONS["rope"](), metadata={"registry": POSITIONS})
    input: Any = field(default="tokens", metadata={"registry": INPUTS})
    head: Any = field(default="tied", metadata={"registry": HEADS})
    embedding_scale: float | str = 1.0
    dropout: float = 0.0
    direction: str = "causal"
    residual: str = "standard"
    exits: Any = field(default=None, metadata={"registry": EXITS})
    compression: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "context"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        object.__setattr__(self, "input", INPUTS.parse(self.input, "input"))
        object.__setattr__(self, "head", HEADS.parse(self.head, "head"))
        if self.direction not in DIRECTIONS:
            raise UserError(f"unknown direction {self.direction!r}{did_you_mean(self.direction, DIRECTIONS)}")
        self.input.check(self.direction, self.vocab_size)
        if self.residual not in RESIDUALS:
            raise UserError(f"unknown residual {self.residual!r}{did_you_mean(self.residual, RESIDUALS)}")
        scale = self.embedding_scale
        if scale != SQRT_WIDTH and (isinstance(scale, str) or not 0 < scale < math.inf):
            raise UserError(f"embedding_scale must be a number above 0 or {SQRT_WIDTH}, got {scale!r}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if not self.layers:
            raise UserError("an architecture needs at least one layer")
        if self.norm.position in AFTER and any(layer.order == "parallel" for layer in self.layers):
            raise UserError(
                f"norm position {self.norm.position} normalises after each sub-layer, "
                "and a parallel layer has no such place"
            )
        if not self.first_norm and (self.norm.position in AFTER or self.residual == "reversible"):
            raise UserError(
                f"first_norm: false leaves out a norm before a sub-layer, and norm position {self.norm.position} with "
                f"residual {self.residual} cannot do without; leave it out"
            )
        if self.residual == "reversible":
            self._check_reversible()
        if self.exits is not None:
            self.exits.check(self.layers)
        if self.position.acts == "input":
            self._check_sizes(self.position)
        object.__setattr__(
            self, "layers", tuple(self._resolved(layer, number) for number, layer in enumerate(self.layers))
        )
        attentions = [layer.attention for layer in self.layers if layer.attention is not None]
        if (
            self.position.acts not in ("input", "nothing")
            and attentions
            and not any(a.position_types for a in attentions)
        ):
            raise UserError(
                f"position {self.position.kind!r} acts in the attention, and no layer has one that knows positions; "
                "give position: none, or one that is added to the embeddings"
            )

    def _check_reversible(self) -> None:
        """Refuse what a model that keeps no layer's stream cannot compute anew from the next one."""
        if self.norm.position in AFTER:
            raise UserError(
                f"norm position {self.norm.position} normalises the stream, which a reversible one cannot take back; "
                "give position pre or sandwich"
            )
        if any(layer.depth is not None for layer in self.layers):
            raise UserError(
                "depth leaves out the tokens that a router chooses by the stream, and a reversible model computes the "
                "stream anew with other rounding, by which it could choose others; leave one out"
            )
        if any(layer.attention is not None and layer.attention.carries for layer in self.layers):
            raise UserError(
                "carry brings gradients from layer to layer beside the stream, and a reversible model computes the "
                "stream's alone; leave one out"
            )
        if self.exits is not None:
            raise UserError("exits read the stream between layers, and a reversible model keeps none; leave one out")

    def _resolved(self, layer: LayerConfig, number: int) -> LayerConfig:
        if layer.depth is not None:
            layer.depth.check(layer, (layer.attention and layer.attention.position) or self.position)
        if layer.feedforward is not None:
            layer.feedforward.check(self.direction, self.context)
        if layer.attention is None:
            return layer
        attention = layer.attention.resolve(self.width, number)
        if self.direction not in attention.directions:
            raise UserError(f"attention {attention.kind!r} cannot be {self.direction}: {attention.directions_because}")
        attention.check(self.direction)
        if attention.position_types:
            self._check_position(attention)
        return replace(layer, attention=attention)

    def _check_position(self, attention: AttentionSpec) -> None:
        if attention.position is not None and attention.position.acts == "input":
            raise UserError(f"position {attention.position.kind!r} acts on the embeddings: give it to the model")
        position = attention.position or self.position
        if position.acts == "input":
            return
        if position.acts not in ("nothing", *attention.position_types):
            because = f": {attention.position_types_because}" if attention.position_types_because else ""
            types = " or ".join(attention.position_types)
            raise UserError(
                f"attention {attention.kind!r} works with positions that act on {types}, "
                f"and {position.kind!r} acts on {position.acts}{because}"
            )
        self._check_sizes(position, attention.head_width)

    def _check_sizes(self, position: PositionSpec, head_width: int = 0) -> None:
        position.check(width=self.width, head_width=head_width, bidirectional=self.direction == "bidirectional")

    @property
    def outputs(self) -> int:
        """Logits of one prediction: the vocabulary, or the classes of a classifier."""
        return self.head.outputs(self.vocab_size)

    def residual_branches(self) -> int:
        """Number of sub-layers that write into the residual stream."""
        return sum(len(layer.sublayers) for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The canonical form, JSON values only."""
        values = dump_dataclass(self)
        values["layers"] = [dump_dataclass(layer) for layer in self.layers]
        values["compression"] = {name: dict(form) for name, form in self.compression.items()}
        return values

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "ModelConfig":
        """Read the short or the canonical form.

        Raises:
            UserError: an unknown key (with the nearest right one), a missing one, or values that do not fit together.
        """
        if not isinstance(values, Mapping):
            raise UserError(f"architecture: expected keys and values, got {values!r}")
        values = dict(values)
        compression = values.pop("compression", {})
        forms = compression.values() if isinstance(compression, Mapping) else [None]
        if not all(isinstance(form, Mapping) for form in forms):
            raise UserError("architecture.compression: expected module names with their stored forms")
        layers = _read_layers(values)
        known = {name: value for name, value in values.items() if name not in _SHORT_KEYS}
        for name in known:
            if name not in _Plain.__dataclass_fields__:
                choices = [*_Plain.__dataclass_fields__, *_SHORT_KEYS]
                raise UserError(f"architecture: unknown key {name!r}{did_you_mean(name, choices)}")
        plain = read_dataclass(_Plain, known, "architecture")
        return ModelConfig(layers=layers, compression=dict(compression), **plain.__dict__)


@dataclass(frozen=True)
class _Plain:
    """The keys of an architecture that are not about its layers."""

    vocab_size: int
    width: int
    context: int = 1024
    norm: Any = field(default_factory=lambda: NORMS["rms"](), metadata={"registry": NORMS})
    first_norm: bool = True
    position: Any = field(default_factory=lambda: POSITIONS["rope"](), metadata={"registry": POSITIONS})
    input: Any = field(default="tokens", metadata={"registry": INPUTS})
    head: Any = field(default="tied", metadata={"registry": HEADS})
    embedding_scale: float | str = 1.0
    dropout: float = 0.0
    direction: str = "causal"
    residual: str = "standard"
    exits: Any = field(default=None, metadata={"registry": EXITS})


_SHORT_KEYS = ("depth", "attention", "feedforward", "layers", "order", "depths")


def _read_layers(values: Mapping[str, Any]) -> tuple[LayerConfig, ...]:
    """Layers from the canonical list of mappings, or from named specs, a pattern, a depth and an order."""
    pattern = values.get("layers")
    if isinstance(pattern, list | tuple) and pattern and all(isinstance(item, Mapping) for item in pattern):
        for key in ("depth", "attention", "feedforward", "order", "depths"):
            if values.get(key) is not None:
                raise UserError(f"architecture: {key!r} cannot stand beside a full list of layers; leave one out")
        return tuple(read_dataclass(LayerConfig, item, f"architecture.layers[{i}]") for i, item in enumerate(pattern))
    if pattern is not None and not (isinstance(pattern, list | tuple) and pattern):
        raise UserError(f"architecture.layers: expected a list such as [local/dense, global/dense], got {pattern!r}")
    attentions = _named_specs(values.get("attention"), ATTENTIONS, "architecture.attention")
    feedforwards = _named_specs(values.get("feedforward"), FEEDFORWARDS, "architecture.feedforward")
    pairs = [_pair(item, attentions, feedforwards) for item in (pattern or [_default_pair(attentions, feedforwards)])]
    depth = values.get("depth", len(pattern) if pattern else None)
    if type(depth) is not int or not 1 <= depth <= MOST_LAYERS:
        raise UserError(f"architecture: depth must be a whole number of layers, at most {MOST_LAYERS}, got {depth!r}")
    if depth % len(pairs):
        raise UserError(f"architecture: a pattern of {len(pairs)} layers does not tile a depth of {depth}")
    wired = _wire(str(values.get("order", "attention_first")), pairs * (depth // len(pairs)))
    return _with_depths(wired, values.get("depths"))


def _with_depths(layers: tuple[LayerConfig, ...], value: Any) -> tuple[LayerConfig, ...]:
    """Layers with the spec of which tokens take part, one for all of them or a pattern that is tiled over them."""
    where = "architecture.depths"
    pattern = value if isinstance(value, list | tuple) and value else [value]
    if len(layers) % len(pattern):
        raise UserError(f"{where}: a pattern of {len(pattern)} layers does not tile the {len(layers)} that there are")
    specs = [None if item is None else DEPTHS.parse(item, where) for item in pattern]
    return tuple(replace(layer, depth=specs[i % len(specs)]) for i, layer in enumerate(layers))


def _named_specs(value: Any, registry: Any, where: str) -> dict[str, Any]:
    """One unnamed spec, or a mapping of names to specs."""
    if value is None:
        return {}
    if isinstance(value, str) or not isinstance(value, Mapping) or "kind" in value:
        return {"": registry.parse(value, where)}
    return {name: registry.parse(spec, f"{where}.{name}") for name, spec in value.items()}


def _default_pair(attentions: Mapping[str, Any], feedforwards: Mapping[str, Any]) -> str:
    for axis, specs, registry in (
        ("attention", attentions, ATTENTIONS),
        ("feedforward", feedforwards, FEEDFORWARDS),
    ):
        if not specs:
            raise UserError(
                f"architecture: no {axis}: give one such as {registry.example}, or, for layers without any, the full "
                "list of them under `layers`"
            )
        if len(specs) != 1:
            raise UserError(f"architecture: {len(specs)} {axis} specs and no `layers` pattern that chooses among them")
    return f"{next(iter(attentions))}/{next(iter(feedforwards))}"


def _pair(item: Any, attentions: Mapping[str, Any], feedforwards: Mapping[str, Any]) -> tuple[Any, Any]:
    """`attention/feedforward` by their names; a name may be left out where there is only one."""
    where = "architecture.layers"
    first, slash, second = str(item).partition("/")
    if not slash:
        only = first in attentions and len(feedforwards) == 1
        first, second = (first, next(iter(feedforwards))) if only else (_only(attentions), first)
    if first not in attentions:
        raise UserError(f"{where}: {item!r} names no attention{did_you_mean(first, attentions)}")
    if second not in feedforwards:
        raise UserError(f"{where}: {item!r} names no feedforward{did_you_mean(second, feedforwards)}")
    return attentions[first], feedforwards[second]


def _only(specs: Mapping[str, Any]) -> str:
    return next(iter(specs)) if len(specs) == 1 else "?"


def _wire(order: str, pairs: list[tuple[Any, Any]]) -> tuple[LayerConfig, ...]:
    """Arrange the sub-layers: a named order, `sandwich(k)` (arXiv 1911.03864), or a string of s(elf-) and f(eed-)."""
    if order in ORDERS:
        return tuple(LayerConfig(attention, feedforward, order) for attention, feedforward in pairs)
    if len(order) > 2 * MOST_LAYERS:
        raise UserError(f"architecture.order: {len(order)} sub-layers are too many; at most {2 * MOST_LAYERS}")
    sandwich = re.fullmatch(r"sandwich\((\d{1,9})\)", order)
    if sandwich:
        k, n = int(sandwich[1]), len(pairs)
        if k > n:
            raise UserError(f"architecture.order: sandwich({k}) needs at least {k} layers, got depth {n}")
        order = "s" * k + "sf" * (n - k) + "f" * k
    if not re.fullmatch(r"[sf]+", order):
        hint = did_you_mean(order, [*ORDERS, "sandwich(k)", "a string of s and f"])
        raise UserError(f"architecture.order: unknown order {order!r}{hint}")
    attentions, feedforwards = [a for a, _ in pairs], [f for _, f in pairs]
    layers, seen = [], {"s": 0, "f": 0}
    for group in re.findall(r"sf|s|f", order):
        attention = feedforward = None
        if "s" in group:
            attention = attentions[seen["s"] % len(attentions)]
        if "f" in group:
            feedforward = feedforwards[seen["f"] % len(feedforwards)]
        seen = {letter: count + group.count(letter) for letter, count in seen.items()}
        layers.append(LayerConfig(attention, feedforward))
    return tuple(layers)

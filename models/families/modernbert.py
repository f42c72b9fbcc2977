"""The ModernBERT file format (arXiv 2412.13663): masked-token model, classifier, and the bare `ModernBertModel`.

Global and local layers have a RoPE base each, queries, keys and values are one matrix, as are gate and up of GeGLU, and
the first layer reads the normalised embeddings.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.attention.full import Full
from models.attention.window import Window
from models.config import LayerConfig, ModelConfig
from models.errors import UserError
from models.families.bert import read_architecture, same_norm
from models.families.gpt2 import require_square
from models.families.labels import class_labels, count_classes
from models.families.llama import ACTIVATIONS, read_activation, read_rope, write_activation, write_rope
from models.families.protocol import Family
from models.families.uniform import common, flag, frame, integer, number, one_dropout, one_position, word
from models.feedforward import Swiglu
from models.heads.classifier import Classifier
from models.heads.language_model import Tied, Untied
from models.heads.transform import HeadTransform
from models.inputs.tokens import Tokens
from models.norms import Layer
from models.positions import Rope

BARE, MASKED, CLASSES = "ModernBertModel", "ModernBertForMaskedLM", "ModernBertForSequenceClassification"
READ = {name: name for name in (MASKED, CLASSES, BARE)}
POOLS = {"cls": "first", "mean": "mean"}
GLOBAL, LOCAL = "full_attention", "sliding_attention"
BASES = {GLOBAL: ("global_rope_theta", 160_000.0), LOCAL: ("local_rope_theta", 10_000.0)}  # of older files


class ModernBert(Family):
    """ModernBERT files."""

    model_type = "modernbert"
    head = old_head = "decoder.weight"

    def read_config(self, values: Mapping[str, Any]) -> ModelConfig:
        context = integer(values, "max_position_embeddings", 8192)
        norm = Layer(number(values, "norm_eps", 1e-5), bias=flag(values, "norm_bias"))
        far, near = (_read_rope(values, kind, context) for kind in (GLOBAL, LOCAL))
        bias, mlp_bias = flag(values, "attention_bias"), flag(values, "mlp_bias")
        everywhere = Full(
            heads=integer(values, "num_attention_heads"),
            bias=bias,
            out_bias=bias,
            dropout=number(values, "attention_dropout", 0.0),
        )
        window = 2 * (integer(values, "local_attention", 128) // 2)
        around = Window(**everywhere.__dict__ | {"window": window, "position": None if near == far else near})
        feedforward = Swiglu(
            width=integer(values, "intermediate_size"),
            activation=read_activation(values, "hidden_activation", "gelu"),
            bias=mlp_bias,
            out_bias=mlp_bias,
        )
        return ModelConfig(
            vocab_size=integer(values, "vocab_size"),
            width=integer(values, "hidden_size"),
            layers=tuple(
                LayerConfig(around if kind == LOCAL else everywhere, feedforward) for kind in _layer_types(values)
            ),
            context=context,
            norm=norm,
            first_norm=False,
            position=far,
            input=Tokens(norm),
            head=_read_head(values, norm),
            dropout=one_dropout(values, "embedding_dropout", "mlp_dropout", 0.0),
            direction="bidirectional",
        )

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        frame(config, Layer, direction="bidirectional")
        if config.first_norm or not _fits(config.input.norm, config) or config.input.segments is not None:
            raise UserError(
                "its input is {kind: tokens, norm: layer}, with the eps of the layers, and first_norm: false"
            )
        near = [layer.attention for layer in config.layers if isinstance(layer.attention, Window)]
        if len({(one.window, one.position, *one.extras()) for one in near}) > 1:
            raise UserError("its local layers have one window and one position, and this model's differ")
        attention, feedforward = common(_without_windows(config), (Full,), Swiglu)
        one_position(config, attention)
        require_square(_without_windows(config), attention)
        if near and "dilation" in near[0].extras():
            raise UserError("its windows have no dilation")
        ropes = {GLOBAL: config.position, LOCAL: (near[0].position if near else None) or config.position}
        if not isinstance(ropes[LOCAL], Rope):
            raise UserError(f"its local layers have rope, not {ropes[LOCAL].kind}")
        return {
            "architectures": [_architecture(config)],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.width,
            "num_hidden_layers": len(config.layers),
            "num_attention_heads": attention["heads"],
            "intermediate_size": feedforward["width"],
            "hidden_activation": write_activation(feedforward["activation"]),
            "max_position_embeddings": config.context,
            "layer_types": [LOCAL if isinstance(layer.attention, Window) else GLOBAL for layer in config.layers],
            "local_attention": near[0].window if near else 128,
            "rope_parameters": {kind: write_rope(rope)["rope_parameters"] for kind, rope in ropes.items()},
            "norm_eps": config.norm.eps,
            "norm_bias": config.norm.bias,
            "attention_bias": _biased(config, "attention"),
            "mlp_bias": _biased(config, "feedforward"),
            "attention_dropout": attention["dropout"],
            "embedding_dropout": config.dropout,
            "mlp_dropout": config.dropout,
            **_write_head(config),
            **{"cls_token_id": None, "sep_token_id": None},  # unless the tokenizer names them
        }

    def names(self, config: ModelConfig) -> dict[str, str]:
        body = "" if _architecture(config) == BARE else "model."
        norm = ("weight", "bias") if config.norm.bias else ("weight",)
        attention, mlp = (
            ("weight", "bias") if _biased(config, part) else ("weight",) for part in ("attention", "feedforward")
        )
        layer = {"attention_norm": ("attn_norm", norm), "feedforward_norm": ("mlp_norm", norm)}
        layer |= {f"attention.{letter}": ("attn.Wqkv", attention) for letter in "qkv"}
        layer |= {"attention.o": ("attn.Wo", attention), "feedforward.down": ("mlp.Wo", mlp)}
        layer |= {f"feedforward.{part}": ("mlp.Wi", mlp) for part in ("gate", "up")}
        parts = {"embedding": (f"{body}embeddings.tok_embeddings", ("weight",))}
        parts["embedding_norm"] = (f"{body}embeddings.norm", norm)
        for i in range(len(config.layers)):
            own = {ours: theirs for ours, theirs in layer.items() if i or ours != "attention_norm"}
            parts |= {f"blocks.{i}.{ours}": (f"{body}layers.{i}.{name}", held) for ours, (name, held) in own.items()}
        parts["norm"] = (f"{body}final_norm", norm)
        names = {f"{ours}.{leaf}": f"{name}.{leaf}" for ours, (name, leaves) in parts.items() for leaf in leaves}
        return names | (_head_names(config, norm) if body else {})


def _read_head(values: Mapping[str, Any], norm: Layer) -> Any:
    architecture = read_architecture(values, READ)
    if architecture == BARE:
        return Tied()
    activation, bias = read_activation(values, "classifier_activation", "gelu"), flag(values, "classifier_bias")
    transform = HeadTransform(activation, bias, norm)
    if architecture == CLASSES:
        if (pooling := word(values, "classifier_pooling", "cls")) not in POOLS:
            raise UserError(f"classifier_pooling {pooling!r} is not supported (one of: {', '.join(POOLS)})")
        dropout = number(values, "classifier_dropout", 0.0)
        return Classifier(count_classes(values), POOLS[pooling], replace(transform, dropout=dropout))
    kind = Tied if flag(values, "tie_word_embeddings", True) else Untied
    return kind(flag(values, "decoder_bias", True), transform)


def _write_head(config: ModelConfig) -> dict[str, Any]:
    head, transform = config.head, config.head.transform
    if transform is None:  # of the bare model
        return {"tie_word_embeddings": True}
    values = {
        "tie_word_embeddings": not isinstance(head, Untied),
        "classifier_activation": write_activation(transform.activation),
        "classifier_bias": transform.bias,
        "classifier_dropout": transform.dropout,
    }
    if not isinstance(head, Classifier):
        return values | {"decoder_bias": head.bias}
    pooling = next(theirs for theirs, ours in POOLS.items() if ours == head.pool)
    return values | {"classifier_pooling": pooling} | class_labels(range(config.outputs))


def _architecture(config: ModelConfig) -> str:
    """The class that can hold the head. Raises UserError where there is none."""
    head, transform = config.head, config.head.transform
    if head == Tied():
        return BARE
    if transform is None or not _fits(transform.norm, config) or transform.activation not in ACTIVATIONS.values():
        raise UserError(
            "its head has the transform {norm: layer}, with the norms of the layers, or is tied without one"
        )
    if not isinstance(head, Classifier):
        return MASKED
    if head.pool not in POOLS.values():
        raise UserError(f"its classifier pools {' or '.join(POOLS.values())}, and this model's {head.pool}")
    return CLASSES


def _fits(norm: Any, config: ModelConfig) -> bool:
    """Whether a norm outside of the layers is as those of the layers; the file has a bias in all or in none."""
    return same_norm(norm, config) and norm.bias <= config.norm.bias


def _head_names(config: ModelConfig, norm: tuple[str, ...]) -> dict[str, str]:
    head = config.head
    names = {"head_transform.dense.weight": "head.dense.weight"}
    names |= {"head_transform.dense.bias": "head.dense.bias"} if head.transform.bias else {}
    names |= {f"head_transform.norm.{leaf}": f"head.norm.{leaf}" for leaf in norm}
    if isinstance(head, Classifier):
        return names | {f"head.{leaf}": f"classifier.{leaf}" for leaf in ("weight", "bias")}
    names |= {} if head.tied else {"head.weight": "decoder.weight"}
    return names | ({("head_bias" if head.tied else "head") + ".bias": "decoder.bias"} if head.bias else {})


def _layer_types(values: Mapping[str, Any]) -> list[str]:
    """Which layers are local: listed, or, in older files, all but every n-th."""
    count, every = integer(values, "num_hidden_layers"), integer(values, "global_attn_every_n_layers", 3)
    types = values.get("layer_types")
    if types is None:
        return [LOCAL if number % every else GLOBAL for number in range(count)]
    if not isinstance(types, list) or len(types) != count or not set(types) <= {GLOBAL, LOCAL}:
        raise UserError(f"layer_types must be {count} of {GLOBAL} and {LOCAL}, got {types!r}")
    return types


def _read_rope(values: Mapping[str, Any], kind: str, context: int) -> Rope:
    """The RoPE of the global or the local layers."""
    key, base = BASES[kind]
    given = values.get("rope_parameters") or {}
    if not isinstance(given, dict) or not given.keys() <= {GLOBAL, LOCAL}:
        raise UserError(f"rope_parameters must be those of {GLOBAL} and of {LOCAL}, got {given!r}")
    own = (given.get(kind) or {}) | (values.get("rope_scaling") or {})
    return read_rope({"rope_parameters": {"rope_theta": number(values, key, base)} | own}, context)


def _without_windows(config: ModelConfig) -> ModelConfig:
    """The same with global attention in every layer, to see whether the layers differ in more than that."""

    def wide(attention: Any) -> Any:
        if not isinstance(attention, Window):
            return attention
        fields = {name: value for name, value in attention.__dict__.items() if name in Full.__dataclass_fields__}
        return Full(**fields | {"position": None})

    return replace(config, layers=tuple(replace(layer, attention=wide(layer.attention)) for layer in config.layers))


def _biased(config: ModelConfig, part: str) -> bool:
    """The file has the biases of all linear layers of a sub-layer or of none."""
    return any(getattr(layer, part).bias or getattr(layer, part).out_bias for layer in config.layers)

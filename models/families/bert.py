"""The BERT file format (arXiv 1810.04805): `BertForMaskedLM`, `BertForSequenceClassification` and the bare `BertModel`.

Of `BertForPreTraining` the next-sentence head is left out. The pooler is the transform of a classifier's head.
"""

from collections.abc import Mapping
from typing import Any

from models.attention.full import Full
from models.config import LayerConfig, ModelConfig
from models.errors import UserError
from models.families.gpt2 import paired, require_square
from models.families.labels import class_labels, count_classes
from models.families.llama import read_activation, write_activation
from models.families.protocol import Family
from models.families.uniform import common, flag, frame, integer, number, one_position, refuse, word
from models.feedforward import Mlp
from models.heads.classifier import Classifier
from models.heads.language_model import Tied, Untied
from models.heads.transform import HeadTransform
from models.inputs.tokens import Segments, Tokens
from models.norms import Layer
from models.positions import Learned

BARE, MASKED, CLASSES = "BertModel", "BertForMaskedLM", "BertForSequenceClassification"
READ = {MASKED: MASKED, "BertForPreTraining": MASKED, CLASSES: CLASSES, BARE: BARE}
EMBEDDINGS = {  # ours -> theirs
    "embedding.weight": "word_embeddings.weight",
    "positions.0.table.weight": "position_embeddings.weight",
    "segments.weight": "token_type_embeddings.weight",
    "embedding_norm.weight": "LayerNorm.weight",
    "embedding_norm.bias": "LayerNorm.bias",
}
LAYER = {  # ours -> theirs, each with a weight and a bias
    **{
        f"attention.{letter}": f"attention.self.{name}"
        for letter, name in (("q", "query"), ("k", "key"), ("v", "value"))
    },
    "attention.o": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "feedforward.up": "intermediate.dense",
    "feedforward.down": "output.dense",
    "feedforward_norm": "output.LayerNorm",
}
TRANSFORM = {"dense": "dense", "norm": "LayerNorm"}


class Bert(Family):
    """BERT files."""

    model_type = "bert"
    head = old_head = "cls.predictions.decoder.weight"
    buffers = ("position_ids",)
    old_leaves = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))
    unused = (
        "bert.pooler.",
        "pooler.",
        "cls.seq_relationship.",
        "cls.predictions.bias",
        "cls.predictions.decoder.bias",
    )
    copies = (("cls.predictions.decoder.bias", "cls.predictions.bias"),)
    segmented = True

    def read_config(self, values: Mapping[str, Any]) -> ModelConfig:
        refuse(values, {"is_decoder": False, "add_cross_attention": False})
        if (position := word(values, "position_embedding_type", "absolute")) != "absolute":
            raise UserError(f"position_embedding_type {position!r} is not supported")
        dropout = number(values, "hidden_dropout_prob", 0.1)
        attention_dropout = number(values, "attention_probs_dropout_prob", 0.1)
        attention = Full(
            heads=integer(values, "num_attention_heads"), bias=True, out_bias=True, dropout=attention_dropout
        )
        activation, eps = read_activation(values, default="gelu"), number(values, "layer_norm_eps", 1e-12)
        segments = Segments(integer(values, "type_vocab_size", 2), values.get("sep_token_id"))
        architecture = read_architecture(values, READ)
        head = Tied()
        if architecture == CLASSES:
            pooler = HeadTransform("tanh", dropout=number(values, "classifier_dropout", dropout))
            head = Classifier(count_classes(values), "first", pooler)
        elif architecture == MASKED:
            kind = Tied if flag(values, "tie_word_embeddings", True) else Untied
            head = kind(bias=True, transform=HeadTransform(activation, norm=Layer(eps)))
        layer = LayerConfig(attention, Mlp(width=integer(values, "intermediate_size"), activation=activation))
        return ModelConfig(
            vocab_size=integer(values, "vocab_size"),
            width=integer(values, "hidden_size"),
            layers=(layer,) * integer(values, "num_hidden_layers"),
            context=integer(values, "max_position_embeddings", 512),
            norm=Layer(eps, "post"),
            position=Learned(),
            input=Tokens(Layer(eps), segments),
            head=head,
            dropout=dropout,
            direction="bidirectional",
        )

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        frame(config, Layer, "post", "bidirectional")
        attention, feedforward = common(config, (Full,), Mlp)
        one_position(config, attention, Learned)
        require_square(config, attention)
        if config.input.segments is None or not same_norm(config.input.norm, config):
            raise UserError("its input is {kind: tokens, norm: layer, segments: {...}}, with the eps of the layers")
        values = {
            "architectures": [_architecture(config, feedforward["activation"])],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.width,
            "num_hidden_layers": len(config.layers),
            "num_attention_heads": attention["heads"],
            "intermediate_size": feedforward["width"],
            "hidden_act": write_activation(feedforward["activation"]),
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": attention["dropout"],
            "max_position_embeddings": config.context,
            "type_vocab_size": config.input.segments.count,
            "layer_norm_eps": config.norm.eps,
            "tie_word_embeddings": not isinstance(config.head, Untied),
        }
        if isinstance(config.head, Classifier):
            values |= class_labels(range(config.outputs)) | {"classifier_dropout": config.head.transform.dropout}
        return values

    def names(self, config: ModelConfig) -> dict[str, str]:
        bare = _architecture(config, None) == BARE
        body = "" if bare else "bert."
        names = {ours: f"{body}embeddings.{theirs}" for ours, theirs in EMBEDDINGS.items()}
        for i in range(len(config.layers)):
            names |= paired(LAYER, f"blocks.{i}", f"{body}encoder.layer.{i}")
        if isinstance(config.head, Classifier):
            names |= paired({"head_transform.dense": "bert.pooler.dense", "head": "classifier"}, "", "")
        elif not bare:
            names |= paired(TRANSFORM, "head_transform", "cls.predictions.transform")
            tied = {"head_bias.bias": "cls.predictions.bias"}
            untied = {f"head.{leaf}": f"cls.predictions.decoder.{leaf}" for leaf in ("weight", "bias")}
            names |= tied if config.head.tied else untied
        return names


def read_architecture(values: Mapping[str, Any], known: Mapping[str, str]) -> str:
    """The class of `transformers` that a config names, as one of those we know; by default the first."""
    named = values.get("architectures") or [next(iter(known))]
    if not isinstance(named, list) or named[0] not in known:
        raise UserError(f"architectures {named!r} is not supported (one of: {', '.join(known)})")
    return known[named[0]]


def same_norm(norm: Any, config: ModelConfig) -> bool:
    """Whether a norm outside of the layers is as those of the layers."""
    return isinstance(norm, Layer) and norm.eps == config.norm.eps


def _architecture(config: ModelConfig, activation: str | None) -> str:
    """The class that can hold the head, whose transform has this activation. Raises UserError where there is none."""
    head, transform = config.head, config.head.transform
    if isinstance(head, Classifier):
        if head.pool != "first" or transform is None or transform.activation != "tanh" or transform.norm is not None:
            raise UserError("its classifier is {kind: classifier, pool: first, transform: {activation: tanh}}")
        return CLASSES
    if head == Tied():
        return BARE
    fits = transform is not None and same_norm(transform.norm, config) and not transform.dropout and head.bias
    if not fits or transform.activation != (activation or transform.activation):
        raise UserError(
            "its head has a bias and the transform {activation: that of the layers, norm: layer}, or is tied without "
            "both"
        )
    return MASKED

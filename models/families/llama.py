"""The Llama file format (`LlamaForCausalLM`), and Mistral's, which is the same without biases; others build on them.

The two differ in one rule: `transformers` refuses a Llama whose hidden size is not a multiple of its heads, as
structured pruning makes it. Such a model is written as a Mistral without a sliding window, which computes the same.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from models.attention.full import Full
from models.attention.window import Window
from models.config import LayerConfig, ModelConfig
from models.errors import UserError
from models.families.protocol import Family
from models.families.uniform import common, flag, frame, integer, number, one_position, word
from models.feedforward import Swiglu
from models.norms import Rms
from models.positions import Rope
from models.positions.rope import LinearScaling, Llama3Scaling, YarnScaling

ACTIVATIONS = {
    **{"silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu"},
    **{"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh"},
}
# what a key stands at that a file leaves out; null says otherwise: no window, as many key/value heads as heads
DEFAULTS = {
    "llama": {"max_position_embeddings": 2048, "sliding_window": None},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "phi3": {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    "gemma": {"max_position_embeddings": 8192, "head_dim": 256, "num_key_value_heads": 16, "tie_word_embeddings": True},
}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "gemma": "GemmaForCausalLM",
}
BIASES = {"llama": ("attention_bias", "mlp_bias"), "gemma": ("attention_bias",)}  # that the files may have
WINDOWED = ("mistral", "phi3")


@dataclass(frozen=True)
class Llama(Family):
    """Llama or Mistral files, or those that say little more.

    Args:
        model_type: `llama`, `mistral`, or that of a subclass.
    """

    model_type: str

    def read_config(self, values: Mapping[str, Any]) -> ModelConfig:
        values = DEFAULTS[self.model_type] | dict(values)
        context = integer(values, "max_position_embeddings")
        window = integer(values, "sliding_window", context) if self.model_type in WINDOWED else context
        width, heads = integer(values, "hidden_size"), integer(values, "num_attention_heads")
        attention_bias, mlp_bias = (
            key in BIASES.get(self.model_type, ()) and flag(values, key) for key in ("attention_bias", "mlp_bias")
        )
        kind = partial(Window, window=window) if window < context else Full
        attention = kind(
            heads=heads,
            kv_heads=integer(values, "num_key_value_heads", heads),
            head_width=integer(values, "head_dim", width // heads),
            bias=attention_bias,
            out_bias=attention_bias,
            dropout=number(values, "attention_dropout", 0.0),
        )
        feedforward = Swiglu(
            width=integer(values, "intermediate_size"),
            activation=read_activation(values),
            bias=mlp_bias,
            out_bias=mlp_bias,
        )
        return ModelConfig(
            vocab_size=integer(values, "vocab_size"),
            width=width,
            layers=(LayerConfig(attention, feedforward),) * integer(values, "num_hidden_layers"),
            context=context,
            norm=Rms(eps=number(values, "rms_norm_eps", 1e-6)),
            position=read_rope(values, context, self.model_type == "phi3"),
            head="tied" if flag(values, "tie_word_embeddings") else "untied",
        )

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        frame(config, Rms)
        attention, feedforward = common(config, (Full, Window), Swiglu)
        if extras := config.layers[0].attention.extras():
            raise UserError(f"its attention has no {extras[0]}")
        if "window" in attention and self.model_type not in WINDOWED:
            raise UserError("its attention has no window")
        one_position(config, attention)
        biases = self._biases(config)
        allowed = BIASES.get(self.model_type, ())
        if alien := [key for key in biases if biases[key] and key not in allowed]:
            raise UserError(f"it has no {' or '.join(alien)}, and this model has")
        if self.model_type == "llama" and config.width % attention["heads"]:
            raise UserError(
                f"transformers wants a width that is a multiple of the heads, not {config.width} of "
                f"{attention['heads']} heads"
            )
        values = {
            "architectures": [ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.width,
            "intermediate_size": feedforward["width"],
            "num_hidden_layers": len(config.layers),
            "num_attention_heads": attention["heads"],
            "num_key_value_heads": attention["kv_heads"],
            "head_dim": attention["head_width"],
            "hidden_act": write_activation(feedforward["activation"]),
            "max_position_embeddings": config.context,
            "rms_norm_eps": config.norm.eps,
            "attention_dropout": attention["dropout"],
            "tie_word_embeddings": config.head.tied,
            **write_rope(config.position, self.model_type == "phi3"),
            **{key: biases[key] for key in allowed},
        }
        return values | ({"sliding_window": attention.get("window")} if self.model_type in WINDOWED else {})

    @staticmethod
    def _biases(config: ModelConfig) -> dict[str, bool]:
        """A Llama has all four biases of an attention or none, and likewise for the feed-forward."""
        return {
            "attention_bias": any(layer.attention.bias or layer.attention.out_bias for layer in config.layers),
            "mlp_bias": any(layer.feedforward.bias or layer.feedforward.out_bias for layer in config.layers),
        }

    def names(self, config: ModelConfig) -> dict[str, str]:
        biases = self._biases(config)
        names = {"embedding.weight": "model.embed_tokens.weight"}
        for i in range(len(config.layers)):
            ours, theirs = f"blocks.{i}", f"model.layers.{i}"
            names[f"{ours}.attention_norm.weight"] = f"{theirs}.input_layernorm.weight"
            for letter in "qkvo":
                for leaf in ("weight", "bias") if biases["attention_bias"] else ("weight",):
                    names[f"{ours}.attention.{letter}.{leaf}"] = f"{theirs}.self_attn.{letter}_proj.{leaf}"
            names[f"{ours}.feedforward_norm.weight"] = f"{theirs}.post_attention_layernorm.weight"
            for part in ("gate", "up", "down"):
                for leaf in ("weight", "bias") if biases["mlp_bias"] else ("weight",):
                    names[f"{ours}.feedforward.{part}.{leaf}"] = f"{theirs}.mlp.{part}_proj.{leaf}"
        names["norm.weight"] = "model.norm.weight"
        if not config.head.tied:
            names["head.weight"] = "lm_head.weight"
        return names


def read_activation(values: Mapping[str, Any], key: str = "hidden_act", default: str = "silu") -> str:
    """The activation at `key`, by our name."""
    activation = word(values, key, default)
    if activation not in ACTIVATIONS:
        raise UserError(f"{key} {activation!r} is not supported (one of: {', '.join(ACTIVATIONS)})")
    return ACTIVATIONS[activation]


def write_activation(activation: str) -> str:
    """The name that the file has for it."""
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == activation)


def read_rope(values: Mapping[str, Any], context: int, partial: bool = False) -> Rope:
    """RoPE from `rope_parameters` (transformers 5), or from `rope_theta` and `rope_scaling` (before it).

    `partial`: whether the family may rotate a share of a head's channels.
    """
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise UserError(f"rope_parameters must be keys and values, got {rope!r}")
    base = number({"rope_theta": values.get("rope_theta", 10000.0)} | rope, "rope_theta")
    share = number(rope, "partial_rotary_factor", number(values, "partial_rotary_factor", 1.0))
    own = integer(rope, "original_max_position_embeddings", context)
    original = integer(values, "original_max_position_embeddings", own)
    if share != 1.0 and not partial:
        raise UserError(f"partial_rotary_factor {share} is not part of the Llama format")
    return Rope(base=base, fraction=share, scaling=_read_scaling(rope, original))


def _read_scaling(rope: Mapping[str, Any], original: int) -> Any:
    kind = word(rope, "rope_type", word(rope, "type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(number(rope, "factor"))
    if kind == "llama3":
        return Llama3Scaling(
            factor=number(rope, "factor"),
            low_frequency_factor=number(rope, "low_freq_factor"),
            high_frequency_factor=number(rope, "high_freq_factor"),
            original_context=original,
        )
    if kind == "yarn":
        return _read_yarn(rope, original)
    raise UserError(f"rope_type {kind!r} is not supported (one of: default, linear, llama3, yarn)")


def _read_yarn(rope: Mapping[str, Any], original: int) -> YarnScaling:
    """YaRN as the paper has it; what others changed about it is refused."""
    for key, papers in (("mscale", None), ("mscale_all_dim", None), ("truncate", True)):
        if rope.get(key, papers) is not papers:
            raise UserError(f"rope_parameters: {key} {rope[key]!r} of yarn is not supported")
    scaling = YarnScaling(
        factor=number(rope, "factor"),
        original_context=original,
        beta_fast=number(rope, "beta_fast", 32.0),
        beta_slow=number(rope, "beta_slow", 1.0),
    )
    amplitude = number(rope, "attention_factor", scaling.amplitude)
    if abs(amplitude - scaling.amplitude) > 1e-6:
        raise UserError(f"rope_parameters: attention_factor {amplitude} is not yarn's own, {scaling.amplitude:.6g}")
    return scaling


def write_rope(rope: Rope, partial: bool = False) -> dict[str, Any]:
    """RoPE as transformers 5 reads it, and beside it as version 4 does, which would silently take a base of 10000.

    `partial`: whether the family may rotate a share of a head's channels.
    """
    if rope.layout != "half":
        raise UserError(f"its RoPE pairs the halves of a head, not {rope.layout} channels")
    if rope.fraction != 1.0 and not partial:
        raise UserError(f"it rotates all channels of a head, not a fraction of {rope.fraction}")
    scaling: dict[str, Any] = {"rope_type": "default"}
    if isinstance(rope.scaling, LinearScaling):
        scaling = {"rope_type": "linear", "factor": rope.scaling.factor}
    elif isinstance(rope.scaling, Llama3Scaling):
        scaling = {
            "rope_type": "llama3",
            "factor": rope.scaling.factor,
            "low_freq_factor": rope.scaling.low_frequency_factor,
            "high_freq_factor": rope.scaling.high_frequency_factor,
            "original_max_position_embeddings": rope.scaling.original_context,
        }
    elif isinstance(rope.scaling, YarnScaling):
        scaling = {
            "rope_type": "yarn",
            "factor": rope.scaling.factor,
            "original_max_position_embeddings": rope.scaling.original_context,
            "beta_fast": rope.scaling.beta_fast,
            "beta_slow": rope.scaling.beta_slow,
        }
    elif rope.scaling is not None:
        raise UserError(f"it has no RoPE scaling {rope.scaling.kind!r}")
    share = {"partial_rotary_factor": rope.fraction} if partial else {}
    return share | {
        "rope_parameters": scaling | share | {"rope_theta": rope.base},
        "rope_theta": rope.base,
        "rope_scaling": None if rope.scaling is None else scaling,
    }

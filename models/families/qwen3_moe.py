"""The Qwen3-MoE file format (`Qwen3MoeForCausalLM`): normalised queries and keys, and experts in some of the layers.

Layer i has experts where i + 1 is a multiple of `decoder_sparse_step` and `mlp_only_layers` does not name it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.attention.full import Full
from models.attention.window import Window
from models.config import LayerConfig, ModelConfig
from models.errors import UserError
from models.experts import Experts
from models.families import moe
from models.families.llama import write_activation
from models.families.protocol import Family
from models.families.uniform import common, flag, integer
from models.feedforward import Swiglu

MAPS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
# what a key stands at that a file leaves out
DEFAULTS = {"num_key_value_heads": 4, "num_experts_per_tok": 8, "rms_norm_eps": 1e-6, "sliding_window": 4096}


class Qwen3Moe(Family):
    """Qwen3-MoE files."""

    model_type = "qwen3_moe"

    def read_config(self, values: Mapping[str, Any]) -> ModelConfig:
        values = DEFAULTS | dict(values)
        context = integer(values, "max_position_embeddings", 32768)
        window = integer(values, "sliding_window", context) if flag(values, "use_sliding_window") else context
        attention = moe.read_attention(
            values, window if window < context else None, bias=flag(values, "attention_bias"), normalised=True
        )
        count = integer(values, "num_local_experts", integer(values, "num_experts", 128))
        weights = "renormalised" if flag(values, "norm_topk_prob") else "probability"
        experts = moe.read_experts(values, count, "moe_intermediate_size", weights)
        depth = integer(values, "num_hidden_layers")
        dense = values.get("mlp_only_layers")
        mixed = _mixed(depth, integer(values, "decoder_sparse_step", 1), [] if dense is None else dense)
        mlp = moe.read_swiglu(values, "intermediate_size") if len(mixed) < depth else None
        layers = tuple(LayerConfig(attention, experts if i in mixed else mlp) for i in range(depth))
        return moe.read_model(values, context, layers)

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        config = moe.without_layout(config)
        mixtures = _require_kinds(config)
        attention = _attention(config)
        normalised = config.layers[0].attention
        if normalised.qk_norm is None:
            raise UserError("its attention has a qk_norm, and this model's has none")
        if normalised.qk_norm.eps != config.norm.eps:
            raise UserError(f"all norms have one eps: {config.norm.eps}, and qk_norm's is {normalised.qk_norm.eps}")
        moe.require_extras(normalised, ("qk_norm",))
        spec = config.layers[mixtures[0]].feedforward
        moe.require_plain(spec, ("renormalised", "probability"), jitter=False)
        mlps = [layer.feedforward for layer in config.layers if isinstance(layer.feedforward, Swiglu)]
        if any(mlp.activation != spec.expert.activation or mlp.bias or mlp.out_bias for mlp in mlps):
            raise UserError(f"its dense layers have no biases and the experts' activation, {spec.expert.activation}")
        window = attention.get("window")
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": self.model_type,
            **moe.write_model(config, attention),
            "attention_bias": _biased(config),
            "hidden_act": write_activation(spec.expert.activation),
            "intermediate_size": mlps[0].width if mlps else spec.expert.width * spec.top_k,
            "moe_intermediate_size": spec.expert.width,
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "num_experts": spec.count,
            "num_local_experts": spec.count,  # what transformers 5 calls it
            "num_experts_per_tok": spec.top_k,
            "norm_topk_prob": spec.router.weights == "renormalised",
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i in range(len(config.layers)) if i not in mixtures],
            "router_aux_loss_coef": moe.coefficient(spec),
        }

    def names(self, config: ModelConfig) -> dict[str, str]:
        def parts(_: int, layer: LayerConfig) -> dict[str, str]:
            if isinstance(layer.feedforward, Swiglu):
                return {ours: f"mlp.{theirs}" for ours, theirs in MAPS.items()}
            return moe.expert_names(layer.feedforward, "mlp", MAPS)

        return moe.names(config, parts, bias=_biased(config), normalised=True)


def _mixed(depth: int, step: int, dense: Any) -> list[int]:
    """The layers that have experts; `dense` is `mlp_only_layers`."""
    if not isinstance(dense, list) or not all(type(i) is int and 0 <= i < depth for i in dense):
        raise UserError(f"mlp_only_layers must be a list of layers from 0 to {depth - 1}, got {dense!r}")
    found = [i for i in range(depth) if (i + 1) % step == 0 and i not in dense]
    if not found:
        raise UserError(f"decoder_sparse_step {step} and mlp_only_layers leave none of {depth} layers with experts")
    return found


def _require_kinds(config: ModelConfig) -> list[int]:
    """The layers with experts; refuses layers of another kind, and any two of a kind that differ."""
    found: dict[type, list[int]] = {Experts: [], Swiglu: []}
    for i, layer in enumerate(config.layers):
        if type(layer.feedforward) not in found:
            has = "none" if layer.feedforward is None else layer.feedforward.kind
            raise UserError(f"every layer has experts or a swiglu feedforward, and layer {i} has {has}")
        alike = found[type(layer.feedforward)]
        if alike and layer.feedforward != config.layers[alike[0]].feedforward:
            kind = layer.feedforward.kind
            raise UserError(f"all {kind} layers have the same numbers, and layers {alike[0]} and {i} differ")
        alike.append(i)
    if not found[Experts]:
        raise UserError("it has experts, and this model has none")
    return found[Experts]


def _attention(config: ModelConfig) -> dict[str, Any]:
    """The numbers of the attention that all layers share."""
    alike = tuple(replace(layer, feedforward=Swiglu(width=1)) for layer in config.layers)
    return common(replace(config, layers=alike), (Full, Window), Swiglu)[0]


def _biased(config: ModelConfig) -> bool:
    """The file has all four biases of an attention or none."""
    return any(layer.attention.bias or layer.attention.out_bias for layer in config.layers)

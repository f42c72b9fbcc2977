"""The Mixtral file format (`MixtralForCausalLM`): a Mistral whose feed-forwards are experts (arXiv 2401.04088).

The router's jitter stands for the noise of its own input; `transformers` lets the experts see it too, in training.
"""

from collections.abc import Mapping
from typing import Any

from models.attention.full import Full
from models.attention.window import Window
from models.config import LayerConfig, ModelConfig
from models.errors import UserError
from models.experts import Experts
from models.families import moe
from models.families.llama import write_activation
from models.families.protocol import Family
from models.families.uniform import common, integer, number

# what a key stands at that a file leaves out
DEFAULTS = {"num_key_value_heads": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
MAPS = {"gate": "w1", "up": "w3", "down": "w2"}


class Mixtral(Family):
    """Mixtral files."""

    model_type = "mixtral"

    def read_config(self, values: Mapping[str, Any]) -> ModelConfig:
        values = DEFAULTS | dict(values)
        context = integer(values, "max_position_embeddings", 131072)
        window = integer(values, "sliding_window", context)
        attention = moe.read_attention(values, window if window < context else None, bias=False, normalised=False)
        experts = moe.read_experts(
            values,
            integer(values, "num_local_experts", 8),
            "intermediate_size",
            "renormalised",
            number(values, "router_jitter_noise", 0.0),
        )
        layers = (LayerConfig(attention, experts),) * integer(values, "num_hidden_layers")
        return moe.read_model(values, context, layers)

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        config = moe.without_layout(config)
        attention, mixture = common(config, (Full, Window), Experts)
        spec = config.layers[0].feedforward
        moe.require_extras(config.layers[0].attention)
        if attention["bias"] or attention["out_bias"]:
            raise UserError("its attention has no biases")
        moe.require_plain(spec, ("renormalised",), jitter=True)
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": self.model_type,
            **moe.write_model(config, attention),
            "hidden_act": write_activation(spec.expert.activation),
            "intermediate_size": spec.expert.width,
            "sliding_window": attention.get("window"),
            "num_local_experts": mixture["count"],
            "num_experts_per_tok": mixture["top_k"],
            "router_aux_loss_coef": moe.coefficient(spec),
            "router_jitter_noise": spec.router.jitter,
        }

    def names(self, config: ModelConfig) -> dict[str, str]:
        def parts(_: int, layer: LayerConfig) -> dict[str, str]:
            return moe.expert_names(layer.feedforward, "block_sparse_moe", MAPS)

        return moe.names(config, parts, bias=False, normalised=False)

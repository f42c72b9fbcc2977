"""The GPT-NeoX file format (`GPTNeoXForCausalLM`), of Pythia too: fused queries, keys and values, head by head, and
layers whose two branches read the same stream (arXiv 2204.06745)."""

from collections.abc import Mapping
from typing import Any

from models.attention.full import Full
from models.config import LayerConfig, ModelConfig
from models.families.gpt2 import paired, require_square
from models.families.llama import read_activation, read_rope, write_activation, write_rope
from models.families.protocol import ROWS, Family, PerHead, Transform
from models.families.uniform import common, flag, frame, integer, number, one_position
from models.feedforward import Mlp
from models.norms import Layer

LAYER = {  # ours -> theirs, each with a weight and a bias
    "attention_norm": "input_layernorm",
    "feedforward_norm": "post_attention_layernorm",
    **{f"attention.{letter}": "attention.query_key_value" for letter in "qkv"},
    "attention.o": "attention.dense",
    "feedforward.up": "mlp.dense_h_to_4h",
    "feedforward.down": "mlp.dense_4h_to_h",
}
ATTENTION = ("attention.q", "attention.k", "attention.v", "attention.o")


class GptNeoX(Family):
    """GPT-NeoX files."""

    model_type = "gpt_neox"
    old_head = "embed_out.weight"
    buffers = ("rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")

    def read_config(self, values: Mapping[str, Any]) -> ModelConfig:
        context = integer(values, "max_position_embeddings", 2048)
        bias = flag(values, "attention_bias", True)
        attention = Full(
            heads=integer(values, "num_attention_heads"),
            bias=bias,
            out_bias=bias,
            dropout=number(values, "attention_dropout", 0.0),
        )
        mlp = Mlp(width=integer(values, "intermediate_size"), activation=read_activation(values, default="gelu"))
        rope = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}  # what the files call it
        rope = {"rope_theta": 10000.0, "partial_rotary_factor": 0.25} | {
            key: values[name] for key, name in rope.items() if name in values
        }
        order = "parallel" if flag(values, "use_parallel_residual", True) else "attention_first"
        return ModelConfig(
            vocab_size=integer(values, "vocab_size"),
            width=integer(values, "hidden_size"),
            layers=(LayerConfig(attention, mlp, order),) * integer(values, "num_hidden_layers"),
            context=context,
            norm=Layer(eps=number(values, "layer_norm_eps", 1e-5)),
            position=read_rope(dict(values) | rope, context, partial=True),
            head="tied" if flag(values, "tie_word_embeddings") else "untied",
            dropout=number(values, "hidden_dropout", 0.0),
        )

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        frame(config, Layer)
        order = "parallel" if config.layers[0].order == "parallel" else "attention_first"
        attention, feedforward = common(config, (Full,), Mlp, order)
        one_position(config, attention)
        require_square(config, attention)
        rope = write_rope(config.position, partial=True)
        return {
            "architectures": ["GPTNeoXForCausalLM"],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.width,
            "intermediate_size": feedforward["width"],
            "num_hidden_layers": len(config.layers),
            "num_attention_heads": attention["heads"],
            "hidden_act": write_activation(feedforward["activation"]),
            "max_position_embeddings": config.context,
            "layer_norm_eps": config.norm.eps,
            "attention_bias": _biased(config),
            "attention_dropout": attention["dropout"],
            "hidden_dropout": config.dropout,
            "use_parallel_residual": order == "parallel",
            "tie_word_embeddings": config.head.tied,
            "rope_parameters": rope["rope_parameters"],
            "rope_scaling": rope["rope_scaling"],
            "rotary_emb_base": config.position.base,
            "rotary_pct": config.position.fraction,
        }

    def names(self, config: ModelConfig) -> dict[str, str]:
        without = () if _biased(config) else ATTENTION
        names = {"embedding.weight": "gpt_neox.embed_in.weight"}
        for i in range(len(config.layers)):
            names |= paired(LAYER, f"blocks.{i}", f"gpt_neox.layers.{i}", without)
        names |= {f"norm.{leaf}": f"gpt_neox.final_layer_norm.{leaf}" for leaf in ("weight", "bias")}
        return names | ({"head.weight": self.head} if not config.head.tied else {})

    def transform(self, name: str, config: ModelConfig) -> Transform:
        return PerHead(config.layers[0].attention.heads) if ".query_key_value." in name else ROWS


def _biased(config: ModelConfig) -> bool:
    """The file has the biases of all maps of the attention or of none."""
    return any(layer.attention.bias or layer.attention.out_bias for layer in config.layers)

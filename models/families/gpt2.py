"""The GPT-2 file format (`GPT2LMHeadModel`): learned positions, and matrices stored as (inputs, outputs)."""

from collections.abc import Mapping
from typing import Any

from models.attention.full import Full
from models.config import LayerConfig, ModelConfig
from models.errors import UserError
from models.families.llama import read_activation, write_activation
from models.families.protocol import ROWS, TRANSPOSED, Family, Transform
from models.families.uniform import common, flag, frame, integer, number, one_dropout, one_position, refuse
from models.feedforward import Mlp
from models.norms import Layer
from models.positions import Learned

LAYER = {  # ours -> theirs, each with a weight and a bias
    "attention_norm": "ln_1",
    **{f"attention.{letter}": "attn.c_attn" for letter in "qkv"},
    "attention.o": "attn.c_proj",
    "feedforward_norm": "ln_2",
    "feedforward.up": "mlp.c_fc",
    "feedforward.down": "mlp.c_proj",
}


class Gpt2(Family):
    """GPT-2 files."""

    model_type = "gpt2"
    buffers = (".attn.bias", ".attn.masked_bias")

    def read_config(self, values: Mapping[str, Any]) -> ModelConfig:
        refuse(
            values,
            {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        )
        width = integer(values, "n_embd")
        dropout = number(values, "attn_pdrop", 0.1)
        attention = Full(heads=integer(values, "n_head"), bias=True, out_bias=True, dropout=dropout)
        activation = read_activation(values, "activation_function", "gelu_new")
        layer = LayerConfig(attention, Mlp(width=integer(values, "n_inner", 4 * width), activation=activation))
        return ModelConfig(
            vocab_size=integer(values, "vocab_size"),
            width=width,
            layers=(layer,) * integer(values, "n_layer"),
            context=integer(values, "n_positions", 1024),
            norm=Layer(eps=number(values, "layer_norm_epsilon", 1e-5)),
            position=Learned(),
            head="tied" if flag(values, "tie_word_embeddings", True) else "untied",
            dropout=one_dropout(values, "embd_pdrop", "resid_pdrop", 0.1),
        )

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        frame(config, Layer)
        attention, feedforward = common(config, (Full,), Mlp)
        one_position(config, attention, Learned)
        require_square(config, attention)
        activation = feedforward["activation"]
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "n_embd": config.width,
            "n_layer": len(config.layers),
            "n_head": attention["heads"],
            "n_inner": feedforward["width"],
            "n_positions": config.context,
            "activation_function": "gelu_new" if activation == "gelu_tanh" else write_activation(activation),
            "layer_norm_epsilon": config.norm.eps,
            "attn_pdrop": attention["dropout"],
            "embd_pdrop": config.dropout,
            "resid_pdrop": config.dropout,
            "tie_word_embeddings": config.head.tied,
        }

    def names(self, config: ModelConfig) -> dict[str, str]:
        names = {"embedding.weight": "transformer.wte.weight", "positions.0.table.weight": "transformer.wpe.weight"}
        for i in range(len(config.layers)):
            names |= paired(LAYER, f"blocks.{i}", f"transformer.h.{i}")
        names |= {f"norm.{leaf}": f"transformer.ln_f.{leaf}" for leaf in ("weight", "bias")}
        return names | ({"head.weight": self.head} if not config.head.tied else {})

    def transform(self, name: str, config: ModelConfig) -> Transform:
        return TRANSPOSED if ".c_" in name and name.endswith(".weight") else ROWS


def require_square(config: ModelConfig, attention: Mapping[str, Any]) -> None:
    """Refuse an attention that is not as many heads of queries as of keys and values, as wide together as the model."""
    if extras := config.layers[0].attention.extras():
        raise UserError(f"its attention has no {extras[0]}")
    if attention["kv_heads"] != attention["heads"]:
        raise UserError(f"it has as many kv_heads as heads, not {attention['kv_heads']} of {attention['heads']}")
    if (wide := attention["heads"] * attention["head_width"]) != config.width:
        raise UserError(f"its heads are together as wide as the model, {config.width} channels, not {wide}")


def paired(maps: Mapping[str, str], ours: str, theirs: str, without_bias: tuple[str, ...] = ()) -> dict[str, str]:
    """Names of the weights and biases of a layer's `maps`, our module -> theirs."""
    ours, theirs = (f"{path}." if path else "" for path in (ours, theirs))
    return {
        f"{ours}{part}.{leaf}": f"{theirs}{name}.{leaf}"
        for part, name in maps.items()
        for leaf in (("weight",) if part in without_bias else ("weight", "bias"))
    }

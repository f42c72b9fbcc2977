"""Shared parts of the Mixtral and Qwen3-MoE families: softmax routers that choose top_k experts a token.

`transformers` adds `router_aux_loss_coef` times a loss that is top_k where all experts are chosen alike, and ours is 1
there: the weight of the balance is the coefficient times top_k. It takes that loss over the tokens of all layers
together, ours layer by layer; no output depends on either. An expert's matrices are tensors of their own in the file.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from models.attention.full import Full
from models.attention.options import QkRms
from models.attention.window import Window
from models.config import LayerConfig, ModelConfig
from models.errors import UserError
from models.experts import BALANCES, ROUTERS, Experts
from models.families.llama import read_activation, read_rope, write_rope
from models.families.uniform import flag, frame, integer, number, one_position
from models.feedforward import Swiglu
from models.norms import Rms

DIGITS = 12  # significant ones of a coefficient, as a float times top_k and back may differ in the last


def read_attention(values: Mapping[str, Any], window: int | None, bias: bool, normalised: bool) -> Full | Window:
    """The attention of every layer; `window` tokens of it, or all where that is None."""
    width, heads = integer(values, "hidden_size"), integer(values, "num_attention_heads")
    return (Full if window is None else partial(Window, window=window))(
        heads=heads,
        kv_heads=integer(values, "num_key_value_heads", heads),
        head_width=integer(values, "head_dim", width // heads),
        bias=bias,
        out_bias=bias,
        dropout=number(values, "attention_dropout", 0.0),
        qk_norm=QkRms(number(values, "rms_norm_eps")) if normalised else None,
    )


def read_swiglu(values: Mapping[str, Any], key: str) -> Swiglu:
    """A dense feed-forward, or an expert, of the width at `key`."""
    return Swiglu(width=integer(values, key), activation=read_activation(values))


def read_experts(values: Mapping[str, Any], count: int, width_key: str, weights: str, jitter: float = 0.0) -> Experts:
    """The mixture of every layer that has one.

    Args:
        count: of experts.
        width_key: where the width of an expert stands.
        weights: of the chosen experts, `renormalised` to a sum of 1 or the `probability` of each.
        jitter: noise of the router's input, in training.
    """
    top_k = integer(values, "num_experts_per_tok")
    coefficient = number(values, "router_aux_loss_coef", 0.001)
    balance = (BALANCES["auxiliary"](weight=coefficient * top_k),) if coefficient else ()
    return Experts(
        count=count,
        top_k=top_k,
        expert=read_swiglu(values, width_key),
        router=ROUTERS["softmax"](weights=weights, jitter=jitter),
        balance=balance,
        layout="separate",  # as in the file
    )


def read_model(values: Mapping[str, Any], context: int, layers: tuple[LayerConfig, ...]) -> ModelConfig:
    """The decoder around these layers."""
    return ModelConfig(
        vocab_size=integer(values, "vocab_size"),
        width=integer(values, "hidden_size"),
        layers=layers,
        context=context,
        norm=Rms(eps=number(values, "rms_norm_eps")),
        position=read_rope(values, context),
        head="tied" if flag(values, "tie_word_embeddings") else "untied",
    )


def write_model(config: ModelConfig, attention: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `config.json` that are about all but the feed-forwards."""
    frame(config, Rms)
    one_position(config, attention)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": len(config.layers),
        "num_attention_heads": attention["heads"],
        "num_key_value_heads": attention["kv_heads"],
        "head_dim": attention["head_width"],
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm.eps,
        "attention_dropout": attention["dropout"],
        "tie_word_embeddings": config.head.tied,
        **write_rope(config.position),
    }


def require_extras(attention: Any, allowed: tuple[str, ...] = ()) -> None:
    """Refuse an option of the attention that the file has no place for."""
    if extras := [name for name in attention.extras() if name not in allowed]:
        raise UserError(f"its attention has no {extras[0]}")


def require_plain(spec: Experts, weights: tuple[str, ...], jitter: bool) -> None:
    """Refuse a mixture that the file cannot hold; `weights` are those that it knows, and `jitter` whether it has any.

    Where the experts lie in memory (`layout`) is no part of the file.
    """
    expert, router = spec.expert, spec.router
    if not isinstance(expert, Swiglu) or expert.bias or expert.out_bias:
        raise UserError("its experts are swiglu without biases")
    if router.kind != "softmax":
        raise UserError(f"its router is softmax, not {router.kind}")
    if router.weights not in weights:
        raise UserError(f"its router's weights are {weights[0]}, not {router.weights}")
    if router.jitter and not jitter:
        raise UserError("its router has no jitter")
    if spec.shared is not None:
        raise UserError("it has no shared expert")
    if spec.capacity is not None:
        raise UserError("its experts have no capacity: they take every token")
    for balance in spec.balance:
        if balance.kind != "auxiliary":
            raise UserError(f"its balance is auxiliary, not {balance.kind}")
        if balance.per != "batch":
            raise UserError(f"its auxiliary loss is per batch, not per {balance.per}")
        if balance.choices != "all" or balance.over != "micro_batch":
            raise UserError("its auxiliary loss counts all choices of a micro-batch")
    if len(spec.balance) > 1:
        raise UserError("it has one auxiliary loss")


def coefficient(spec: Experts) -> float:
    """`router_aux_loss_coef` of the balance."""
    return float(f"{sum(balance.weight for balance in spec.balance) / spec.top_k:.{DIGITS}g}")


def names(
    config: ModelConfig, parts: Callable[[int, LayerConfig], Mapping[str, str]], bias: bool, normalised: bool
) -> dict[str, str]:
    """Name in our state dict -> name in the file.

    Args:
        parts: (number of a layer, its config) -> the names of its feed-forward, without those of the layer.
        bias: whether the file has biases of the attention.
        normalised: whether queries and keys have norms.
    """
    found = {"embedding.weight": "model.embed_tokens.weight"}
    for i, layer in enumerate(config.layers):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        found[f"{ours}.attention_norm.weight"] = f"{theirs}.input_layernorm.weight"
        for letter in "qkvo":
            for leaf in ("weight", "bias") if bias else ("weight",):
                found[f"{ours}.attention.{letter}.{leaf}"] = f"{theirs}.self_attn.{letter}_proj.{leaf}"
        for letter in "qk" if normalised else "":
            found[f"{ours}.attention.{letter}_norm.weight"] = f"{theirs}.self_attn.{letter}_norm.weight"
        found[f"{ours}.feedforward_norm.weight"] = f"{theirs}.post_attention_layernorm.weight"
        for part, name in parts(i, layer).items():
            found[f"{ours}.feedforward.{part}.weight"] = f"{theirs}.{name}.weight"
    found["norm.weight"] = "model.norm.weight"
    if not config.head.tied:
        found["head.weight"] = "lm_head.weight"
    return found


def expert_names(spec: Experts, block: str, maps: Mapping[str, str]) -> dict[str, str]:
    """Names of a mixture that the file calls `block`, and its experts' gate, up and down `maps`."""
    found = {"router.projection": f"{block}.gate"}
    for expert in range(spec.count):
        found |= {f"experts.{expert}.{ours}": f"{block}.experts.{expert}.{theirs}" for ours, theirs in maps.items()}
    return found


def without_layout(config: ModelConfig) -> ModelConfig:
    """The config with every mixture in one layout, as layers that differ in nothing else are equal in the file."""
    layers = [
        replace(layer, feedforward=replace(layer.feedforward, layout="separate"))
        if isinstance(layer.feedforward, Experts)
        else layer
        for layer in config.layers
    ]
    return replace(config, layers=tuple(layers))

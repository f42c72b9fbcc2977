"""Architectures by name, in the short form of `models.config`."""

from typing import Any

from models.config import ModelConfig
from models.errors import UserError, did_you_mean

PRESETS: dict[str, dict[str, Any]] = {
    # 5-7 million parameters: minutes on two CPU cores
    "quickstart": {
        "vocab_size": 4096,
        "context": 256,
        "width": 256,
        "depth": 6,
        "attention": {"kind": "full", "heads": 4, "kv_heads": 2},
        "feedforward": {"kind": "swiglu", "width": 688},
    },
    # GPT-2 small (Radford et al. 2019): 124,439,808 parameters
    "gpt2-small": {
        "vocab_size": 50257,
        "context": 1024,
        "width": 768,
        "depth": 12,
        "position": "learned",
        "norm": {"kind": "layer"},
        "attention": {"kind": "full", "heads": 12, "bias": True, "out_bias": True},
        "feedforward": {"kind": "mlp", "width": 3072, "activation": "gelu_tanh"},
    },
    "llama-350m": {
        "vocab_size": 32000,
        "context": 2048,
        "width": 1024,
        "depth": 24,
        "attention": {"kind": "full", "heads": 16, "kv_heads": 8},
        "feedforward": {"kind": "swiglu", "width": 2816},
    },
    # the shape of Llama-3.2-1B with a 32k vocabulary
    "llama-1b": {
        "vocab_size": 32000,
        "context": 4096,
        "width": 2048,
        "depth": 16,
        "position": {"kind": "rope", "base": 500000.0},
        "attention": {"kind": "full", "heads": 32, "kv_heads": 8},
        "feedforward": {"kind": "swiglu", "width": 8192},
    },
}


def preset(name: str, **changes: Any) -> ModelConfig:
    """The architecture of this name, with keys of the short form replaced by `changes`."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}{did_you_mean(name, PRESETS)}")
    return ModelConfig.from_dict({**PRESETS[name], **changes})

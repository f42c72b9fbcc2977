"""The Phi-3 file format (`Phi3ForCausalLM`): a Llama with fused matrices and a share of channels rotated
(arXiv 2404.14219).

Files of LongRoPE are refused. A model that rotates all channels is written as a Llama or Mistral.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.config import ModelConfig
from models.errors import UserError
from models.families.llama import Llama
from models.families.uniform import one_dropout
from models.positions.rope import Rope

FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"}
FUSED |= {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


class Phi3(Llama):
    """Phi-3 files."""

    def read_config(self, values: Mapping[str, Any]) -> ModelConfig:
        config = super().read_config(values)
        _check(config)
        return replace(config, dropout=one_dropout(values, "embd_pdrop", "resid_pdrop", 0.0))

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        _check(config)
        values = super().write_config(config)
        return values | {"embd_pdrop": config.dropout, "resid_pdrop": config.dropout}

    def names(self, config: ModelConfig) -> dict[str, str]:
        return {ours: _fused(theirs) for ours, theirs in super().names(config).items()}


def _check(config: ModelConfig) -> None:
    position = config.position
    if isinstance(position, Rope) and position.scaling is not None:
        raise UserError(f"a phi3 file scales its RoPE in no way that is known here, and not by {position.scaling.kind}")


def _fused(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    path, _, last = module.rpartition(".")
    return f"{path}.{FUSED[last]}.{leaf}" if last in FUSED else name

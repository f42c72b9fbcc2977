"""The Gemma file format (`GemmaForCausalLM`): a Llama whose norms are stored as their difference from 1, whose
embeddings are scaled by the root of the width, and whose gate is GELU in its tanh form (arXiv 2403.08295)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.config import SQRT_WIDTH, ModelConfig
from models.errors import UserError
from models.families.llama import Llama
from models.families.uniform import refuse, word
from models.norms import Rms


class Gemma(Llama):
    """Gemma files."""

    def read_config(self, values: Mapping[str, Any]) -> ModelConfig:
        refuse(values, {"use_bidirectional_attention": False})
        activation = word(values, "hidden_act", "gelu")
        activation = "gelu_pytorch_tanh" if activation == "gelu" else activation  # what the first files meant by it
        config = super().read_config({**values, "hidden_act": activation})
        return replace(config, norm=replace(config.norm, offset=1.0), embedding_scale=SQRT_WIDTH)

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        if not isinstance(config.norm, Rms) or config.norm.offset != 1:
            raise UserError("its norms are rms with offset 1")
        if config.embedding_scale not in (SQRT_WIDTH, config.width**0.5):
            raise UserError(f"its embedding_scale is {SQRT_WIDTH}, and this model's is {config.embedding_scale}")
        plain = replace(config, norm=replace(config.norm, offset=0.0), embedding_scale=1.0)
        values = super().write_config(plain)
        if values["hidden_act"] == "gelu":
            raise UserError("its gelu is gelu_tanh")
        return values

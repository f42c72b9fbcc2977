"""The model that the benchmarks share, here and in `transformers`."""

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from models.config import ModelConfig
from models.transformer import Transformer


@dataclass(frozen=True)
class Shape:
    """A small Llama: by default 6.8M parameters."""

    layers: int = 6
    width: int = 256
    heads: int = 4
    kv_heads: int = 4
    feedforward: int = 688
    vocabulary: int = 4096
    context: int = 256
    tied: bool = False

    def core(self) -> Transformer:
        torch.manual_seed(0)
        return Transformer(
            ModelConfig.from_dict(
                {
                    "vocab_size": self.vocabulary,
                    "width": self.width,
                    "depth": self.layers,
                    "context": self.context,
                    "position": "rope",
                    "norm": {"kind": "rms", "position": "pre"},
                    "attention": {"kind": "full", "heads": self.heads, "kv_heads": self.kv_heads},
                    "feedforward": {"kind": "swiglu", "width": self.feedforward},
                    "head": "tied" if self.tied else "untied",
                }
            )
        )

    def transformers(self) -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=self.vocabulary,
                hidden_size=self.width,
                intermediate_size=self.feedforward,
                num_hidden_layers=self.layers,
                num_attention_heads=self.heads,
                num_key_value_heads=self.kv_heads,
                max_position_embeddings=self.context,
                rms_norm_eps=1e-5,
                tie_word_embeddings=self.tied,
                attn_implementation="sdpa",
                bos_token_id=None,
                eos_token_id=None,
                pad_token_id=None,
            )
        )

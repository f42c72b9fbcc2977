"""A tiny model, texts of a few documents, and a whole comparison, shared by the tests of the evaluation."""

from collections.abc import Sequence

import numpy as np
import torch

from app.evaluation.assemble import Subject, evaluate_pair
from app.evaluation.speed import SpeedProtocol
from models.config import ModelConfig
from models.transformer import Transformer

VOCABULARY = 61


def tiny(seed: int = 0, context: int = 32) -> Transformer:
    """A two-layer decoder with weights large enough that its predictions are far from uniform."""
    torch.manual_seed(seed)
    config = ModelConfig.from_dict(
        {
            "vocab_size": VOCABULARY,
            "width": 16,
            "depth": 2,
            "context": context,
            "attention": {"kind": "full", "heads": 2, "kv_heads": 1},
            "feedforward": {"kind": "swiglu", "width": 24},
        }
    )
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(12)
    return model


def shifted(model: Transformer, scale: float, seed: int = 1) -> Transformer:
    """A copy of the model with noise on its matrices."""
    copy = Transformer(model.config).eval()
    copy.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in copy.parameters():
            if parameter.ndim == 2:
                parameter.add_(scale * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return copy


class Text(Sequence):
    """Documents of random length, joined as the data module does, in blocks of `length` tokens, the last padded."""

    def __init__(self, length: int, documents: int = 24, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        parts = [np.append(0, random.integers(1, VOCABULARY, random.integers(3, 40))) for _ in range(documents)]
        self.stream = np.append(np.concatenate(parts), 0)  # (M + 1,)
        self.owner = np.repeat(np.arange(documents), [len(part) for part in parts])  # (M,)
        self.length = length
        self.bytes_per_token = 3.5
        self.fingerprint = f"text {seed}"
        self.tokens = len(self.owner)

    def __len__(self) -> int:
        return -(-len(self.owner) // self.length)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        places = np.arange(index * self.length, (index + 1) * self.length)
        inside = np.minimum(places, len(self.owner) - 1)
        real = places < len(self.owner)
        return {
            "tokens": torch.from_numpy(np.where(real, self.stream[inside], 0)).long(),
            "targets": torch.from_numpy(np.where(real, self.stream[inside + 1], -100)).long(),
            "documents": torch.from_numpy(np.where(real, self.owner[inside], -1)).int(),
        }


QUICK = SpeedProtocol(prompt_tokens=6, new_tokens=4, rounds=6, warmup=1)


def comparison(scale: float = 0.3) -> dict:
    """The figures of a tiny model and a disturbed copy, without anything stored."""
    before = tiny()
    after = shifted(before, scale)
    return evaluate_pair(Subject(before, "before"), Subject(after, "after"), Text(16), speed=QUICK)

"""Decoding with early exits: each step runs as many layers as it takes to be sure of the token.

A token is emitted at the first exit whose likeliest token is likely enough (CALM, arXiv 2207.07061). Tokens behind it
still have to see it in the deeper layers: its hidden state waits there, and goes through them in one chunk together
with the first later token that gets so deep (FREE, arXiv 2310.05424, synchronized parallel decoding). So the keys and
values of every layer are those of the whole model; none is approximated or copied.

B prompts, T new tokens, P new and waiting ones, S tokens so far, D model width, V vocabulary.
"""

import torch
from torch import Tensor

from models.cache import ModelCache
from models.errors import UserError
from models.transformer import Transformer


def check_confidence(model: Transformer, confidence: float) -> None:
    """Raise UserError where a model cannot be left early, or never or always would be by mistake."""
    if model.config.exits is None:
        raise UserError(
            "exit_confidence is for a model with early exits, and this one has none: "
            "train it with architecture.exits, e.g. {layers: [2, 4]}"
        )
    if not confidence > 0:
        raise UserError(f"exit_confidence must be above 0 (it is a probability; above 1 never exits), got {confidence}")


class EarlyExit:
    """Decodes with a model and its cache, running of every step only as many layers as it takes to be sure.

    Attributes:
        layers_used: after how many layers each step was emitted, so far.
    """

    def __init__(self, model: Transformer, cache: ModelCache, confidence: float) -> None:
        check_confidence(model, confidence)
        self.model, self.cache, self.confidence = model, cache, confidence
        self.ends = (*model.config.exits.layers, len(model.blocks))
        self.positions: Tensor | None = None  # (B or 1, S)
        self.waiting: list[list[Tensor]] = [[] for _ in self.ends]  # (B, T, D) each, before every segment of layers
        self.layers_used: list[int] = []

    def step(self, tokens: Tensor, documents: Tensor | None = None, going: Tensor | None = None) -> Tensor:
        """Feed the next tokens (B, T), and return the logits (B, V) after the last of them from where they left.

        Args:
            tokens: int64.
            documents: (B, T) as for `Transformer.embed`.
            going: (B,) bool, the prompts that have to be sure; by default all.
        """
        model, cache = self.model, self.cache
        positions = model.default_positions(tokens, documents, cache)  # (B or 1, T)
        x, context = model.embed(tokens, documents=documents, positions=positions, cache=cache)
        if self.positions is not None:
            shape = (max(len(positions), len(self.positions)), -1)
            positions = torch.cat([self.positions.expand(shape), positions.expand(shape)], dim=1)
        self.positions = positions  # (B or 1, S)
        begin = 0
        for number, end in enumerate(self.ends):
            if self.waiting[number]:
                x = torch.cat([*self.waiting[number], x], dim=1)  # (B, P, D)
                self.waiting[number] = []
                past = cache.length - x.shape[1]
                context = model.context(x, self.positions[:, past:], cache.documents(), past, cached=True)
            x = model.run(x, context, cache=cache, blocks=slice(begin, end)).x  # (B, P, D)
            if end == len(model.blocks):
                break
            logits = model.project(model.transform(model.exits(number, x[:, -1])))  # (B, V)
            if self._sure(logits, going):
                self.waiting[number + 1].append(x)
                self.layers_used.append(end)
                return logits
            begin = end
        self.layers_used.append(end)
        return model.project(model.read(x[:, -1]))

    def _sure(self, logits: Tensor, going: Tensor | None) -> bool:
        sure = logits.float().softmax(-1).amax(-1) >= self.confidence  # (B,)
        return bool((sure if going is None else sure | ~going).all())

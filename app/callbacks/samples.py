"""Samples during training, as text in TensorBoard."""

import sys
import warnings
from collections.abc import Iterable
from contextlib import nullcontext

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from app.callbacks.metrics import log_text
from app.strategies import FSDP2
from models.errors import UserError


class Samples(Callback):
    """Writes what the task makes of a few prompts after each validation: a continuation, or hidden tokens filled in.

    Args:
        prompts: texts to continue or to hide tokens of; an empty text begins a new document.
        max_new_tokens: of each continuation, or as many as learned positions have room for.
        temperature: 0 takes the likeliest token.
        seed: of the sampling.
    """

    def __init__(
        self, prompts: list[str] | None = None, max_new_tokens: int = 64, temperature: float = 0.8, seed: int = 0
    ) -> None:
        self.prompts = [""] if prompts is None else prompts
        self.max_new_tokens, self.temperature, self.seed = max_new_tokens, temperature, seed
        self._said: set[str] = set()

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse prompts that leave no room for a continuation now, not after hours at the first validation."""
        tokenizer = getattr(trainer.datamodule, "tokenizer", None)
        config = module.model.config
        if tokenizer is None or not module.task.generates or not config.position.bounded:
            return
        for text in self.prompts:
            tokens = len(tokenizer.prompt(text))
            if tokens >= config.context:
                raise UserError(
                    f"samples.prompts: {text[:40]!r} is {tokens} tokens long, and {config.position.kind} positions end "
                    f"at {config.context}; shorten it"
                )

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        tokenizer = getattr(trainer.datamodule, "tokenizer", None)
        if trainer.sanity_checking or not self.prompts or not trainer.loggers or tokenizer is None:
            return
        sharded = isinstance(trainer.strategy, FSDP2)
        if not (trainer.is_global_zero or sharded):  # a sharded model runs on all ranks together
            return
        log_text(trainer, "samples", "\n\n".join(self._written(module, tokenizer)))

    def _written(self, module: LightningModule, tokenizer) -> list[str]:
        options = {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature, "seed": self.seed}
        eager = nullcontext() if module.compiling is None else torch.compiler.set_stance("force_eager")
        with torch.no_grad(), eager, warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", UserWarning)
            texts = module.task.samples(module.model, tokenizer, self.prompts, **options)
        self._say(f"samples: {warning.message}" for warning in found)
        return ["```\n" + text.replace("```", "'''") + "\n```" for text in texts]

    @rank_zero_only
    def _say(self, sentences: Iterable[str]) -> None:
        """Print each sentence once in a run, without the line of code that says it."""
        for sentence in dict.fromkeys(sentences):
            if sentence not in self._said:
                self._said.add(sentence)
                print(sentence, file=sys.stderr, flush=True)

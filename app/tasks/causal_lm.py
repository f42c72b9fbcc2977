"""Causal language modelling: every token is predicted from those before it in its document."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from app.data.tokenizer import Tokenizer
from app.evaluation.metrics import METRICS, Metric
from app.evaluation.quality import PREDICTION
from app.tasks.base import TASKS
from app.tasks.tokens import TokenTask
from models.config import ModelConfig
from models.errors import UserError
from models.generation import generate
from models.registry import Several
from models.transformer import Transformer


@TASKS.register("causal_lm")
@dataclass(frozen=True)
class CausalLM(TokenTask):
    """Next-token prediction.

    Args:
        metrics: what a model is measured by; the first is the one that verdicts are about.
    """

    metrics: tuple[Metric, ...] = field(default=PREDICTION, metadata={"registry": Several(METRICS)})

    generates = True
    describes, predicts = "decoder", "next token"
    normalisation = "per token of this tokenizer; bits per byte divides by the UTF-8 bytes of the text"

    def check(self, config: ModelConfig) -> None:
        super().check(config)
        if config.direction != "causal":
            raise UserError(
                "the architecture is bidirectional, and a model that sees the next token learns nothing by predicting "
                "it; give it direction: causal, or train it with task: masked_lm"
            )

    def samples(self, model: Transformer, tokenizer: Tokenizer, prompts: Sequence[str], **options: Any) -> list[str]:
        """Each prompt with a continuation. Warns where a text is cut short."""
        begun, config = [tokenizer.prompt(text) for text in prompts], model.config
        if config.position.bounded:
            room = config.context - max(map(len, begun))
            options |= {"max_new_tokens": min(options["max_new_tokens"], room)}
        written = generate(model, begun, stop_tokens=tokenizer.stops, **options)
        return [text + tokenizer.continuation(*pair) for text, *pair in zip(prompts, begun, written, strict=True)]

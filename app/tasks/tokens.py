"""Tasks that predict at tokens: a batch has `tokens` and `targets`, -100 where nothing counts.

B sequences in a batch, T tokens in a sequence, V vocabulary, N targets.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from app.data.corpus import Corpus
from app.data.packing import token_blocks
from app.data.sources import open_source
from app.data.tokenizer import Tokenizer
from app.evaluation.baselines import baselines
from app.evaluation.metrics import quantities
from app.evaluation.rows import IGNORED
from app.tasks.base import Batch, Forward, Losses, Task
from models.config import ModelConfig
from models.errors import UserError


class TokenTask(Task):
    """Base class of the tasks that predict at tokens of a text.

    Attributes:
        one_a_row: whether each row has one target, and not one at any token.
    """

    one_a_row: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.metrics:
            raise UserError("metrics is empty; a model is measured by at least one")

        gathered = [metric.kind for metric in self.metrics if metric.gathered and not self.one_a_row]
        if gathered:
            raise UserError(f"metrics: {gathered[0]} is a figure of classes, and {self.kind} predicts tokens")

    def check(self, config: ModelConfig) -> None:
        if config.outputs != config.vocab_size:
            raise UserError(
                f"the head '{config.head.kind}' gives {config.outputs} logits, and {self.kind} predicts a token of "
                f"{config.vocab_size}; give it head: tied or untied"
            )

    def data_class(self) -> type:
        from app.data.module import TextData  # imports Lightning, which takes seconds

        return TextData

    def corpus(self, source: str, column: str | None = None) -> Corpus:
        return open_source(source, column)

    def blocks(
        self, corpus: Corpus, tokenizer: Tokenizer, split: str, length: int, samples: int | None, seed: int
    ) -> Any:
        return token_blocks(corpus, tokenizer, split, length, samples=samples, seed=seed)

    def places(self, batch: Batch) -> int:
        """The most targets that could count in a batch of so many rows."""
        return len(batch["targets"]) if self.one_a_row else batch["targets"].numel()

    def losses(self, model: Forward, batch: Batch, *, z_loss: float = 0.0) -> Losses:
        targets = batch["targets"]  # (B, T)
        output = model(batch["tokens"], targets=targets, documents=batch.get("documents"), z_loss=z_loss > 0)
        count = (targets != IGNORED).sum()
        total = output.loss if output.z_loss is None else output.loss + z_loss * output.z_loss
        sums = {"nll": output.loss.detach().float() * count}
        return Losses(total + sum(output.losses.values()), sums, count, self.places(batch))

    def measured(self, model: Forward, batch: Batch) -> Losses:
        units = quantities(self.metrics)
        if list(units) == ["nll"]:  # no need of log-probabilities
            output = model(batch["tokens"], targets=batch["targets"], documents=batch.get("documents"))
            count = (batch["targets"] != IGNORED).sum()
            return Losses(output.loss, {"nll": output.loss.double() * count}, count, self.places(batch))
        log = self.predictions(model, batch)  # (N, V)
        targets = batch["targets"][batch["targets"] != IGNORED]  # (N,)
        found = {name: of(log, targets) for name, of in units.items()}  # (N,) each
        gathered = {metric.quantity for metric in self.metrics if metric.gathered}
        sums = {name: values.double().sum() for name, values in found.items() if name not in gathered}
        count = torch.tensor(len(targets), device=log.device)
        kept = {name: found[name] for name in gathered}
        return Losses(sums["nll"] / max(1, len(targets)), sums, count, self.places(batch), kept)

    def predictions(self, model: Forward, batch: Batch) -> Tensor:
        logits = model(batch["tokens"], documents=batch.get("documents")).logits  # (B, T, V)
        return logits[batch["targets"] != IGNORED].float().log_softmax(-1)

    def predicted_rows(self, model: Forward, batch: Batch) -> list[dict[str, Any]]:
        """First and last document of each row, its summed NLL in nats, and its predicted tokens."""
        targets = batch["targets"]  # (B, T)
        logits = model(batch["tokens"], documents=batch.get("documents")).logits  # (B, T, V)
        flat = logits.float().flatten(0, 1), targets.flatten()
        nll = F.cross_entropy(*flat, ignore_index=IGNORED, reduction="none").view_as(targets).sum(1)  # (B,)
        counts = (targets != IGNORED).sum(1)  # (B,)
        rows = zip(batch["ids"].tolist(), nll.tolist(), counts.tolist(), strict=True)
        return [{"documents": ids, "nll": loss, "tokens": count} for ids, loss, count in rows if count]

    def baselines(self, config: ModelConfig, blocks: Sequence[Batch], training: Any = None, **options: Any) -> dict:
        return baselines(config, blocks, training, metrics=self.metrics, **options)

"""Tasks that predict tokens: a batch has `tokens` and `targets`, -100 where nothing counts.

B sequences in a batch, T tokens in a sequence, V vocabulary, N targets.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from app.evaluation.baselines import baselines
from app.evaluation.metrics import quantities
from app.evaluation.rows import IGNORED
from app.tasks.base import Batch, Forward, Losses, Task
from models.config import ModelConfig
from models.errors import UserError


class TokenTask(Task):
    """Base class of the tasks that predict tokens of a text."""

    def __post_init__(self) -> None:
        if not self.metrics:
            raise UserError("metrics is empty; a model is measured by at least one")

    def data(self, **options: Any) -> Any:
        from app.data.module import TextData  # imports Lightning, which takes seconds

        data = TextData(**options)
        data.task = self
        return data

    def losses(self, model: Forward, batch: Batch, *, z_loss: float = 0.0) -> Losses:
        targets = batch["targets"]  # (B, T)
        output = model(batch["tokens"], targets=targets, documents=batch.get("documents"), z_loss=z_loss > 0)
        count = (targets != IGNORED).sum()
        total = output.loss if output.z_loss is None else output.loss + z_loss * output.z_loss
        sums = {"nll": output.loss.detach().float() * count}
        return Losses(total + sum(output.losses.values()), sums, count, targets.numel())

    def measured(self, model: Forward, batch: Batch) -> Losses:
        units = quantities(self.metrics)
        if list(units) == ["nll"]:  # no need of log-probabilities
            output = model(batch["tokens"], targets=batch["targets"], documents=batch.get("documents"))
            count = (batch["targets"] != IGNORED).sum()
            return Losses(output.loss, {"nll": output.loss.double() * count}, count, batch["targets"].numel())
        log = self.predictions(model, batch)  # (N, V)
        targets = batch["targets"][batch["targets"] != IGNORED]  # (N,)
        sums = {name: of(log, targets).double().sum() for name, of in units.items()}
        count = torch.tensor(len(targets), device=log.device)
        return Losses(sums["nll"] / max(1, len(targets)), sums, count, batch["targets"].numel())

    def predictions(self, model: Forward, batch: Batch) -> Tensor:
        logits = model(batch["tokens"], documents=batch.get("documents")).logits  # (B, T, V)
        return logits[batch["targets"] != IGNORED].float().log_softmax(-1)

    def baselines(self, config: ModelConfig, blocks: Sequence[Batch], training: Any = None, **options: Any) -> dict:
        return baselines(config, blocks, training, metrics=self.metrics, **options)

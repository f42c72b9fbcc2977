"""Stops a run whose loss or gradient is no longer a number, and says where that happened."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from app.callbacks.checkpoints import Checkpoints
from models.errors import RunFailed, UserError

SHOWN = 32  # rows of the batch that are listed


class NonFiniteLoss(RunFailed):
    """The loss or the gradient became infinite or not a number."""


class FiniteGuard(Callback):
    """Raises `NonFiniteLoss` after the optimizer step whose loss or gradient norm is not finite.

    The test needs the value on the host. On a GPU it is looked at one step later, when it has long arrived, and always
    before a checkpoint is written, so that no checkpoint holds spoilt weights. Where nothing is trained (validate,
    test, predict) the weights were given, and a loss that is not finite is a `UserError`.
    """

    def __init__(self) -> None:
        self._documents: list[Tensor] = []  # (B, 2) of each micro-batch of the step
        self._pending: tuple[int, list[Tensor], Tensor] | None = None

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: dict[str, Tensor], batch_index: int
    ) -> None:
        if batch.get("ids") is not None:
            self._documents.append(batch["ids"])
        if module.figures is None or not module.stepped:
            return
        self.check(trainer)
        value = torch.stack([module.figures.loss.float(), module.figures.grad_norm])  # (2,)
        self._pending = (trainer.global_step, self._documents, value)
        self._documents = []
        if value.device.type == "cpu":
            self.check(trainer)

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.check(trainer)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self.check(trainer)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            _check_given(trainer.callback_metrics["validation/loss"], "validation")

    def on_test_end(self, trainer: Trainer, module: LightningModule) -> None:
        _check_given(trainer.callback_metrics["test/loss"], "test")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: list[dict[str, Any]],
        batch: dict[str, Tensor],
        batch_index: int,
        loader: int = 0,
    ) -> None:
        numbers = [value for row in outputs for value in row.values() if isinstance(value, float)]
        _check_given(torch.tensor(numbers).sum(), "predicted")

    def check(self, trainer: Trainer) -> None:
        """Look at the latest step's figures. Raises NonFiniteLoss; the norm is global, so every rank does."""
        if self._pending is None:
            return
        step, documents, value = self._pending
        self._pending = None
        loss, norm = value.tolist()
        if math.isfinite(loss) and math.isfinite(norm):
            return
        rows = _rows(documents, math.isfinite(loss))
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {norm}"
        last = next((callback.latest() for callback in trainer.callbacks if isinstance(callback, Checkpoints)), None)
        raise NonFiniteLoss(
            f"{what} at step {step}, on documents {rows}; "
            + (f"the last good checkpoint is {last}" if last else "there is no checkpoint yet")
        )


def _check_given(loss: Tensor, split: str) -> None:
    if not bool(loss.isfinite()):
        raise UserError(
            f"the {split} loss is {float(loss)}: the weights hold NaN or infinity, or activations are too large for "
            "the precision; espalier inspect CHECKPOINT names a tensor that is not finite"
        )


def _rows(documents: list[Tensor], finite: bool) -> str:
    """The documents of the step, of those ranks alone whose own loss is not finite, if there are such."""
    rows = torch.cat(documents).tolist() if documents else []
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, (rows, finite))
        guilty = [item for item in everyone if not item[1]] or everyone
        rows = [row for item in guilty for row in item[0]]
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in rows[:SHOWN]]
    more = f" and {len(rows) - SHOWN} more rows" if len(rows) > SHOWN else ""
    return (", ".join(shown) or "unknown") + more

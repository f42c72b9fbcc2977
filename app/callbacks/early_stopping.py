"""Ends a run that no longer gets better."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from models.errors import UserError


class StopEarly(Callback):
    """Ends the training, as its last step would, when the validation has not improved for a while.

    The count is part of every checkpoint: a run that is killed goes on counting, and one that has stopped stays so
    until it gets more patience.

    Args:
        patience: validations in a row without an improvement after which the run ends. None never ends it.
        monitor: the logged figure that decides; smaller is better.
        min_delta: how much smaller than the best so far counts as an improvement.
    """

    def __init__(self, patience: int | None = None, monitor: str = "validation/loss", min_delta: float = 0.0) -> None:
        if patience is not None and patience < 1:
            raise UserError(f"early_stopping.patience must be at least 1, or null for none, not {patience}")
        if not min_delta >= 0:
            raise UserError(f"early_stopping.min_delta must be at least 0, not {min_delta}")
        self.patience, self.monitor, self.min_delta = patience, monitor, min_delta
        self.best: float | None = None
        self.waited = 0  # validations since the best

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.patience is not None and trainer.limit_val_batches == 0:
            raise UserError("early_stopping.patience needs validations, and trainer.limit_val_batches is 0")

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        trainer.should_stop |= self.stops  # a resumed run may have stopped already

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.patience is None or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        score = trainer.callback_metrics.get(self.monitor)
        if score is None:
            raise UserError(
                f"early_stopping.monitor is {self.monitor!r}, which nothing logs; there is: "
                + ", ".join(sorted(trainer.callback_metrics))
            )
        if self.best is None or float(score) < self.best - self.min_delta:
            self.best, self.waited = float(score), 0
        else:
            self.waited += 1
        trainer.should_stop |= self.stops

    @property
    def stops(self) -> bool:
        """Whether patience is at its end."""
        return self.patience is not None and self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.waited = state_dict["best"], state_dict["waited"]

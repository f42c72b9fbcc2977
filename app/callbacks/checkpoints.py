"""Checkpoints from which a run continues, and the best one."""

import re
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from models.errors import UserError

NAME = re.compile(r"(step|best)-(\d+)\.ckpt")


class Checkpoints(Checkpoint):
    """Saves `step-N.ckpt` every so many steps and at the end, and `best-N.ckpt` when the validation improves.

    A new checkpoint has its final name only when it is complete, and older ones go only after that: whenever the run is
    killed, the newest `step-N.ckpt` is whole. This holds for files and for the folders of sharded checkpoints.

    Where a validation falls on the same step, the checkpoint comes after it. They go to `checkpoints` in the run's
    folder.

    Args:
        every_n_steps: optimizer steps between two checkpoints.
        keep: how many of the newest `step-N.ckpt` stay.
        monitor: the logged figure that decides about the best; smaller is better. None keeps no best.
    """

    folder: Path

    def __init__(self, every_n_steps: int = 500, keep: int = 1, monitor: str | None = "validation/loss") -> None:
        for name, value in (("every_n_steps", every_n_steps), ("keep", keep)):
            if value < 1:
                raise UserError(f"checkpoint.{name} must be at least 1, not {value}")
        self.every_n_steps, self.keep, self.monitor = every_n_steps, keep, monitor
        self.best_score: float | None = None
        self._saved_step = 0

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        self.folder = Path(trainer.default_root_dir) / "checkpoints"

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._saved_step = trainer.global_step  # a resumed run has its checkpoint already

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        if trainer.global_step % self.every_n_steps == 0 and not _validates_now(trainer):
            self._save_step(trainer)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if self.monitor is not None:
            self._save_best(trainer)
        if trainer.global_step % self.every_n_steps == 0:
            self._save_step(trainer)

    def _save_best(self, trainer: Trainer) -> None:
        score = trainer.callback_metrics.get(self.monitor)
        if score is None:
            raise UserError(
                f"checkpoint.monitor is {self.monitor!r}, which nothing logs; there is: "
                + ", ".join(sorted(trainer.callback_metrics))
            )
        if self.best_score is None or float(score) < self.best_score:
            self.best_score = float(score)
            trainer.save_checkpoint(self.folder / f"best-{trainer.global_step:08d}.ckpt")
            self._remove_older(trainer, "best", 1)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._save_step(trainer)

    def _save_step(self, trainer: Trainer) -> None:
        if trainer.global_step == self._saved_step:
            return
        self._saved_step = trainer.global_step
        trainer.save_checkpoint(self.folder / f"step-{trainer.global_step:08d}.ckpt")
        self._remove_older(trainer, "step", self.keep)

    @rank_zero_only
    def _remove_older(self, trainer: Trainer, kind: str, keep: int) -> None:
        for path in checkpoints_in(self.folder, kind)[:-keep]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def latest(self) -> Path | None:
        """The newest checkpoint, or None."""
        return newest_checkpoint(self.folder)

    def best(self) -> Path | None:
        """The checkpoint with the best validation, or None."""
        return newest_checkpoint(self.folder, "best")

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score = state_dict["best_score"]


def _validates_now(trainer: Trainer) -> bool:
    """Whether a validation follows this batch. A checkpoint before it would make a resumed run leave it out."""
    loop = trainer.fit_loop
    return loop.epoch_loop._should_check_val_fx(loop._data_fetcher)


def checkpoints_in(folder: Path, kind: str = "step") -> list[Path]:
    """The complete checkpoints of a kind (`step` or `best`) in a folder, oldest step first."""
    found = []
    if folder.is_dir():
        for path in folder.iterdir():
            name = NAME.fullmatch(path.name)
            if name and name[1] == kind:
                found.append((int(name[2]), path))
    return [path for _, path in sorted(found)]


def step_of(checkpoint: Path) -> int | None:
    """The optimizer step that the name of a checkpoint tells; None for a name of another form."""
    name = NAME.fullmatch(checkpoint.name)
    return int(name[2]) if name else None


def newest_checkpoint(folder: Path, kind: str = "step") -> Path | None:
    """The checkpoint of a kind with the highest step, or None."""
    found = checkpoints_in(folder, kind)
    return found[-1] if found else None

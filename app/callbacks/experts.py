"""Expert load during training in TensorBoard; nothing for a model without experts."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from app.evaluation.experts import Figures, Loads
from app.evaluation.report.charts import load_picture


class ExpertLoad(Callback):
    """Logs, for every layer with experts (`block_1`, ...):

        experts/load_variation, experts/dropped, experts/entropy, experts/balance

    (app/evaluation/experts.py says what they are) of the latest micro-batch over all ranks, every so many optimizer
    steps; after each validation the same over its batches under `validation_experts/`, and the load of every layer and
    expert as the picture `experts/load`. The device is waited for at these steps only.

    Args:
        every_n_steps: optimizer steps between two entries.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        self.every_n_steps = every_n_steps
        self.loads: Loads | None = None  # of the validation that is under way

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.loads = Loads(module.model)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: dict[str, Tensor], batch_index: int
    ) -> None:
        if not self.loads.layers or not module.stepped or trainer.global_step % self.every_n_steps:
            return
        latest = Loads(module.model)
        latest.add(batch["tokens"].numel())
        _log_scalars(trainer, "experts", _over_ranks(trainer, latest))

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.loads is not None:
            self.loads.clear()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: Any,
        batch: dict[str, Tensor],
        batch_index: int,
        dataloader_index: int = 0,
    ) -> None:
        if self.loads is not None:
            self.loads.add(batch["tokens"].numel())

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.loads is None or not self.loads.layers or trainer.sanity_checking:
            return
        figures = _over_ranks(trainer, self.loads)
        _log_scalars(trainer, "validation_experts", figures)
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if boards and trainer.is_global_zero:
            picture = load_picture({f"step {trainer.global_step}": figures}, "Load of every expert").pixels()
            for logger in boards:
                logger.experiment.add_image("experts/load", picture, trainer.global_step, dataformats="HWC")


def _over_ranks(trainer: Trainer, loads: Loads) -> Figures:
    """The figures over the batches of all ranks, which are of one size."""
    means = loads.means()
    if trainer.world_size > 1 and means is not None:
        means = trainer.strategy.reduce(means, reduce_op="mean")
    return loads.figures(means)


def _log_scalars(trainer: Trainer, group: str, figures: Figures) -> None:
    values = {
        f"{group}/{name}/{layer.replace('blocks.', 'block_')}": value
        for layer, found in figures.items()
        for name, value in found.items()
        if name != "load"
    }
    for logger in trainer.loggers:
        logger.log_metrics(values, step=trainer.global_step)

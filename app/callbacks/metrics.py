"""Training metrics: loss, rates, memory, and the run's own recipe."""

import math
import resource
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from app.callbacks.peak_flops import peak_flops
from models.errors import UserError

GIB = 2**30
LARGEST = math.exp(700.0)  # of a figure in TensorBoard


class Metrics(Callback):
    """Logs, every so many optimizer steps:

        train/loss, train/METRIC                             of the step, over all ranks; the metrics of the task
        train/learning_rate, train/grad_norm                 of the first parameter group; norm before clipping
        speed/tokens_per_second, speed/mfu                   over the steps since the last entry, validation left out
        memory/peak_gib                                      of the device, or of the process on CPU

    MFU: model FLOPs (forward and backward, nothing recomputed) over the dense bf16 peak (app/callbacks/peak_flops.py).

    Args:
        every_n_steps: optimizer steps between two entries.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        if every_n_steps < 1:
            raise UserError(f"metrics.every_n_steps must be at least 1, not {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.peak: float | None = None
        self._tokens = 0  # since the last entry, over all ranks
        self._since: float | None = None
        self._paused = 0.0

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.peak, sentence = peak_flops(module.device)
        rank_zero_info(sentence)
        log_text(trainer, "mfu", sentence)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._pause_began = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._paused += time.perf_counter() - self._pause_began

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: dict[str, Tensor], batch_index: int
    ) -> None:
        self._tokens += batch["tokens"].numel() * trainer.world_size
        if not module.stepped:
            return
        if self._since is None:  # the first step compiles and allocates: the clock starts after it
            self._restart_clock()
        elif trainer.global_step % self.every_n_steps == 0:
            self._log(trainer, module, batch["tokens"].shape[1])

    def _restart_clock(self) -> None:
        self._tokens, self._since, self._paused = 0, time.perf_counter(), 0.0

    def _log(self, trainer: Trainer, module: LightningModule, length: int) -> None:
        figures = module.figures
        sums = torch.stack([*(value.double() for value in figures.sums.values()), figures.count.double()])
        if trainer.world_size > 1:
            sums = trainer.strategy.reduce(sums, reduce_op="sum")
        *sums, count = sums.tolist()  # waits for the device, so that the clock below is true
        means = dict(zip(figures.sums, (value / max(count, 1) for value in sums), strict=True))
        seconds = time.perf_counter() - self._since - self._paused
        rate = self._tokens / seconds
        values = {
            **{f"train/{name}": min(value, LARGEST) for name, value in module.metrics_of(means).items()},
            "train/loss": next(iter(means.values())),
            "train/learning_rate": figures.learning_rate,
            "train/grad_norm": figures.grad_norm.item(),
            "speed/tokens_per_second": rate,
            "memory/peak_gib": peak_memory(module.device) / GIB,
        }
        if self.peak is not None:
            flops = rate * module.model.training_flops_per_token(length)
            values["speed/mfu"] = flops / (self.peak * trainer.world_size)
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
        self._restart_clock()


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch held on a GPU, or on CPU the most that this process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts kilobytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def log_text(trainer: Trainer, name: str, text: str) -> None:
    """Write a text (Markdown) to TensorBoard at the current step; other loggers have no place for it."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            logger.experiment.add_text(name, text, trainer.global_step)

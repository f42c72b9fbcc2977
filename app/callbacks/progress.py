"""One progress bar for the whole run: steps, rate, loss, time left."""

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor

LINE_SECONDS = 10.0  # between two lines where there is no terminal


class RunProgress(ProgressBar):
    """Shows how far the run is, in tokens per second, loss and time left until its last step.

    On a terminal a bar; elsewhere (a log file, `make` in CI) a line every ten seconds. The rate and the time left leave
    out the first step, which compiles.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._begin: float | None = None  # when the first step of this process had ended
        self._steps = self._tokens = 0  # since then
        self._shown = 0.0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._enabled:
            self._console.print(*args)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._total = trainer.estimated_stepping_batches
        self._begin, self._steps, self._tokens = None, 0, 0
        if not self._enabled:
            return
        if module.compiling is not None:
            self._console.print("The first step compiles the blocks and takes a while.")
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
                console=self._console,
            )  # fmt: skip
            self._task = self._bar.add_task("training", total=self._total, completed=trainer.global_step, text="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: dict[str, Tensor], batch_index: int
    ) -> None:
        if not self._enabled:
            return
        now = time.perf_counter()
        if self._begin is None:
            self._begin = now
            return
        self._tokens += batch["tokens"].numel() * trainer.world_size
        if not module.stepped:
            return
        self._steps += 1
        if now - self._shown > (0.2 if self._bar else LINE_SECONDS) or trainer.global_step >= self._total:
            self._shown = now
            self._show(trainer, module, now - self._begin)

    def _show(self, trainer: Trainer, module: LightningModule, seconds: float) -> None:
        loss = (module.figures.loss / module.figures.count).item()
        left = seconds / self._steps * (self._total - trainer.global_step)
        text = f"loss {loss:.3f}  {self._tokens / seconds:,.0f} tokens/s  {duration(left)} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, text=text)
        else:
            print(f"step {trainer.global_step}/{self._total}  {text}", file=sys.stderr, flush=True)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description="validating")

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description="training")
        if self._enabled and trainer.state.fn == "fit" and "validation/loss" in trainer.callback_metrics:
            found = {name.removeprefix("validation/"): float(x) for name, x in trainer.callback_metrics.items()}
            parts = [f"loss {found['loss']:.4f}"]
            parts += [
                f"{metric.label} {metric.show(found[metric.kind])}"
                for metric in module.task.metrics
                if metric.kind in found and metric.kind != "loss"
            ]
            self._console.print(f"step {trainer.global_step}: validation {', '.join(parts)}", highlight=False)

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def duration(seconds: float) -> str:
    """`90` -> `1:30`, `3700` -> `1:01:40`."""
    minutes, seconds = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

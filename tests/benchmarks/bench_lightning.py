"""What the LightningModule and its Trainer cost over a bare loop that does the same.

Both train the same compiled model in bf16 with the same optimizer on the same batches from the same loader. The Trainer
runs once with nothing but the module, and once with what `espalier fit` adds: random state, finite guard, metrics into
TensorBoard, progress. A round is `steps` optimizer steps, timed from the end of the second one: the first two touch
their memory for the first time.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from app.callbacks import FiniteGuard, Metrics, RandomState, RunProgress
from app.optim import AdamW, Constant
from app.tasks.compile import CompileBlocks
from app.tasks.gradients import scale_and_clip
from app.tasks.precision import call_in
from app.tasks.training import Training
from models.transformer import Transformer
from tests.benchmarks.shapes import Shape
from tests.benchmarks.timing import Row, rate_row, take_turns

NAME = "lightning"
UNTIMED = 2


@dataclass(frozen=True)
class Overhead:
    """Settings: `steps` timed steps a round, of `rows` x `length` tokens."""

    shape: Shape = field(default_factory=Shape)
    rows: int = 16
    length: int = 256
    steps: int = 12
    rounds: int = 11
    compiled: bool = True


class Timer(Callback):
    """Seconds between the end of step `UNTIMED` and the end of the last one."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        if trainer.global_step == UNTIMED:
            self.began = time.perf_counter()
        self.ended = time.perf_counter()


def run(settings: Overhead | None = None) -> list[Row]:
    """Steps of the bare loop and of the Trainer, in tokens/s."""
    settings = settings or Overhead()
    model = settings.shape.core()
    if settings.compiled:
        CompileBlocks().apply(model)
    loader = batches(settings)
    with tempfile.TemporaryDirectory() as folder:
        cases: dict[str, Callable[[], float]] = {
            "bare loop": lambda: bare(model, loader),
            "Trainer": lambda: fit(settings, model, loader, None),
            "Trainer as in `espalier fit`": lambda: fit(settings, model, loader, folder),
        }
        seconds = take_turns(NAME, cases, rounds=settings.rounds, warmup=1)
    work = settings.steps * settings.rows * settings.length
    note = f"bf16, {settings.steps} steps a round of {settings.rows} x {settings.length} tokens, {settings.shape}"
    first, *others = cases
    rows = [rate_row(NAME, first, seconds, work, "tokens/s", note=note)]
    return rows + [rate_row(NAME, case, seconds, work, "tokens/s", peer=first, note=note) for case in others]


def batches(settings: Overhead) -> DataLoader:
    """A loader of the batches of one round."""
    generator = torch.Generator().manual_seed(1)
    size = (settings.rows, settings.length + 1)
    made = []
    for _ in range(UNTIMED + settings.steps):
        stream = torch.randint(settings.shape.vocabulary, size, generator=generator)  # (B, T + 1)
        made.append({"tokens": stream[:, :-1].contiguous(), "targets": stream[:, 1:].contiguous()})
    return DataLoader(made, batch_size=None)


def bare(model: Transformer, loader: DataLoader) -> float:
    """Seconds of the timed steps of a plain loop."""
    optimizer = AdamW().build(model)
    for number, batch in enumerate(loader):
        if number == UNTIMED:
            began = time.perf_counter()
        call_in(torch.bfloat16, model, batch["tokens"], targets=batch["targets"]).loss.backward()
        scale_and_clip(model.parameters(), torch.tensor(1.0), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - began


def fit(settings: Overhead, model: Transformer, loader: DataLoader, folder: str | None) -> float:
    """Seconds of the timed steps of the Trainer; with the callbacks of `espalier fit` when there is a log folder."""
    module = Training(model.config.to_dict(), AdamW(), Constant(), compute_dtype="bfloat16")
    module.config, module.model = model.config, model
    timer = Timer()
    added = [] if folder is None else [RandomState(), FiniteGuard(), Metrics(), RunProgress()]
    trainer = Trainer(
        accelerator="cpu",
        max_steps=UNTIMED + settings.steps,
        gradient_clip_val=1.0,
        logger=False if folder is None else TensorBoardLogger(folder),
        callbacks=[*added, timer],
        enable_checkpointing=False,
        enable_progress_bar=folder is not None,
        enable_model_summary=False,
    )
    trainer.fit(module, train_dataloaders=loader)
    return timer.ended - timer.began

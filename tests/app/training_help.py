"""Small pretraining runs for the tests."""

import hashlib
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from app.callbacks import Checkpoints, FiniteGuard, Metrics, ModelFolder, RandomState, RunRecord
from app.data.module import TextData
from app.optim import AdamW, Cosine
from app.strategies import WholeCheckpoints
from app.tasks.training import Training

ARCHITECTURE = {
    "width": 32,
    "depth": 2,
    "attention": {"kind": "full", "heads": 4, "kv_heads": 2},
    "feedforward": {"kind": "swiglu", "width": 64},
    "dropout": 0.1,
}


def text_data(cache: Path, **options) -> TextData:
    return TextData(
        **{"source": "synthetic", "sequence_length": 32, "batch_size": 8, "vocab_size": 300, **options},
        cache_dir=str(cache),
    )


def language_model(**options) -> Training:
    defaults = {"architecture": ARCHITECTURE, "optimizer": AdamW(lr=3e-3), "schedule": Cosine(warmup_steps=3)}
    return Training(**{**defaults, **options})


class StopAfter(Callback):
    """Breaks a run off after a step, as a fault would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, module, batch, batch_index) -> None:
        if trainer.global_step == self.step:
            raise Interrupted


class Interrupted(Exception):
    pass


class Seen(Callback):
    """Remembers the batches that training saw."""

    def __init__(self) -> None:
        self.tokens: list[str] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        self.tokens.append(hashlib.sha256(batch["tokens"].numpy().tobytes()).hexdigest())


def make_trainer(folder: Path, *callbacks: Callback, every: int = 4, **options) -> Trainer:
    """A trainer with what `espalier fit` gives one; checkpoints every `every` steps."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 10,
        "gradient_clip_val": 1.0,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "val_check_interval": 4,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 2,
        "logger": TensorBoardLogger(str(folder.with_name(f"{folder.name}.run")), name="", version=""),
    }
    own = [RandomState(), FiniteGuard(), RunRecord({"name": "test"}), Metrics(2), Checkpoints(every)]
    return Trainer(
        **{**defaults, **options},
        default_root_dir=str(folder.with_name(f"{folder.name}.run")),
        plugins=[WholeCheckpoints()],
        callbacks=[*own, ModelFolder(folder, {"name": "test"}, 1), *callbacks],
    )


def fit(trainer: Trainer, model: Training, data: TextData, resume: Path | None = None, seed: int = 1) -> None:
    seed_everything(seed, verbose=False)
    trainer.fit(model, data, ckpt_path=None if resume is None else str(resume), weights_only=True)


def state_hash(module: torch.nn.Module) -> str:
    """SHA-256 over every tensor of the state dict."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

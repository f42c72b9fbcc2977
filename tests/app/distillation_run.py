"""One distillation as a program, for tests that need several processes: `python -m ... FOLDER OUT STRATEGY OPTIONS`."""

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from app.callbacks.randomness import RandomState
from app.data.module import TextData
from app.optim import AdamW, Cosine
from app.strategies import FSDP2, WholeCheckpoints
from app.tasks.distill import Distillation


def main(folder: Path, out: Path, strategy: str, options: dict) -> None:
    """Distil; the state of student and projectors goes to OUT/state.pt, what was logged and is zero to figures.json."""
    torch.set_num_threads(1)
    pl.seed_everything(1, verbose=False)
    steps, resume = options.pop("steps", 6), options.pop("resume", None)
    module = Distillation(
        str(folder / "teacher"),
        losses=["logit", "feature"],
        optimizer=AdamW(lr=3e-3, weight_decay=0.5),
        schedule=Cosine(warmup_steps=1),
        **options,
    )
    data = TextData(
        source=str(folder / "text.txt"),
        sequence_length=32,
        batch_size=4,
        vocab_size=300,
        cache_dir=str(folder / "cache"),
    )
    sharded = strategy == "fsdp2"
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1 if strategy == "auto" else 2,
        strategy=FSDP2() if sharded else strategy,
        max_steps=steps,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=0.1,
        accumulate_grad_batches=2,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        val_check_interval=4,
        limit_val_batches=2,
        callbacks=[
            pl.callbacks.ModelCheckpoint(out / "checkpoints", every_n_train_steps=2, save_top_k=-1),
            RandomState(),
        ],
        plugins=[WholeCheckpoints()],
    )
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    state = get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if trainer.is_global_zero:
        torch.save(state, out / "state.pt")
        figures = {name: value.item() for name, value in trainer.callback_metrics.items()}
        (out / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4]))

"""The model folder at the end of a run."""

import time
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from app.callbacks.checkpoints import Checkpoints
from app.history import history_entry, write_card, write_history
from app.strategies.checkpoint_io import read_checkpoint
from models.checkpoint import hash_weights, save_model, writing
from models.errors import UserError
from models.transformer import outline

Weights = Literal["last", "best"]
COMPLETE = "complete"  # the file in the run's folder that says that its model folder was written


class ModelFolder(Callback):
    """Writes the trained model as a model folder when the training has ended.

    Args:
        out: the folder; whatever it holds is replaced, so whoever makes this object has asked before.
        recipe: the resolved recipe, for the history.
        seed: of the run, for the history.
        weights: those of the last step, or those of the best validation.
    """

    def __init__(self, out: Path, recipe: dict[str, Any], seed: int, weights: Weights = "last") -> None:
        self.out, self.recipe, self.seed, self.weights = out, recipe, seed, weights
        self._began = time.perf_counter()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._began = time.perf_counter()

    def on_fit_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Write the folder. Raises UserError when nothing was trained."""
        if trainer.global_step == 0:
            raise UserError("the run was over before its first step; give it more of trainer.max_steps or max_time")
        state = self._state(trainer, module)  # on every rank: gathering shards needs all of them
        if trainer.is_global_zero:
            self._write(trainer, module, state)
        trainer.strategy.barrier("model folder")

    def _state(self, trainer: Trainer, module: LightningModule) -> dict[str, Tensor]:
        """The whole state dict of the model, on the CPU of rank 0."""
        if self.weights == "last":
            return get_model_state_dict(module.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        best = next((callback.best() for callback in trainer.callbacks if isinstance(callback, Checkpoints)), None)
        if best is None:
            raise UserError("there is no best checkpoint to write (weights: best); the run never validated")
        if not trainer.is_global_zero:
            return {}
        prefix = "model."
        state = read_checkpoint(best)["state_dict"]
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

    def _write(self, trainer: Trainer, module: LightningModule, state: dict[str, Tensor]) -> None:
        model = outline(module.config)
        model.load_state_dict(state, assign=True)
        data = trainer.datamodule
        with writing(self.out, overwrite=True) as folder:
            save_model(model, folder, dtype=module.compute_dtype, task=module.task.dump())
            if getattr(data, "tokenizer", None) is not None:
                data.tokenizer.save(folder)
            origin = module.origin
            past = [] if origin is None else origin.history
            entry = history_entry(
                "pretrain",
                f"{trainer.global_step} steps of {type(module.optimizer).__name__}",
                recipe=self.recipe,
                seed=self.seed,
                data={"source": getattr(data, "source", None), "fingerprint": getattr(data, "fingerprint", None)}
                | ({"left_out": left_out} if (left_out := getattr(data, "left_out", None)) else {}),
                parents={} if origin is None else {"from": origin.weights_sha256},
                weights=hash_weights(folder),
                seconds=time.perf_counter() - self._began,
            )
            entry["steps"] = trainer.global_step
            entry["stopped_early"] = trainer.should_stop and trainer.global_step < trainer.estimated_stepping_batches
            write_history(folder, [*past, entry])
            write_card(folder, model, [*past, entry], module.task)
        (Path(trainer.default_root_dir) / COMPLETE).touch()

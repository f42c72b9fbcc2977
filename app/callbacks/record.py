"""Record of a run: its recipe, in checkpoints and TensorBoard too, and its tokenizer."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from app.callbacks.metrics import log_text
from models.io import write_json

KEY = "espalier"
FORMAT_VERSION = 1
RECIPE = "recipe.json"


class RunRecord(Callback):
    """Writes `recipe.json` and the tokenizer into the run's folder and the recipe into checkpoints and TensorBoard.

    Nothing is removed or written before the data, the model and the optimizer are made, and a checkpoint is read: an
    input that one of them refuses leaves an earlier run as it was.

    Args:
        recipe: the resolved recipe, plain values.
        stale: what an earlier run left in the folder, to be removed.
    """

    def __init__(self, recipe: dict[str, Any], stale: Sequence[Path] = ()) -> None:
        self.recipe, self.stale = recipe, stale

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        folder = Path(trainer.default_root_dir)
        if trainer.is_global_zero:
            # without the recipe nothing is resumed; by its checkpoints the folder is known as a run's until the end
            for path in sorted(self.stale, key=lambda path: (path.name != RECIPE, path.name == "checkpoints")):
                _remove(path)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / RECIPE, self.recipe)
            if getattr(trainer.datamodule, "tokenizer", None) is not None:
                trainer.datamodule.tokenizer.save(folder)
        trainer.strategy.barrier("run folder")
        text = yaml.safe_dump(self.recipe, sort_keys=False)
        log_text(trainer, "recipe", f"```yaml\n{text}```")

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = {"format_version": FORMAT_VERSION, "recipe": self.recipe}


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)

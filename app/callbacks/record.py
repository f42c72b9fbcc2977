"""What a run leaves beside its weights: its recipe, in checkpoints and TensorBoard too, and its tokenizer."""

import shutil
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from app.callbacks.metrics import log_text
from models.files import write_json

KEY = "espalier"
FORMAT_VERSION = 1
RECIPE = "recipe.json"


class RunRecord(Callback):
    """Writes `recipe.json` and the tokenizer into the run's folder and the recipe into checkpoints and TensorBoard.

    Args:
        recipe: the resolved recipe, plain values.
        fresh: whether to remove first what an earlier run left in the folder.
    """

    def __init__(self, recipe: dict[str, Any], fresh: bool = False) -> None:
        self.recipe, self.fresh = recipe, fresh

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        folder = Path(trainer.default_root_dir)
        if stage != "fit":
            return
        if trainer.is_global_zero:
            if self.fresh and folder.exists():
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / RECIPE, self.recipe)
            if getattr(trainer.datamodule, "tokenizer", None) is not None:
                trainer.datamodule.tokenizer.save(folder)
        trainer.strategy.barrier("run folder")

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        text = yaml.safe_dump(self.recipe, sort_keys=False)
        log_text(trainer, "recipe", f"```yaml\n{text}```")

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[KEY] = {"format_version": FORMAT_VERSION, "recipe": self.recipe}

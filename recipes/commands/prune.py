"""`espalier prune`: a model made smaller by a method of compress.pruning."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from app.loading import Loaded, load_model
from compress.calibration.records import LayerRecord
from compress.calibration.store import FolderStore
from compress.pruning import METHODS
from models.io import write_json
from models.transformer import Transformer
from recipes.commands import options
from recipes.commands.stage import Stage
from recipes.commands.stage_data import Text
from recipes.commands.terminal import Bars, by_layer


class Prune(Stage[options.Prune]):
    """Pruning by one of the methods of compress.pruning."""

    verb = "prune"

    def __init__(self, chosen: options.Prune) -> None:
        self.method = METHODS.parse(chosen.method, "method")
        super().__init__(replace(chosen, method=METHODS.dump(self.method)))
        self.kept: dict[str, Any] = {}  # JSON of the method, by the name of its file

    def title(self) -> str:
        return self.method.title()

    def parents(self) -> dict[str, Loaded]:
        loaded = load_model(self.options.model, self.device, self.dtype)
        self.method.check(loaded.model.config)
        return {"model": loaded}

    def compress(
        self, parents: dict[str, Loaded], text: Text, state: Path, bars: Bars
    ) -> tuple[Transformer, Sequence[LayerRecord]]:
        model, method, samples = parents["model"].model, self.method, self.options.samples
        records, self.kept = method.prune(
            model,
            text.calibration(samples, self.device, split=method.split) if method.calibrated else None,
            store=FolderStore(state),
            progress=by_layer(bars, "pruning", model),
            searching=partial(bars, "lowering budgets"),
        )
        return model, records

    def keep(self, state: Path, target: Path) -> None:
        for name, content in self.kept.items():
            write_json(target / name, content)


def main(chosen: options.Prune) -> None:
    """Run `espalier prune`."""
    Prune(chosen).run()

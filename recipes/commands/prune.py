"""`espalier prune`: zeros by magnitude or Wanda, neurons, heads or key/value groups taken out of the tensors, and fewer
tokens remembered by layers of selective attention.
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from app.loading import Loaded, load_model
from compress.calibration.records import LayerRecord
from compress.calibration.store import FolderStore
from compress.pruning.context import BudgetStep, Goal, prune_context, selective_layers
from compress.pruning.criteria.criterion import CRITERIA
from compress.pruning.patterns import parse_pattern
from compress.pruning.sparsify import sparsify
from compress.pruning.structured.plan import read_ratios
from compress.pruning.structured.sequential import prune_structured
from models.checkpoint import read_config
from models.errors import UserError
from models.io import write_json
from models.transformer import Transformer
from recipes.commands import options
from recipes.commands.stage import Stage
from recipes.commands.stage_data import Text
from recipes.commands.terminal import Bars, by_layer

SPARSE = {"sparsity": None, "pattern": "unstructured", "scope": None, "include": ""}
STRUCTURED = {
    "targets": "neurons",
    "ratio": 0.25,
    "criterion": "variance",
    "allocation": "uniform",
    "round_to": 8,
    "compensation": "existing",
}
CONTEXT = {"budget_ratio": None, "tolerance": None, "step": 32}
PATTERNS = {"unstructured": {"scope": "row"}}


class Prune(Stage[options.Prune]):
    """Pruning by one of the methods of compress.pruning."""

    verb = "prune"

    def __init__(self, chosen: options.Prune) -> None:
        methods = {**dict.fromkeys(CRITERIA, SPARSE), "structured": STRUCTURED, "context": CONTEXT}
        if chosen.method not in methods:
            raise UserError(f"method must be one of {', '.join(methods)}, not {chosen.method!r}")
        super().__init__(options.apply_defaults(options.apply_defaults(chosen, "method", methods), "pattern", PATTERNS))
        self.trace: list[BudgetStep] = []  # of a search for budgets

    def title(self) -> str:
        chosen = self.options
        if chosen.method == "structured":
            ratios = read_ratios(options.names(chosen.targets), chosen.ratio)
            return "structured pruning, " + ", ".join(
                f"{ratio:.0%} of the {target}" for target, ratio in ratios.items()
            )
        if chosen.method == "context":
            goal = self.goal()
            share = None if goal.budget_ratio is None else f"down to at most {goal.budget_ratio:.0%} of the cache"
            loss = None if goal.tolerance is None else f"for at most {goal.tolerance:g} nats per token"
            return "context pruning, " + " and ".join(filter(None, (share, loss)))
        share = f"{self.pattern().sparsity:.0%}" if chosen.pattern == "unstructured" else chosen.pattern
        return f"{chosen.method.capitalize()}, {share}"

    def pattern(self):
        """The pattern of zeros that was asked for."""
        chosen = self.options
        default = 0.5 if chosen.pattern == "unstructured" else None
        sparsity = default if chosen.sparsity is None else chosen.sparsity
        return parse_pattern(chosen.pattern, sparsity, chosen.scope or "row")

    def goal(self) -> Goal:
        """Requested bounds of context pruning."""
        return Goal(self.options.step, self.options.budget_ratio, self.options.tolerance)

    def check(self) -> None:
        if self.options.method == "context" and Path(self.options.model).is_dir():
            selective_layers(read_config(self.options.model))  # first: without such a layer no other option helps
        self.title()  # parses ratios, pattern and goal

    def parents(self) -> dict[str, Loaded]:
        return {"model": load_model(self.options.model, self.device, self.dtype)}

    def compress(
        self, parents: dict[str, Loaded], text: Text, state: Path, bars: Bars
    ) -> tuple[Transformer, Sequence[LayerRecord]]:
        chosen, model = self.options, parents["model"].model
        store, progress = FolderStore(state), by_layer(bars, "pruning", model)
        if chosen.method == "context":
            batches = text.calibration(chosen.samples, self.device, split="validation")
            bar = partial(bars, "lowering budgets")
            records, self.trace = prune_context(model, batches, self.goal(), store=store, progress=bar)
            return model, records
        batches = None
        if chosen.method == "structured" or CRITERIA[chosen.method]().calibrated:
            batches = text.calibration(chosen.samples, self.device)
        if chosen.method == "structured":
            records = prune_structured(
                model,
                options.names(chosen.targets),
                chosen.ratio,
                chosen.criterion,
                batches,
                allocation=chosen.allocation,
                round_to=chosen.round_to,
                compensation=chosen.compensation,
                store=store,
                progress=progress,
            )
        else:
            records = sparsify(
                model,
                chosen.method,
                self.pattern(),
                batches,
                include=options.names(chosen.include),
                store=store,
                progress=progress,
            )
        return model, records

    def keep(self, state: Path, target: Path) -> None:
        """The steps of a search for budgets go into `budgets.json`."""
        if self.trace:
            write_json(target / "budgets.json", {"steps": [asdict(step) for step in self.trace]})


def main(chosen: options.Prune) -> None:
    """Run `espalier prune`."""
    Prune(chosen).run()

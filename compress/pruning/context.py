"""Context pruning: how many tokens each selective layer may remember, found greedily (arXiv 2410.02703, section 4).

Every layer begins with all tokens of a block. At each step the budget of one layer is lowered by a constant: of the
layer whose reduction leaves the lowest loss on held-out text. No weight changes; the result is an ordinary config in
which layers have a `budget`.

T tokens of a block.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import torch

from compress.calibration.records import LayerRecord
from compress.calibration.sequential import Batch
from compress.calibration.store import Store
from compress.pruning.method import METHODS, PruningMethod
from models.attention.selective import Selective
from models.config import ModelConfig
from models.errors import UserError
from models.transformer import Transformer

SMALLEST = 2  # tokens of a budget: the first of the document and the newest
ENTRY = "budgets"  # under which the steps so far are stored

Progress = Callable[[int, int], None]


@METHODS.register("context")
@dataclass(frozen=True)
class ContextPruning(PruningMethod):
    """Context pruning: layers of selective attention remember fewer tokens. How far, one of two bounds says, or both.

    Args:
        step: tokens by which one layer's budget is lowered at a time.
        budget_ratio: share of the cache of the selective layers at or below which the search ends, above 0 and below 1;
            the last step may take it below by less than that step.
        tolerance: nats per token by which the loss may rise over that of the model as it came.
    """

    split: ClassVar[str] = "validation"  # it compares losses

    step: int = 32
    budget_ratio: float | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if self.step < 1:
            raise UserError(f"step is {self.step}; it must be at least 1 token")
        if self.budget_ratio is not None and not 0 < self.budget_ratio < 1:
            raise UserError(
                f"budget_ratio {self.budget_ratio:g} is impossible: it is the share of the cache that stays, between 0 "
                "and 1"
            )
        if self.tolerance is not None and not 0 <= self.tolerance < math.inf:
            raise UserError(f"tolerance is {self.tolerance:g}; it must be at least 0 nats per token")

    def title(self) -> str:
        share = None if self.budget_ratio is None else f"down to at most {self.budget_ratio:.0%} of the cache"
        loss = None if self.tolerance is None else f"for at most {self.tolerance:g} nats per token"
        return "context pruning, " + " and ".join(filter(None, (share, loss)))

    def check(self, config: ModelConfig) -> None:
        selective_layers(config)  # first: without such a layer no other option helps
        if self.budget_ratio is None and self.tolerance is None:
            raise UserError("context pruning has no end: give budget_ratio, tolerance or both")

    def prune(
        self, model: Transformer, batches: Sequence[Batch] | None, *, store: Store, searching: Progress, **_: Any
    ) -> tuple[list[LayerRecord], dict[str, Any]]:
        records, trace = prune_context(model, batches or (), self, store=store, progress=searching)
        return records, {"budgets.json": {"steps": [asdict(step) for step in trace]}}


@dataclass(frozen=True)
class BudgetStep:
    """One lowered budget, and where that left the model.

    Attributes:
        layer: its number; None for the model as it came.
        budget: tokens that it remembers now; None for the model as it came.
        loss: nats per token on the held-out text.
        memory: share of the cache of the selective layers for one block, 1 without any budget.
    """

    layer: int | None
    budget: int | None
    loss: float
    memory: float


def selective_layers(config: ModelConfig) -> dict[int, Selective]:
    """The layers that have a budget to lower, by number.

    Raises:
        UserError: there is none.
    """
    specs = {i: layer.attention for i, layer in enumerate(config.layers) if isinstance(layer.attention, Selective)}
    if not specs:
        raise UserError("context pruning needs layers of attention selective, and this model has none")
    return specs


class BudgetSearch:
    """The budgets of one model's selective layers while they are lowered.

    Raises:
        UserError: a model without selective attention, no data, or a goal that asks for nothing or the impossible.
    """

    def __init__(self, model: Transformer, batches: Sequence[Batch], goal: ContextPruning) -> None:
        goal.check(model.config)
        self.specs = selective_layers(model.config)
        if not batches:
            raise UserError("the held-out data has no batch; give text that fills at least one sequence")
        self.model, self.batches, self.goal = model, batches, goal
        self.length = max(batch["tokens"].shape[1] for batch in batches)  # T
        self.budgets = {i: spec.kept(self.length) for i, spec in self.specs.items()}
        ratio, least = goal.budget_ratio, self.memory(dict.fromkeys(self.specs, min(SMALLEST, self.length)))
        if ratio is not None and ratio < least:
            raise UserError(f"budget_ratio {ratio:g} is impossible: {SMALLEST} tokens of {self.length} are {least:.3g}")
        if ratio is not None and ratio >= self.memory(self.budgets):
            raise UserError(
                f"budget_ratio {ratio:g} lowers nothing: the budgets are at {self.memory(self.budgets):.3g} already"
            )

    def run(self, store: Store | None = None, progress: Progress = lambda done, total: None) -> list[BudgetStep]:
        """Lower budgets until the goal is reached, and return every step, the model as it came first."""
        trace = [BudgetStep(**step) for step in ((store and store.load(ENTRY)) or ({}, {"trace": []}))[1]["trace"]]
        for step in trace[1:]:
            self._lower(step)
        if not trace:
            trace = [BudgetStep(None, None, self.loss(), self.memory(self.budgets))]
        while not self._reached(trace[-1]):
            tried = []
            for layer in [layer for layer, budget in self.budgets.items() if budget > SMALLEST]:
                tried.append(self._try(layer))
                progress(*self._progress(len(tried)))
            best = min(tried, key=lambda step: step.loss, default=None)
            if best is None or not self._tolerated(best, trace[0]):
                break
            self._lower(best)
            trace.append(best)
            if store is not None:
                store.save(ENTRY, {}, {"trace": [asdict(step) for step in trace]})
        if len(trace) == 1:
            raise UserError(
                f"tolerance {self.goal.tolerance:g} allows no step of {self.goal.step} tokens: the best one costs "
                f"{best.loss - trace[0].loss:.3g} nats per token"
                if best
                else "no budget can be lowered any more"
            )
        total = self._progress(0)[1]
        progress(total, total)
        return trace

    @torch.no_grad()
    def loss(self) -> float:
        """Nats per token of the model as it stands, over all targets of the batches."""
        total, count = 0.0, 0
        training = self.model.training
        self.model.eval()
        for batch in self.batches:
            targets = batch["targets"]  # (B, T)
            valid = int((targets >= 0).sum())
            output = self.model(batch["tokens"], targets=targets, documents=batch.get("documents"))
            total, count = total + float(output.loss) * valid, count + valid
        self.model.train(training)
        return total / max(1, count)

    def memory(self, budgets: dict[int, int]) -> float:
        """Share of the whole cache of a block that is left with these budgets."""
        left = sum(replace(self.specs[i], budget=budget).cache_elements(self.length) for i, budget in budgets.items())
        return left / sum(replace(spec, budget=None).cache_elements(self.length) for spec in self.specs.values())

    def _try(self, layer: int) -> BudgetStep:
        """Loss and cache size with a lower budget of this layer."""
        before, attention = self.budgets[layer], self.model.blocks[layer].attention
        budget, held = max(SMALLEST, before - self.goal.step), attention.budget
        attention.budget = budget
        loss = self.loss()
        attention.budget = held
        return BudgetStep(layer, budget, loss, self.memory(self.budgets | {layer: budget}))

    def _lower(self, step: BudgetStep) -> None:
        self.budgets[step.layer] = self.model.blocks[step.layer].attention.budget = step.budget

    def _reached(self, step: BudgetStep) -> bool:
        return self.goal.budget_ratio is not None and step.memory <= self.goal.budget_ratio

    def _tolerated(self, step: BudgetStep, first: BudgetStep) -> bool:
        return self.goal.tolerance is None or step.loss - first.loss <= self.goal.tolerance

    def _progress(self, tried: int) -> tuple[int, int]:
        """Candidates tried and the most there can be: a tolerance may end the search before."""
        full, layers = self.length * len(self.specs), len(self.specs)
        floor = SMALLEST * layers if self.goal.budget_ratio is None else full * self.goal.budget_ratio
        done = full - sum(self.budgets.values())
        total = max(done, math.ceil(full - floor))
        steps = [math.ceil(tokens / self.goal.step) for tokens in (done, total)]
        return min(steps[0] * layers + tried, steps[1] * layers), steps[1] * layers


def prune_context(
    model: Transformer,
    batches: Sequence[Batch],
    goal: ContextPruning,
    *,
    store: Store | None = None,
    progress: Progress = lambda done, total: None,
) -> tuple[list[LayerRecord], list[BudgetStep]]:
    """Give the selective layers of a model their budgets in place; `model.config` is true afterwards.

    Args:
        batches: held-out text: `tokens` (B, T), `targets` (B, T), -100 where there is none, and perhaps `documents`.
        goal: where the search ends.
        store: keeps every step, so that an interrupted search goes on.
        progress: called with (candidates tried, the most there can be).

    Returns a record for every selective layer, and the steps of the search.

    Raises:
        UserError: as `BudgetSearch`, or a tolerance that allows no step.
    """
    started = time.perf_counter()
    search = BudgetSearch(model, batches, goal)
    whole = dict(search.budgets)
    trace = search.run(store, progress)
    lowered = {layer: budget for layer, budget in search.budgets.items() if budget < whole[layer]}
    layers = list(model.config.layers)
    for i, budget in lowered.items():
        layers[i] = replace(layers[i], attention=replace(layers[i].attention, budget=budget))
    model.config = replace(model.config, layers=tuple(layers))
    seconds = (time.perf_counter() - started) / len(whole)
    requested = {"method": "context", **{name: value for name, value in asdict(goal).items() if value is not None}}
    records = []
    for i, spec in search.specs.items():
        name, shape = f"blocks.{i}.attention", ()  # no weight changes
        if i in lowered:
            before, after = _bytes(model, spec, whole[i], lowered[i])
            achieved = {"tokens_before": whole[i], "tokens_after": lowered[i]}
            achieved |= {"cache_bytes_before": before, "cache_bytes_after": after}
            records.append(LayerRecord(name, shape, requested, achieved, None, seconds))
        else:
            records.append(LayerRecord.skip(name, shape, "every step lowered another layer", requested))
    return records, trace


def _bytes(model: Transformer, spec: Selective, *tokens: int) -> list[int]:
    """Bytes of the layer's cache when it holds so many tokens."""
    size = next(model.parameters()).element_size()
    return [size * spec.cache_elements(count) + 4 * spec.cache_singles(count) for count in tokens]

"""Structured pruning: smaller tensors without some neurons, query heads, key/value groups and experts.

    neurons  rows of gate and up, columns of down
    groups   a key/value head with all its query heads: rows of q, k, v, columns of o; the cache shrinks with them
    heads    as many query heads in every group, keys and values stay; without shared keys a head is a group
    experts  whole experts of a mixture with their rows of the router; a token still has as many experts as before

Every expert of a mixture loses as many neurons, those of its own that matter least; a shared expert keeps its own. What
experts that are never chosen leave behind computes the same, except where a router weighs by a softmax over all of them
(`weights: probability`): there the weights of those that stay grow.

One block at a time: activations come from the pruned blocks before it. The result is an ordinary model and config.

F neurons, E experts (1 where there are none), G key/value groups, R query heads of a group.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibration.coverage import left_out
from compress.calibration.experts import apart, has_experts
from compress.calibration.records import LayerRecord
from compress.calibration.sequential import Batch, BlockStep, Method, Progress, calibrate_sequentially
from compress.calibration.statistics import Moments, StatisticType
from compress.calibration.store import Store
from compress.pruning.method import METHODS
from compress.pruning.patterns import smallest
from compress.pruning.sparsify import refuse_packed
from compress.pruning.structured import surgery
from compress.pruning.structured.allocation import ALLOCATIONS, Allocation
from compress.pruning.structured.importance import IMPORTANCES, Importance
from compress.pruning.structured.plan import (
    KeptCounts,
    StructuredConfig,
    has_heads,
    networks,
    plan,
    resolve_heads,
)
from models.attention.full import FullAttention
from models.feedforward import DenseFeedForward
from models.registry import Names

UNITS = {
    "gate": "neurons",
    "up": "neurons",
    "down": "neurons",
    "q": "heads",
    "o": "heads",
    "k": "groups",
    "v": "groups",
}


# where a block has the bias that its config calls `out_bias`
OUT_BIASES = {
    "feedforward": ("feedforward.down.bias", "feedforward.experts.0.down.bias"),
    "attention": ("attention.o.bias",),
}


class StructuredPruning(Method):
    """The method for the driver: shrinks one block after the other."""

    def __init__(self, cut: StructuredConfig) -> None:
        self.cut, self.importance = cut, cut.criterion
        self.keep: dict[int, KeptCounts] = {}

    def prepare(self, model: nn.Module, batches: Sequence[Batch] | None) -> None:
        """Decide how much every block keeps; raises UserError where nothing or everything would go."""
        refuse_packed(model)
        self.model = model
        self.cut = resolve_heads(self.cut, model)
        self.importance = self.importance.prepare(model, batches)
        dense: list[dict[int, dict[str, Tensor]]] = []  # scores of the model before pruning, when they are asked for

        def scores(target: str) -> dict[int, Tensor]:
            if not dense:
                scoring = _Scoring(self)
                calibrate_sequentially(model, scoring, batches)
                dense.append(scoring.scores)
            return {index: units[target] for index, units in dense[0].items() if target in units}

        self.keep = plan(model, self.cut, scores)

    def statistic(self, name: str, module: nn.Module) -> StatisticType | None:
        """Activations at the inputs of `down` and `o`, where the criterion or the compensation needs them.

        Experts are scored by what the driver counts beside the statistics: it does where one is asked for.
        """
        adds, has = self.cut.compensation == "add", isinstance(module, nn.Linear) and module.bias is not None
        mean = Moments if adds or (self.cut.compensation == "existing" and has) else None
        parent, _, child = name.rpartition(".")
        if child == "down" and "neurons" in self.cut.ratios:
            return self.importance.neuron_statistic() or mean
        if child == "down" and "experts" in self.cut.ratios and ".experts." in name:
            return self.importance.neuron_statistic()
        if child == "o" and self.cut.ratios.keys() & {"heads", "groups"}:
            attention = self.model.get_submodule(parent)
            return self.importance.head_statistic(attention) or mean if isinstance(attention, FullAttention) else None
        return None

    def scores(self, step: BlockStep) -> dict[str, Tensor]:
        """Scores of a block's units: `neurons` (E, F), `groups` (G,), `heads` (G, R), `experts` (E,); of targets."""
        block, index = step.module, step.index
        found = {}
        if "neurons" in self.cut.ratios and (own := networks(block)):
            each = []
            for number, (name, network) in enumerate(own.items()):
                statistic = step.statistics.get(f"{step.prefixes[0]}.{name}.down")
                expert = number if has_experts(block) else None
                each.append(self.importance.neurons(index, network, statistic, expert))
            found["neurons"] = torch.stack(each)
        if "experts" in self.cut.ratios and has_experts(block):
            found["experts"] = self.importance.experts(index, block.feedforward.experts, step.load)
        if self.cut.ratios.keys() & {"heads", "groups"} and has_heads(block):
            statistic = step.statistics.get(f"{step.prefixes[0]}.attention.o")
            found["groups"] = self.importance.groups(index, block.attention, statistic)
            found["heads"] = self.importance.heads(index, block.attention, statistic)
        return found

    def compress_block(self, step: BlockStep) -> list[LayerRecord]:
        """Cut the block's units, put the smaller block in its place, keep the chosen indexes for a resume."""
        started = time.perf_counter()
        if step.module is step.model:
            reason = "embedding and head keep the width of the residual stream"
            records = [
                LayerRecord.skip(name, tuple(m.weight.shape), reason, self._requested(None))
                for name, m in step.linears.items()
            ]
        else:
            before = {name: _Figures(step.model, name) for name in step.linears}
            notes = self._cut(step)
            seconds = (time.perf_counter() - started) / max(1, len(before))
            records = [self._record(step, old, notes, seconds) for old in before.values()]
        for record in records:
            step.report(record)
        return records

    def _cut(self, step: BlockStep) -> list[str]:
        block, keep = step.module, self.keep[step.index]
        scores, notes = self.scores(step), []
        if keep.neurons is not None:
            dropped = smallest(scores["neurons"], scores["neurons"].shape[1] - keep.neurons)  # (E, F)
            step.extras["neurons"] = torch.stack([(~row).nonzero().flatten() for row in dropped])  # (E, F')
            for (name, network), gone, stay in zip(
                networks(block).items(), dropped, step.extras["neurons"], strict=True
            ):
                notes += self._compensate(step, f"{name}.down", gone)
                surgery.cut_neurons(network, stay)
        if keep.groups is not None or keep.heads is not None:
            step.extras["heads"] = _choose_heads(scores["groups"], scores["heads"], keep)  # (G', R')
            width = block.attention.head_width
            dropped = torch.ones(block.attention.heads, dtype=torch.bool, device=scores["heads"].device)
            dropped[step.extras["heads"].flatten()] = False
            notes += self._compensate(step, "attention.o", dropped.repeat_interleave(width))
            surgery.cut_heads(block.attention, step.extras["heads"])
        state = block.state_dict()
        if keep.experts is not None:
            dropped = smallest(scores["experts"][None], len(scores["experts"]) - keep.experts)[0]  # (E,)
            step.extras["experts"] = (~dropped).nonzero().flatten()  # (E',)
            state = surgery.take_experts(state, step.extras["experts"])
        self._adopt(step, state)
        return notes

    def _compensate(self, step: BlockStep, child: str, removed: Tensor) -> list[str]:
        if self.cut.compensation == "none" or not removed.any():
            return []
        linear, statistic = step.module.get_submodule(child), step.statistics.get(f"{step.prefixes[0]}.{child}")
        had = linear.bias is not None
        if not had and self.cut.compensation == "existing":
            return []
        mean = torch.zeros_like(removed, dtype=torch.float32) if statistic is None else statistic.mean()  # None: unused
        surgery.compensate(linear, removed, mean)
        return [] if had else [f"{child}: a bias was added"]

    def _adopt(self, step: BlockStep, state: dict[str, Tensor]) -> None:
        """Put a block of the new config in place, with these tensors under their names in the block."""
        neurons, heads, experts = (step.extras.get(name) for name in ("neurons", "heads", "experts"))
        layer = surgery.shrunk(
            step.model.config.layers[step.index],
            None if neurons is None else neurons.shape[1],
            None if heads is None else tuple(heads.shape),
            None if experts is None else len(experts),
            {name: any(one in state for one in biases) for name, biases in OUT_BIASES.items()},
        )
        surgery.adopt(step.model, step.index, layer, state)

    def restore_block(self, step: BlockStep, state: dict[str, Tensor], forms: dict[str, dict[str, Any]]) -> None:
        """Bring back a block of an earlier run; the shapes follow from the indexes that it kept."""
        if step.module is step.model:
            super().restore_block(step, state, forms)
            return
        device, prefix = next(step.model.parameters()).device, step.prefixes[0] + "."
        self._adopt(step, {name.removeprefix(prefix): tensor.to(device) for name, tensor in state.items()})

    def _requested(self, ratio: float | None) -> dict[str, Any]:
        asked = {"method": "structured", "criterion": self.importance.kind, "allocation": self.cut.allocation.kind}
        if ratio is None:
            return {**asked, "targets": sorted(self.cut.ratios)}
        return {**asked, "targets": sorted(self.cut.ratios), "ratio": ratio}

    def _record(self, step: BlockStep, old: "_Figures", notes: list[str], seconds: float) -> LayerRecord:
        keep, stay = self.keep[step.index], step.extras.get("experts")
        if stay is not None and old.expert is not None:
            return self._expert_record(step.model, old, stay.tolist(), notes, seconds)
        return self._unit_record(step.model, keep, old, old.name, notes, seconds)

    def _expert_record(
        self, model: nn.Module, old: "_Figures", stay: list[int], notes: list[str], seconds: float
    ) -> LayerRecord:
        """The record of an expert's map where experts went: what became of its own neurons, if it is still there."""
        number, count = old.expert, old.experts
        achieved = {"experts": [count, len(stay)]}
        if number not in stay:
            requested = self._requested(self.cut.ratios["experts"])
            achieved |= {"shape": [0, 0], "error_of": "weights"}
            note = f"expert {number} was removed"
            return LayerRecord(old.name, old.shape, requested, achieved, 1.0, seconds, note)
        name = old.name.replace(f".experts.{number}.", f".experts.{stay.index(number)}.")
        note = f"it is expert {stay.index(number)} of {len(stay)} now"
        if "neurons" not in self.cut.ratios:
            requested = self._requested(self.cut.ratios["experts"])
            achieved |= {"shape": list(old.shape), "error_of": "weights"}
            return LayerRecord(old.name, old.shape, requested, achieved, 0.0, seconds, note)
        record = self._unit_record(model, KeptCounts(), old, name, notes, seconds)
        text = "; ".join(filter(None, (record.note, note)))
        return replace(record, achieved={**record.achieved, **achieved}, note=text)

    def _unit_record(
        self, model: nn.Module, keep: KeptCounts, old: "_Figures", name: str, notes: list[str], seconds: float
    ) -> LayerRecord:
        """The record of a map that has units of one kind and is called `name` now."""
        ratio = self.cut.expected(old.unit) if old.unit else None
        requested = self._requested(ratio)
        new = _Figures(model, name)
        if ratio is None or (old.unit == "heads" and keep.heads is None and keep.groups is None):
            return LayerRecord.skip(old.name, old.shape, self._reason(old), requested)
        achieved: dict[str, Any] = {"ratio": 1.0 - new.count / old.count, old.unit: [old.count, new.count]}
        achieved |= {"shape": list(new.shape), "error_of": "weights"}
        if old.unit == "groups":
            achieved["cache_bytes_per_token"] = [old.cache_bytes, new.cache_bytes]
        said = [note.split(": ", 1)[1] for note in notes if old.name.endswith(note.split(": ", 1)[0])]
        if old.unit == "neurons" and abs(achieved["ratio"] - ratio) * old.count > 0.5:
            said.append(f"rounded to a multiple of {self.cut.round_to}" if self.cut.round_to > 1 else "ranked globally")
        elif new.count == old.count:
            said.append(f"nothing removed: the ratio rounds to none of {old.count} {old.unit}")
        error = max(0.0, 1.0 - new.energy / old.energy) if old.energy else 0.0
        return LayerRecord(old.name, old.shape, requested, achieved, error, seconds, "; ".join(said))

    def _reason(self, old: "_Figures") -> str:
        targets = ", ".join(sorted(self.cut.ratios))
        if ".shared." in old.name:
            return "the shared expert of a mixture keeps its neurons"
        if old.unit is None:
            return "no neurons, heads or groups that this method knows"
        return f"not a target: {targets} leave {old.unit} of this layer alone"


class _Figures:
    """One linear layer as it stands, before or after the cut."""

    def __init__(self, model: nn.Module, name: str) -> None:
        parent, _, child = name.rpartition(".")
        owner, linear = model.get_submodule(parent), model.get_submodule(name)
        self.name, self.shape = name, tuple(linear.weight.shape)
        self.energy = float(linear.weight.detach().float().square().sum())
        known = isinstance(owner, DenseFeedForward | FullAttention)
        self.unit = UNITS.get(child) if known and ".shared." not in name else None
        self.expert, self.experts = None, 0
        if ".experts." in name:
            mixture, _, rest = parent.partition(".experts.")
            self.expert, self.experts = int(rest), len(model.get_submodule(f"{mixture}.experts"))
        self.count, self.cache_bytes = 0, 0
        if self.unit == "neurons":
            self.count = owner.down.in_features
        elif self.unit is not None:
            self.count = owner.heads if self.unit == "heads" else owner.kv_heads
            self.cache_bytes = owner.kv_heads * owner.head_width * linear.weight.element_size()


class _Scoring(Method):
    """A calibration of the dense model that scores every unit and changes nothing."""

    def __init__(self, method: StructuredPruning) -> None:
        self.method = method
        self.scores: dict[int, dict[str, Tensor]] = {}

    def statistic(self, name: str, module: nn.Module) -> StatisticType | None:
        return self.method.statistic(name, module)

    def compress_block(self, step: BlockStep) -> list[LayerRecord]:
        if step.module is not step.model:
            scores = self.method.scores(step)
            for name in scores.keys() & {"heads", "neurons"}:
                # a unit is one query head of every group, or one neuron of every expert: the k-th weakest of each
                alone = len(scores[name]) == 1
                scores[name] = scores[name][0] if alone else scores[name].sort(dim=1).values.sum(0)
            self.scores[step.index] = scores
        return []


def _choose_heads(groups: Tensor, heads: Tensor, keep: KeptCounts) -> Tensor:
    """Query heads that stay (G', R'), from scores of groups (G,) and of heads (G, R)."""
    count, per_group = heads.shape
    if keep.groups is not None:
        stay = (~smallest(groups[None], count - keep.groups)[0]).nonzero().flatten()  # (G',)
    else:
        stay = torch.arange(count, device=heads.device)
    keep_heads = per_group if keep.heads is None else keep.heads
    inside = ~smallest(heads[stay], per_group - keep_heads)  # (G', R)
    numbers = torch.arange(count * per_group, device=heads.device).view(count, per_group)[stay]  # (G', R)
    return numbers[inside].view(len(stay), keep_heads)


def prune_structured(
    model: nn.Module,
    targets: Sequence[str],
    ratio: float | Mapping[str, float],
    criterion: Importance | str = "variance",
    batches: Sequence[Batch] | None = None,
    *,
    allocation: Allocation | str = "uniform",
    round_to: int = 1,
    compensation: str = "existing",
    store: Store | None = None,
    progress: Callable[[Progress], None] | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
) -> list[LayerRecord]:
    """Shrink a `Transformer` in place; `model.config` is true afterwards.

    Args:
        targets: some of `neurons`, `heads`, `groups`, `experts`.
        ratio: fraction of the units removed, one for all targets or one for each.
        criterion: `variance`, `norm`, `magnitude`, `taylor` (needs `targets` in the batches), or an object.
        batches: calibration tokens; `magnitude` without compensation needs none.
        allocation: `uniform` or `global`.
        round_to: numbers of neurons that are kept are rounded to a multiple of this.
        compensation: which output biases take over the mean of what was removed: `none`, `existing`, or `add`ed ones.
        store, progress, device, autocast: see `compress.calibration.sequential.calibrate_sequentially`.

    Returns a record for every matrix, with the ratio asked for and achieved, and the cache bytes per token.

    Raises:
        UserError: an unknown target or criterion, a ratio that leaves nothing or removes nothing, a quantized model,
            missing calibration data.
    """
    names = Names().parse(targets, "targets")
    scores, share = IMPORTANCES.parse(criterion, "criterion"), ALLOCATIONS.parse(allocation, "allocation")
    method = Structured(names, ratio, scores, share, round_to, compensation)
    return method.prune(model, batches, store=store, progress=progress, device=device, autocast=autocast)[0]


@METHODS.register("structured")
@dataclass(frozen=True)
class Structured(StructuredConfig):
    """Structured pruning: neurons, heads, key/value groups or experts are taken out of the tensors."""

    def title(self) -> str:
        shares = (f"{ratio:.0%} of the {target}" for target, ratio in self.ratios.items())
        return f"structured pruning, {', '.join(shares)}"

    def prune(
        self, model: nn.Module, batches: Sequence[Batch] | None, *, searching: Any = None, **how: Any
    ) -> tuple[list[LayerRecord], dict[str, Any]]:
        with apart(model):
            records = calibrate_sequentially(model, StructuredPruning(self), batches, **how)
            return records + left_out(model, "dense"), {}

"""Plan of structured pruning: the ratios, and the number of units of every kind that each block keeps."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal, get_args

from torch import Tensor, nn

from compress.calibration.experts import has_experts
from compress.pruning.method import PruningMethod
from compress.pruning.structured.allocation import ALLOCATIONS, Allocation, Uniform
from compress.pruning.structured.importance import IMPORTANCES, Importance, Variance, networks
from models.attention.full import Full, FullAttention
from models.config import ModelConfig
from models.errors import UserError, did_you_mean
from models.registry import Names

TARGETS = ("neurons", "heads", "groups", "experts")
Compensation = Literal["none", "existing", "add"]


@dataclass(frozen=True)
class StructuredConfig(PruningMethod):
    """Config of structured pruning.

    Args:
        targets: what to take out: neurons (of each expert as many), heads, groups (key/value groups with their heads),
            experts.
        ratio: share of the targets to take out, above 0 and below 1; or one for each, as in {neurons: 0.25}.
        criterion: which of them go.
        allocation: how much every layer loses.
        round_to: the number of neurons that stay is a multiple of this.
        compensation: whether an output bias takes over the mean of what goes: none, existing where there is one, or add
            one.
    """

    targets: tuple = field(default=("neurons",), metadata={"registry": Names()})
    ratio: float | dict[str, float] = 0.25
    criterion: Importance = field(default=Variance(), metadata={"registry": IMPORTANCES})
    allocation: Allocation = field(default=Uniform(), metadata={"registry": ALLOCATIONS})
    round_to: int = 8
    compensation: Compensation = "existing"

    def __post_init__(self) -> None:
        for target, ratio in self.ratios.items():
            if target not in TARGETS:
                raise UserError(f"unknown target '{target}'; structured pruning takes {', '.join(TARGETS)}")
            if not 0.0 < ratio < 1.0:
                raise UserError(
                    f"ratio {ratio:g} of {target} is impossible: it is the fraction removed, between 0 and 1"
                )
        if not self.ratios:
            raise UserError(f"targets: name at least one of {', '.join(TARGETS)}")
        if self.round_to < 1:
            raise UserError(f"round_to is {self.round_to}; it must be at least 1")
        if self.compensation not in (known := get_args(Compensation)):
            raise UserError(f"unknown compensation '{self.compensation}'{did_you_mean(self.compensation, known)}")

    @cached_property
    def ratios(self) -> dict[str, float]:
        """target -> fraction of its units that is removed."""
        if not isinstance(self.ratio, Mapping):
            return dict.fromkeys(self.targets, float(self.ratio))
        if set(self.ratio) != set(self.targets):
            given, targets = ", ".join(self.ratio) or "nothing", ", ".join(self.targets)
            raise UserError(f"ratio is given for {given}, but the targets are {targets}")
        return {target: float(self.ratio[target]) for target in self.targets}

    def expected(self, unit: str) -> float | None:
        """The fraction of a linear layer's units that is asked to go; query heads go with their groups as well."""
        if unit != "heads":
            return self.ratios.get(unit)
        if not self.ratios.keys() & {"heads", "groups"}:
            return None
        return 1.0 - (1.0 - self.ratios.get("heads", 0.0)) * (1.0 - self.ratios.get("groups", 0.0))


@dataclass(frozen=True)
class KeptCounts:
    """Kept counts of one block: neurons (of each expert), key/value groups, query heads of each group, experts.

    None where nothing is cut.
    """

    neurons: int | None = None
    groups: int | None = None
    heads: int | None = None
    experts: int | None = None


def units_of(model: nn.Module) -> dict[str, dict[int, int]]:
    """target -> block -> how many units it has; `heads` counts query heads of a group, where there are several."""
    feedforwards = {i: networks(block) for i, block in enumerate(model.blocks)}
    attentions = {i: block.attention for i, block in enumerate(model.blocks) if has_heads(block)}
    per_group = {index: attention.heads // attention.kv_heads for index, attention in attentions.items()}
    return {
        "neurons": {i: next(iter(own.values())).down.in_features for i, own in feedforwards.items() if own},
        "groups": {index: attention.kv_heads for index, attention in attentions.items()},
        "heads": {index: count for index, count in per_group.items() if count > 1},
        "experts": {i: len(block.feedforward.experts) for i, block in enumerate(model.blocks) if has_experts(block)},
    }


def has_heads(block: nn.Module) -> bool:
    """Whether the block has an attention whose heads can be cut."""
    return isinstance(block.attention, FullAttention)


def resolve_heads(cut: StructuredConfig, model: nn.Module) -> StructuredConfig:
    """The config with `groups` for `heads` where no block shares keys between query heads: a head is a group there."""
    units = units_of(model)
    if "heads" not in cut.ratios or units["heads"] or not units["groups"]:
        return cut
    ratios = {"groups" if target == "heads" else target: ratio for target, ratio in cut.ratios.items()}
    ratios |= {target: ratio for target, ratio in cut.ratios.items() if target == "groups"}
    return replace(cut, targets=tuple(ratios), ratio=ratios)


def plan(
    model: nn.Module, cut: StructuredConfig, scores: Callable[[str], Mapping[int, Tensor]]
) -> dict[int, KeptCounts]:
    """Kept counts of every block; `scores(target)` gives scores of each block's units, where the allocation needs them.

    Raises:
        UserError: a target that the model has none of, a ratio that leaves a block nothing, or that removes nothing.
    """
    units = units_of(model)
    kept: dict[str, dict[int, int]] = {}
    for target, ratio in cut.ratios.items():
        counts = units[target]
        if target in ("heads", "groups"):
            _require_free_heads(model.config, counts or range(len(model.blocks)))
        if not counts:
            raise UserError(f"target '{target}': no block of this model has any")
        multiple = cut.round_to if target == "neurons" else 1
        kept[target] = cut.allocation.keep(counts, ratio, multiple, partial(scores, target))
        if target == "experts":
            kept[target] = _enough_experts(model.config, cut, counts, kept[target])
        _require_possible(target, ratio, counts, kept[target], multiple)
    return {
        index: KeptCounts(**{target: blocks[index] for target, blocks in kept.items() if index in blocks})
        for index in range(len(model.blocks))
    }


def _require_free_heads(config: ModelConfig, blocks: Iterable[int]) -> None:
    """Refuse to cut heads of these blocks that have numbers of their own outside the maps that are cut."""
    for index in blocks:
        attention = config.layers[index].attention
        if attention is not None and (why := _bound(attention, config)):
            raise UserError(f"the heads of block {index} cannot be cut: {why}; cut neurons instead")


def _bound(attention: Any, config: ModelConfig) -> str | None:
    """Why the heads of this attention are not free to go, or None."""
    position = attention.position or config.position if attention.position_types else None
    if position is not None and position.per_head:
        return f"{position.kind} positions belong to each of them"
    if isinstance(attention, Full) and attention.sink:
        return "an attention sink belongs to each of them"
    return None if attention.heads_prunable else attention.heads_because


def _enough_experts(
    config: ModelConfig, cut: StructuredConfig, counts: dict[int, int], kept: dict[int, int]
) -> dict[int, int]:
    """Experts kept, never fewer than a token has; refuses a ratio of each block's that would leave fewer."""
    for index, count in counts.items():
        spec = config.layers[index].feedforward
        least = max(2, spec.top_k)  # one expert alone is no mixture
        if spec.router.groups > 1:
            raise UserError(f"the experts of block {index} cannot be cut: its router chooses among groups of them")
        if kept[index] < least and cut.allocation.kind == "uniform":
            raise UserError(
                f"ratio {cut.ratios['experts']:g} leaves {kept[index]} of the {count} experts of block {index}, and "
                f"{least} must stay: a token has {spec.top_k} of them"
            )
    return {i: max(k, 2, config.layers[i].feedforward.top_k) for i, k in kept.items()}


def _require_possible(target: str, ratio: float, counts: dict[int, int], kept: dict[int, int], multiple: int) -> None:
    unit = "query heads of a group" if target == "heads" else target
    for index, count in counts.items():
        if kept[index] == 0:
            raise UserError(
                f"ratio {ratio:g} is impossible: it leaves none of the {count} {unit} of block {index}; "
                f"below {(count - 0.5) / count:.3g} at least one stays"
            )
    if kept == counts:
        count = max(counts.values())
        raise UserError(
            f"ratio {ratio:g} removes nothing: it rounds to none of the {count} {unit}"
            + (f" with round_to {multiple}" if multiple > 1 else f"; {1 / count:.3g} removes one")
        )

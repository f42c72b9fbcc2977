"""Unstructured and N:M pruning of a whole model: single weights are set to zero in place.

A criterion gives scores, which a pattern turns into a mask; a solver gives the mask and new values of what stays. An
allocation says how much each layer gives up, a refinement improves each mask.
"""

import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from compress.calibration.coverage import left_out
from compress.calibration.experts import apart
from compress.calibration.optimal_brain_surgeon import output_error
from compress.calibration.records import LayerRecord
from compress.calibration.sequential import Batch, LayerMethod, Progress, calibrate_sequentially, steps_of
from compress.calibration.statistics import Hessian, Statistic, StatisticType
from compress.calibration.store import Store
from compress.pruning.allocations.allocation import LAYER_SPARSITIES, SparsityAllocation
from compress.pruning.allocations.uniform import UniformSparsity
from compress.pruning.method import METHODS, PruningMethod
from compress.pruning.patterns import PATTERNS, Pattern, Scope, Unstructured, global_masks
from compress.pruning.solvers.refinement import REFINEMENTS, Refinement
from models.config import ModelConfig
from models.errors import UserError
from models.registry import Names
from models.weight_formats import described

ENDS = ("embedding", "head")
ENTRY = "sparsities"  # under which those of the layers are stored


class Pruned(NamedTuple):
    """A pruned weight (out, in), its mask (out, in) with True = kept, and what there is to say about it."""

    weight: Tensor
    mask: Tensor
    note: str = ""


@dataclass(frozen=True)
class WeightPruning(PruningMethod):
    """Unstructured and N:M pruning: single weights of the linear layers are set to zero, shapes stay.

    Args:
        sparsity: share of the weights to set to zero; the pattern's, where it is not given.
        pattern: which weights are compared with each other.
        scope: that of the pattern, where it is given.
        allocation: how the sparsity is shared among the layers.
        refine: what improves the mask of a layer once it is chosen.
        include: which of embedding and head to prune as well.

    Attributes:
        comparable: whether scores of different layers are on one scale, which a global pattern needs.
        updates: whether the weights that stay change.
        label: the name in titles; by default the kind with a capital letter.
    """

    comparable: ClassVar[bool] = False
    updates: ClassVar[bool] = False
    label: ClassVar[str] = ""

    sparsity: float | None = None
    pattern: Pattern = field(default=Unstructured(), metadata={"registry": PATTERNS})
    scope: Scope | None = None
    allocation: SparsityAllocation = field(default=UniformSparsity(), metadata={"registry": LAYER_SPARSITIES})
    refine: Refinement | None = field(default=None, metadata={"registry": REFINEMENTS})
    include: tuple = field(default=(), metadata={"registry": Names()})

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", self.pattern.given(self.sparsity, self.scope))
        for name in ("sparsity", "scope"):  # they stand in the pattern now
            object.__setattr__(self, name, None)

    def statistic(self) -> StatisticType | None:
        """What to gather at the input of a linear layer; None: the method needs no data."""
        return None

    @property
    def calibrated(self) -> bool:
        return self.statistic() is not None or self.refine is not None or self.allocation.calibrated

    @abstractmethod
    def solve(self, weight: Tensor, statistic: Statistic | None, pattern: Pattern) -> Pruned | None:
        """Prune a weight (out, in) fp32 of a layer; None where it cannot be done."""

    def title(self) -> str:
        pattern = self.pattern
        share = f"{pattern.sparsity:.0%}" if isinstance(pattern, Unstructured) else pattern.spec()["pattern"]
        how = [self.label or self.kind.capitalize(), share]
        if self.allocation != UniformSparsity():
            how.append(f"allocation {self.allocation.kind}")
        return ", ".join(how + ([f"refined by {self.refine.kind}"] if self.refine else []))

    def check(self, config: ModelConfig) -> None:
        Sparsify(self, self.pattern, self.include)

    def prune(
        self, model: nn.Module, batches: Sequence[Batch] | None, *, searching: Callable[[int, int], None], **how: Any
    ) -> tuple[list[LayerRecord], dict[str, Any]]:
        return sparsify(model, self, self.pattern, batches, include=self.include, **how), {}


@dataclass(frozen=True)
class Criterion(WeightPruning):
    """Criterion of unstructured and N:M pruning: a score for every weight; those of the smallest are set to zero."""

    @abstractmethod
    def scores(self, weight: Tensor, statistic: Statistic | None) -> Tensor:
        """Scores (out, in) fp32, at least 0, of the weight (out, in)."""

    def solve(self, weight: Tensor, statistic: Statistic | None, pattern: Pattern) -> Pruned:
        mask = pattern.mask(self.scores(weight, statistic))
        return Pruned(weight.masked_fill(~mask, 0.0), mask)


class _Gathered:
    """The statistic of a method, and the Hessian of the same inputs that its refinement needs."""

    def __init__(self, own: StatisticType | None, width: int, device: torch.device) -> None:
        self.hessian = Hessian(width, device)
        self.own = own(width, device) if own is not None and own is not Hessian else self.hessian

    @property
    def tokens(self) -> int:
        return self.hessian.tokens

    def update(self, x: Tensor) -> None:
        self.hessian.update(x)
        if self.own is not self.hessian:
            self.own.update(x)

    def finite(self) -> bool:
        return self.hessian.finite() and self.own.finite()


class Sparsify(LayerMethod):
    """Zeroes the weights that the pattern names; shapes and stored bytes stay as they were.

    Args:
        method: chooses them.
        pattern: what is asked for.
        include: which of `embedding` and `head` are pruned as well; by default neither.
        store: keeps the sparsities of the layers, so that an interrupted run goes on with the same.
    """

    def __init__(
        self, method: WeightPruning, pattern: Pattern, include: Collection[str] = (), store: Store | None = None
    ) -> None:
        self.method, self.pattern, self.include, self.store = method, pattern, tuple(include), store
        self.patterns: dict[str, Pattern] = {}  # of layers, where they differ
        self._kind = method.statistic()
        if method.refine is not None:
            self._kind = partial(_Gathered, self._kind)  # one object: layers that read one input share a statistic
        self._global: dict[str, Tensor] | None = None
        if pattern.scope == "global" and not method.comparable:
            raise UserError(
                f"scores of '{method.kind}' cannot be compared between layers, so scope 'global' has no meaning "
                "for it; use scope 'row' or 'layer', or method 'magnitude'"
            )
        if method.allocation != UniformSparsity() and not pattern.allocated:
            shown = pattern.spec()["pattern"] if pattern.scope == "group" else f"of scope {pattern.scope}"
            raise UserError(
                f"allocation {method.allocation.kind} gives each layer a sparsity of its own, and a pattern {shown} "
                "leaves it no choice; use allocation uniform, or pattern unstructured with scope row or layer"
            )
        for name in self.include:
            if name not in ENDS:
                raise UserError(f"include names '{name}'; it takes {' and '.join(ENDS)}, the blocks are always pruned")

    def prepare(self, model: nn.Module, batches: Sequence[Batch] | None) -> None:
        refuse_packed(model)
        self._tied = model.head is None
        if "head" in self.include and self._tied:
            raise UserError("include names 'head', but this model's head is its embedding; include 'embedding'")
        if "embedding" in self.include and not self._tied and self._kind is not None:
            raise UserError(
                f"'{self.method.kind}' weighs inputs, and an embedding that is no head has none; use 'magnitude'"
            )
        chosen = {
            name: module
            for step in steps_of(model)
            for name, module in step.linears.items()
            if self._reason(name) is None
        }
        shapes = {name: tuple(module.weight.shape) for name, module in chosen.items()}
        if self.method.allocation != UniformSparsity():
            self.patterns = {n: self.pattern.given(s) for n, s in self._sparsities(model, shapes, batches).items()}
        for name, shape in shapes.items():
            self.patterns.get(name, self.pattern).check(name, shape)
        if self.pattern.scope == "global":
            scores = {name: self.method.scores(module.weight, None) for name, module in chosen.items()}
            self._global = global_masks(scores, self.pattern.sparsity)

    def _sparsities(
        self, model: nn.Module, shapes: dict[str, tuple[int, int]], batches: Sequence[Batch] | None
    ) -> dict[str, float]:
        """The sparsity of each layer, as an interrupted run has left it."""
        kept = self.store.load(ENTRY) if self.store is not None else None
        if kept is not None:
            return kept[1]
        found = self.method.allocation.sparsities(model, shapes, self.pattern.sparsity, batches)
        if self.store is not None:
            self.store.save(ENTRY, {}, found)
        return found

    def statistic(self, name: str, module: nn.Module) -> StatisticType | None:
        return self._kind if self._reason(name) is None else None

    def compress(self, name: str, module: nn.Module, statistic: Statistic | None) -> tuple[None, LayerRecord]:
        started = time.perf_counter()
        weight, pattern = module.weight.data, self.patterns.get(name, self.pattern)  # (out, in)
        requested = {"method": self.method.kind, **pattern.spec()}
        reason = self._reason(name)
        if reason is not None:
            return None, LayerRecord.skip(name, tuple(weight.shape), reason, requested)
        before, zeros = weight.float(), int((weight == 0).sum())  # a copy, unless it is fp32 already
        seen = statistic is not None and statistic.tokens > 0
        pruned, hessian = self._pruned(name, before, statistic if seen else None, pattern)
        notes = [pruned.note] if pruned.note else []
        new = pruned.weight.to(weight.dtype)
        error = output_error(before, new.float(), hessian) if hessian is not None else _removed_energy(before, new)
        after = int((new == 0).sum())
        if after > int((~pruned.mask).sum()):
            notes.append(f"{zeros} weights were zero before, more than the pattern asks for")
        weight.copy_(new)
        of = "weights" if hessian is None else "outputs"
        achieved = {"sparsity": after / weight.numel(), "zeros": after, "error_of": of}
        seconds = time.perf_counter() - started
        record = LayerRecord(name, tuple(weight.shape), requested, achieved, error, seconds, "; ".join(notes))
        return None, record

    def _pruned(
        self, name: str, weight: Tensor, statistic: Statistic | None, pattern: Pattern
    ) -> tuple[Pruned, Tensor | None]:
        """The pruned weight, and the Hessian of its inputs where it was gathered."""
        if self._kind is not None and statistic is None:
            return _by_magnitude(weight, pattern, "no calibration token reached this layer: pruned by magnitude"), None
        own, hessian = (statistic.own, statistic.hessian) if isinstance(statistic, _Gathered) else (statistic, None)
        if isinstance(own, Hessian):
            hessian = own
        gram = None if hessian is None else hessian.matrix()
        if self._global is not None:
            mask = self._global[name].to(weight.device)
            pruned = Pruned(weight.masked_fill(~mask, 0.0), mask)
        else:
            pruned = self.method.solve(weight, own, pattern)
        if pruned is None:
            why = "the Hessian could not be factorised at any damping: pruned by magnitude"
            return _by_magnitude(weight, pattern, why), gram
        if self.method.refine is not None:
            pruned = self._refined(weight, pruned, gram, pattern)
        return pruned, gram

    def _refined(self, weight: Tensor, pruned: Pruned, gram: Tensor, pattern: Pattern) -> Pruned:
        new = self.method.refine.refine(weight, pruned.weight, pruned.mask, gram, pattern.span, self.method.updates)
        errors = [output_error(weight, one, gram) for one in (pruned.weight, new[0])]
        note = f"{self.method.refine.kind}: error of the outputs {errors[0]:.4g} before, {errors[1]:.4g} after"
        return Pruned(*new, "; ".join(filter(None, (pruned.note, note))))

    def _reason(self, name: str) -> str | None:
        """Why a layer is left alone, or None."""
        if name not in ENDS or name in self.include:
            return None
        what = "embedding and head" if name == "embedding" and self._tied else name
        return f"{what} is left dense unless include names it"


def sparsify(
    model: nn.Module,
    method: WeightPruning | str,
    pattern: Pattern,
    batches: Sequence[Batch] | None = None,
    *,
    include: Collection[str] = (),
    store: Store | None = None,
    progress: Callable[[Progress], None] | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
) -> list[LayerRecord]:
    """Prune a `Transformer` in place, one block at a time, each seeing the outputs of the pruned blocks before it.

    Args:
        method: `magnitude`, `wanda`, `sparsegpt`, or an object; how it allocates and refines is its own.
        pattern: such as `Unstructured(0.5)`.
        batches: calibration tokens for a method that looks at data.
        include: which of `embedding` and `head` are pruned as well.
        store, progress, device, autocast: see `compress.calibration.sequential.calibrate_sequentially`.

    Returns a record for every matrix, those left alone with their reason. The mask is the zeros of the weights:
    `compress.pruning.masks.masks_of` recovers it.

    Raises:
        UserError: a pattern that a layer cannot take, a global scope for scores that are not comparable, a quantized
            model, missing calibration data.
    """
    sparsifying = Sparsify(METHODS.parse(method, "method"), pattern, include, store)
    with apart(model):
        records = calibrate_sequentially(
            model, sparsifying, batches, store=store, progress=progress, device=device, autocast=autocast
        )
        return records + left_out(model, "dense")


def refuse_packed(model: nn.Module) -> None:
    """Raise `UserError` when a layer is stored quantized: its weights cannot be pruned any more."""
    packed = described(model)
    if packed:
        raise UserError(
            f"{next(iter(packed))} and {len(packed) - 1} more layers are quantized: prune first, then quantize"
        )


def _by_magnitude(weight: Tensor, pattern: Pattern, note: str) -> Pruned:
    mask = pattern.mask(weight.abs())
    return Pruned(weight.masked_fill(~mask, 0.0), mask, note)


def _removed_energy(weight: Tensor, pruned: Tensor) -> float:
    """|W - V|^2 / |W|^2."""
    squares = weight.square()
    return float((squares * (pruned == 0)).sum() / squares.sum().clamp_min(torch.finfo(torch.float32).tiny))

"""Unstructured and N:M pruning of a whole model: a criterion gives scores, a pattern turns them into zeros in place."""

import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.calibration.coverage import left_out
from compress.calibration.experts import apart
from compress.calibration.records import LayerRecord
from compress.calibration.sequential import Batch, LayerMethod, Progress, calibrate_sequentially, steps_of
from compress.calibration.statistics import Statistic, StatisticType
from compress.calibration.store import Store
from compress.pruning.method import METHODS, PruningMethod
from compress.pruning.patterns import PATTERNS, Pattern, Scope, Unstructured, global_masks
from models.config import ModelConfig
from models.errors import UserError
from models.registry import Names
from models.weight_formats import described

ENDS = ("embedding", "head")


@dataclass(frozen=True)
class Criterion(PruningMethod):
    """Criterion of unstructured and N:M pruning: a score for every weight; the weights of the smallest are set to zero.

    Args:
        sparsity: share of the weights to set to zero; the pattern's, where it is not given.
        pattern: which weights are compared with each other.
        scope: that of the pattern, where it is given.
        include: which of embedding and head to prune as well.

    Attributes:
        comparable: whether scores of different layers are on one scale, which a global pattern needs.
    """

    comparable: ClassVar[bool] = False

    sparsity: float | None = None
    pattern: Pattern = field(default=Unstructured(), metadata={"registry": PATTERNS})
    scope: Scope | None = None
    include: tuple = field(default=(), metadata={"registry": Names()})

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", self.pattern.given(self.sparsity, self.scope))
        for name in ("sparsity", "scope"):  # they stand in the pattern now
            object.__setattr__(self, name, None)

    def statistic(self) -> StatisticType | None:
        """What to gather at the input of a linear layer; None: the criterion needs no data."""
        return None

    @property
    def calibrated(self) -> bool:
        return self.statistic() is not None

    @abstractmethod
    def scores(self, weight: Tensor, statistic: Statistic | None) -> Tensor:
        """Scores (out, in) fp32, at least 0, of the weight (out, in)."""

    def title(self) -> str:
        pattern = self.pattern
        share = f"{pattern.sparsity:.0%}" if isinstance(pattern, Unstructured) else pattern.spec()["pattern"]
        return f"{self.kind.capitalize()}, {share}"

    def check(self, config: ModelConfig) -> None:
        Sparsify(self, self.pattern, self.include)

    def prune(
        self, model: nn.Module, batches: Sequence[Batch] | None, *, searching: Callable[[int, int], None], **how: Any
    ) -> tuple[list[LayerRecord], dict[str, Any]]:
        return sparsify(model, self, self.pattern, batches, include=self.include, **how), {}


class Sparsify(LayerMethod):
    """Zeroes the weights that the pattern names; shapes and stored bytes stay as they were.

    Args:
        criterion: gives the scores.
        pattern: turns them into a mask.
        include: which of `embedding` and `head` are pruned as well; by default neither.
    """

    def __init__(self, criterion: Criterion, pattern: Pattern, include: Collection[str] = ()) -> None:
        self.criterion, self.pattern, self.include = criterion, pattern, tuple(include)
        self._global: dict[str, Tensor] | None = None
        if pattern.scope == "global" and not criterion.comparable:
            raise UserError(
                f"scores of '{criterion.kind}' cannot be compared between layers, so scope 'global' has no meaning "
                "for it; use scope 'row' or 'layer', or method 'magnitude'"
            )
        for name in self.include:
            if name not in ENDS:
                raise UserError(f"include names '{name}'; it takes {' and '.join(ENDS)}, the blocks are always pruned")

    def prepare(self, model: nn.Module, batches: Sequence[Batch] | None) -> None:
        refuse_packed(model)
        self._tied = model.head is None
        if "head" in self.include and self._tied:
            raise UserError("include names 'head', but this model's head is its embedding; include 'embedding'")
        if "embedding" in self.include and not self._tied and self.criterion.calibrated:
            raise UserError(
                f"'{self.criterion.kind}' weighs inputs, and an embedding that is no head has none; use 'magnitude'"
            )
        chosen = {
            name: module
            for step in steps_of(model)
            for name, module in step.linears.items()
            if self._reason(name) is None
        }
        for name, module in chosen.items():
            self.pattern.check(name, tuple(module.weight.shape))
        if self.pattern.scope == "global":
            scores = {name: self.criterion.scores(module.weight, None) for name, module in chosen.items()}
            self._global = global_masks(scores, self.pattern.sparsity)

    def statistic(self, name: str, module: nn.Module) -> StatisticType | None:
        return self.criterion.statistic() if self._reason(name) is None else None

    def compress(self, name: str, module: nn.Module, statistic: Statistic | None) -> tuple[None, LayerRecord]:
        started = time.perf_counter()
        weight = module.weight.data  # (out, in)
        requested = {"method": self.criterion.kind, **self.pattern.spec()}
        reason = self._reason(name)
        if reason is not None:
            return None, LayerRecord.skip(name, tuple(weight.shape), reason, requested)
        notes = []
        if self._global is not None:
            mask = self._global[name].to(weight.device)  # (out, in)
        elif self.criterion.calibrated and (statistic is None or statistic.tokens == 0):
            mask = self.pattern.mask(weight.float().abs())
            notes.append("no calibration token reached this layer: pruned by magnitude")
        else:
            mask = self.pattern.mask(self.criterion.scores(weight, statistic))
        error = _removed_energy(weight, mask)
        zeros = int((weight == 0).sum())
        weight.masked_fill_(~mask, 0.0)
        after = int((weight == 0).sum())
        if after > int((~mask).sum()):
            notes.append(f"{zeros} weights were zero before, more than the pattern asks for")
        achieved = {"sparsity": after / weight.numel(), "zeros": after, "error_of": "weights"}
        seconds = time.perf_counter() - started
        record = LayerRecord(name, tuple(weight.shape), requested, achieved, error, seconds, "; ".join(notes))
        return None, record

    def _reason(self, name: str) -> str | None:
        """Why a layer is left alone, or None."""
        if name not in ENDS or name in self.include:
            return None
        what = "embedding and head" if name == "embedding" and self._tied else name
        return f"{what} is left dense unless include names it"


def sparsify(
    model: nn.Module,
    criterion: Criterion | str,
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
        criterion: `magnitude`, `wanda`, or an object of the protocol.
        pattern: such as `Unstructured(0.5)`.
        batches: calibration tokens for a criterion that looks at data.
        include: which of `embedding` and `head` are pruned as well.
        store, progress, device, autocast: see `compress.calibration.sequential.calibrate_sequentially`.

    Returns a record for every matrix, those left alone with their reason. The mask is the zeros of the weights:
    `compress.pruning.masks.masks_of` recovers it.

    Raises:
        UserError: a pattern that a layer cannot take, a global scope for scores that are not comparable, a quantized
            model, missing calibration data.
    """
    method = Sparsify(METHODS.parse(criterion, "method"), pattern, include)
    with apart(model):
        records = calibrate_sequentially(
            model, method, batches, store=store, progress=progress, device=device, autocast=autocast
        )
        return records + left_out(model, "dense")


def refuse_packed(model: nn.Module) -> None:
    """Raise `UserError` when a layer is stored quantized: its weights cannot be pruned any more."""
    packed = described(model)
    if packed:
        raise UserError(
            f"{next(iter(packed))} and {len(packed) - 1} more layers are quantized: prune first, then quantize"
        )


def _removed_energy(weight: Tensor, mask: Tensor) -> float:
    """|W - masked W|^2 / |W|^2."""
    squares = weight.float().square()
    return float((squares * ~mask).sum() / squares.sum().clamp_min(torch.finfo(torch.float32).tiny))

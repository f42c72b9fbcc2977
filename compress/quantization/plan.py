"""Quantization of a whole model: a method for each layer, and a record with the reason for each that has none."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from compress.calibration.coverage import left_out
from compress.calibration.experts import apart
from compress.calibration.records import LayerRecord
from compress.calibration.sequential import Batch, BlockStep, Method, Progress, calibrate_sequentially, steps_of
from compress.calibration.statistics import StatisticType
from compress.calibration.store import Store
from compress.quantization.quantizer import Quantizer
from models.errors import UserError, did_you_mean
from models.weight_formats import described, form_of


@dataclass(frozen=True)
class QuantizationPlan(Method):
    """One method for the linear layers of the blocks, others for those that a pattern names, and for the two ends.

    Args:
        method: of the linear layers in the blocks; None leaves them as they are.
        overrides: pattern over module names (`blocks.0.*`, `*.attention.v`) -> the method for those, or None to leave
            them as they are. The last pattern that matches counts.
        embedding: method for the token embedding, which in a tied model is the head too.
        head: method for the head of an untied model.
        studying: called with (done, in all) while methods that do so study the whole model before the first block.
    """

    method: Quantizer | None
    overrides: Mapping[str, Quantizer | None] = field(default_factory=dict)
    embedding: Quantizer | None = None
    head: Quantizer | None = None
    studying: Callable[[int, int], None] | None = None

    def choose(self, name: str) -> tuple[Quantizer | None, str]:
        """The method for the module `name`, and the reason where it is None."""
        for pattern in reversed(self.overrides):
            if fnmatchcase(name, pattern):
                return self.overrides[pattern], f"left in full precision: asked for by {pattern!r}"
        if name in ("embedding", "head"):
            return getattr(self, name), f"left in full precision: no bits are asked for the {name}"
        return self.method, "left in full precision: no bits are asked for the blocks"

    def check_patterns(self, model: nn.Module) -> list[str]:
        """The names of all layers; raises UserError for a pattern that matches none."""
        names = [name for step in steps_of(model) for name in step.linears]
        for pattern in self.overrides:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UserError(f"no layer is called {pattern!r}{did_you_mean(pattern, names)}")
        return names

    def prepare(self, model: nn.Module, batches: Sequence[Batch] | None) -> None:
        """Raise UserError for a pattern that matches no layer; let every method look at the model.

        What one instance of a class has computed is handed to the others.
        """
        names = self.check_patterns(model)
        ready: dict[type, Quantizer] = {}
        methods = [self.choose(name)[0] for name in names]
        for method in {id(method): method for method in methods if method is not None}.values():
            method.prepare(model, batches, like=ready.get(type(method)), progress=self.studying)
            ready[type(method)] = method

    def statistic(self, name: str, module: nn.Module) -> StatisticType | None:
        """The statistic of this module's method."""
        method = self.choose(name)[0]
        return None if method is None else method.statistic(name, module)

    def compress_block(self, step: BlockStep) -> list[LayerRecord]:
        """Hand each method its own layers of the step."""
        chosen = {name: self.choose(name) for name in step.linears}
        methods = {name: method for name, (method, _) in chosen.items() if method is not None}
        records = {}
        for group in _groups(methods):
            own = {name: step.linears[name] for name in group}
            handed = replace(step, linears=own, methods={name: methods[name] for name in group})
            records |= {record.name: record for record in methods[group[0]].compress_block(handed)}
        for name, (method, reason) in chosen.items():
            if method is None:
                records[name] = LayerRecord.skip(name, step.linears[name].weight.shape, reason)
                step.report(records[name])
        return [records[name] for name in step.linears]


def _groups(methods: Mapping[str, Quantizer]) -> list[list[str]]:
    """The layers that are handed over at once, by name; methods that treat them together come first."""
    groups: dict[Any, list[str]] = {}
    for name, method in methods.items():
        key = not method.joint, type(method) if method.joint else id(method)
        groups.setdefault(key, []).append(name)
    return [groups[key] for key in sorted(groups, key=lambda key: key[0])]


def quantize_model(
    model: nn.Module,
    method: Quantizer | None,
    batches: Sequence[Batch] | None = None,
    *,
    overrides: Mapping[str, Quantizer | None] | None = None,
    embedding: Quantizer | None = None,
    head: Quantizer | None = None,
    store: Store | None = None,
    progress: Callable[[Progress], None] | None = None,
    device: torch.device | str | None = None,
    autocast: torch.dtype | None = None,
    minimum_tokens: int | None = None,
    studying: Callable[[int, int], None] | None = None,
) -> list[LayerRecord]:
    """Quantize a `Transformer` in place; `model.config.compression` says afterwards how each layer is stored.

    Args:
        model: the model, in any floating-point dtype; left in evaluation mode. What stays dense keeps its dtype.
        method: `Rtn`, `Gptq` or another method for the linear layers of the blocks.
        batches: calibration tokens, for methods that look at data.
        overrides, embedding, head, studying: see `QuantizationPlan`.
        store, progress, device, autocast, minimum_tokens: see `compress.calibration.sequential.calibrate_sequentially`.

    Returns:
        One record for every linear layer and embedding, whether it was quantized or left, with the reason.

    Raises:
        UserError: a pattern that matches nothing, weights or inputs that are not finite, no data where some is needed.
    """
    packed = {name: module for name, module in model.named_modules() if form_of(module)}
    left = [LayerRecord.skip(name, one.shape, f"already stored as {form_of(one)}") for name, one in packed.items()]
    plan = QuantizationPlan(method, overrides or {}, embedding, head, studying)
    how = {"store": store, "progress": progress, "device": device, "autocast": autocast}
    with apart(model):
        left += left_out(model, "in full precision")
        records = calibrate_sequentially(model, plan, batches, minimum_tokens=minimum_tokens, **how)
        model.config = replace(model.config, compression=described(model))
    return records + left

"""AWQ: scale the input channels that carry large activations before rounding (arXiv 2306.00978).

With a = E|x| of the inputs of a map and s = clamp(a^alpha, 1e-4) / sqrt(max s min s), the map is rounded as
Q(W diag(s)) and the operation before it hands over x diag(1/s), where it can do so exactly (folds.py says where). Of
the alphas 0, 1/20, .., 19/20 the one counts whose Q(W diag(s)) diag(1/s) changes an output least: that of the
sub-layer, for the maps behind a norm, or that of the map itself, behind v or up. alpha 0 is plain rounding.

Then every group's largest magnitude is lowered, in steps of a twentieth down to a half, to where the output changes
least; queries and keys keep their ranges. Errors of a map come from E[x x'] of all its calibration tokens, those of a
sub-layer from some batches of them. There is no `tokens // 512` that could be 0.

N rows (outputs), K columns (inputs), G groups a row, g columns a group.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.calibration.optimal_brain_surgeon import factorise, output_error
from compress.calibration.records import LayerRecord
from compress.calibration.sequential import BlockStep, moved
from compress.calibration.statistics import Hessian, Statistic, StatisticType
from compress.quantization.affine import IntFormat, Quantized, encode, fit_matrix, quantize, spread, stored
from compress.quantization.folding import Call, Fold, Folds, find_folds
from compress.quantization.methods.gptq import Gptq, solve
from compress.quantization.methods.rtn import (
    AffineQuantizer,
    Rtn,
    bits_per_weight,
    checked_weight,
    group_note,
    packed,
    relative_error,
)
from compress.quantization.quantizer import METHODS, requested
from models.attention.protocol import mixed_of
from models.errors import UserError, did_you_mean

SOLVES = ("rtn", "gptq")
SMALLEST_SCALE = 1e-4
QUERIES_AND_KEYS = ("q", "k", "qk", "q_global", "k_global")
SEARCH_TOKENS = 4096  # on which the output of a sub-layer is compared


class Magnitudes(Hessian):
    """Statistic of AWQ: E[x x'] (K, K) and E|x| (K,) of the inputs."""

    def __init__(self, width: int, device: torch.device) -> None:
        super().__init__(width, device)
        self.magnitudes = torch.zeros(width, dtype=torch.float64, device=device)  # (K,)

    def update(self, x: Tensor) -> None:
        super().update(x)
        self.magnitudes += x.float().abs().sum(0)

    def magnitude(self) -> Tensor:
        """E|x_j| (K,) fp32; zeros before the first token."""
        return (self.magnitudes / max(1, self.tokens)).float()


class Chosen(NamedTuple):
    """Result of the search over alpha.

    Attributes:
        alpha: the exponent.
        scale: (channels of the producer,) fp32.
        losses: squared change of the output relative to it, for every alpha from 0 on.
        seconds: that it took for each consumer.
    """

    alpha: float
    scale: Tensor
    losses: list[float]
    seconds: float


@METHODS.register("awq")
@dataclass(frozen=True)
class Awq(AffineQuantizer):
    """Activation-aware scales, then clipped ranges, then rounding.

    Args:
        format: bits, groups, symmetry and scale dtype; a zero point for each group unless it is asked otherwise.
        steps: alphas tried, from 0 on below 1, and steps from the full range of a group down to none.
        smallest: the least share of a group's range that is tried; 1 leaves all ranges alone. The search takes every
            weight for rounded by itself: with `solve` gptq full ranges may do better.
        solve: `rtn` rounds the scaled weights, `gptq` solves for them on the ranges that were found.
    """

    calibrates: ClassVar[bool] = True
    joint: ClassVar[bool] = True  # maps that read one input are scaled as one, whatever the bits of each

    format: IntFormat = field(default_factory=lambda: IntFormat(symmetric=False))
    steps: int = 20
    smallest: float = 0.5
    solve: str = "rtn"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps must be at least 1, got {self.steps}")
        if not 0 < self.smallest <= 1:
            raise UserError(f"smallest must be a share above 0 and at most 1, got {self.smallest!r}")
        if self.solve not in SOLVES:
            raise UserError(f"unknown solve {self.solve!r}{did_you_mean(self.solve, SOLVES)}")

    def statistic(self, name: str, module: nn.Module) -> StatisticType | None:
        return Magnitudes

    def compress_block(self, step: BlockStep) -> list[LayerRecord]:
        if step.module is step.model:
            return super().compress_block(step)
        methods = {name: step.methods.get(name, self) for name in step.linears}
        for name, module in step.linears.items():
            checked_weight(name, module)
        folds, chosen = scale_block(step, methods)
        scaled = {name: (fold, found) for fold, found in chosen for name in fold.consumers}
        records, factors = [], {}
        for name, module in step.linears.items():
            fold, found = scaled.get(name, (None, None))
            scale = None if fold is None else found.scale[fold.channels]
            statistic = step.statistics.get(name)
            new, record = methods[name]._rounded(name, module, statistic, scale, factors)
            note = f"not scaled: {folds.refused[name]}" if fold is None else ""
            alpha = {} if fold is None else {"alpha": found.alpha, "scales_in": fold.source}
            record = replace(
                record,
                achieved={**record.achieved, **alpha},
                seconds=record.seconds + (0.0 if fold is None else found.seconds),
                note="; ".join(filter(None, (record.note, note))),
            )
            step.replace(name, new)
            records.append(record)
            step.report(record)
        return records

    def compress(self, name: str, module: nn.Module, statistic: Statistic | None) -> tuple[nn.Module, LayerRecord]:
        new, record = self._rounded(name, module, statistic, None, {})
        note = "; ".join(filter(None, (record.note, "not scaled: nothing before it can carry a scale of its inputs")))
        return new, replace(record, note=note)

    def _rounded(
        self, name: str, module: nn.Module, statistic: Magnitudes | None, scale: Tensor | None, factors: dict
    ) -> tuple[nn.Module, LayerRecord]:
        """Clip the ranges and round a weight whose columns were multiplied by `scale` (K,), if they were.

        factors: what maps with the same statistic share in a solve.
        """
        started = time.perf_counter()
        if statistic is None or statistic.tokens == 0:
            why = "it reads token ids" if statistic is None else "no calibration token reached it"
            new, record = Rtn(self.format).compress(name, module, None)
            note = "; ".join(filter(None, (record.note, f"{why}: rounded to nearest, its ranges not searched")))
            return new, replace(record, requested=requested(self), note=note)
        weight, hessian = checked_weight(name, module), statistic.matrix()
        if scale is not None:
            hessian = hessian / scale[:, None] / scale
        searched = name.rpartition(".")[2] not in QUERIES_AND_KEYS
        smallest = self.smallest if searched else 1.0
        grids = clipped(weight, hessian, self.format, self.steps, smallest)
        quantized, note = self._solved(weight, hessian, grids, id(statistic), factors)
        new, dense = packed(module, quantized), quantized.dequantize()
        achieved = {"bits": bits_per_weight(new), "error_of": "outputs", "weight_error": relative_error(weight, dense)}
        error = output_error(weight, dense, hessian)
        note = "; ".join(filter(None, (group_note(self.format, weight), note)))
        seconds = time.perf_counter() - started
        return new, LayerRecord(name, tuple(weight.shape), requested(self), achieved, error, seconds, note)

    def _solved(
        self, weight: Tensor, hessian: Tensor, grids: tuple[Tensor, Tensor], key: int, factors: dict
    ) -> tuple[Quantized, str]:
        if self.solve == "gptq":
            if key not in factors:
                factors[key] = factorise(hessian, Gptq.damping, Gptq.act_order)
            if factors[key] is not None:
                return solve(weight, factors[key], self.format, grids=grids), ""
        note = "" if self.solve == "rtn" else "the Hessian could not be factorised at any damping: rounded to nearest"
        return on_grids(weight, grids, self.format), note


def on_grids(weight: Tensor, grids: tuple[Tensor, Tensor], format: IntFormat) -> Quantized:
    """A weight (N, K) at the nearest points of grids that were fitted before: scale and zero, (N, G) or (1, 1)."""
    scale, zero = (spread(values, weight.shape[1], format) for values in grids)
    return Quantized(*stored(encode(weight, scale, zero, format), *grids, format), format)


def clipped(weight: Tensor, hessian: Tensor, format: IntFormat, steps: int, smallest: float) -> tuple[Tensor, Tensor]:
    """The grids of a weight (N, K), each fitted to the share of its largest magnitude with the least output error.

    The error of a group is that of its own columns under E[x x'] (K, K); a row keeps its full ranges where all its
    groups together do worse.
    """
    scale, zero = full = fit_matrix(weight, format)
    if smallest == 1:
        return full
    peak = _groups(weight.abs(), format).amax(-1)  # (N, G) or (1, 1)
    blocks = _diagonal_blocks(hessian, format)
    best = _group_errors(weight, full, blocks, format)
    for step in range(1, steps):
        share = 1 - step / steps
        if share < smallest - 1e-9:
            break
        limit = spread(peak * share, weight.shape[1], format)
        tried = fit_matrix(weight.clamp(-limit, limit), format)
        error = _group_errors(weight, tried, blocks, format)
        better, best = error < best, error.minimum(best)
        scale, zero = tried[0].where(better, scale), tried[1].where(better, zero)
    if format.group_size == "tensor":
        return scale, zero
    worse = _row_errors(weight, (scale, zero), hessian, format) > _row_errors(weight, full, hessian, format)  # (N,)
    return full[0].where(worse[:, None], scale), full[1].where(worse[:, None], zero)


def _groups(weight: Tensor, format: IntFormat) -> Tensor:
    """(N, K) -> (N, G, g), with zeros behind the last column; (1, 1, N K) for one grid in all."""
    rows, width = weight.shape
    shape = format.scales_shape(rows, width)
    if format.group_size == "tensor":
        return weight.reshape(1, 1, -1)
    return F.pad(weight, (0, shape[1] * format.group(width) - width)).view(*shape, -1)


def _diagonal_blocks(hessian: Tensor, format: IntFormat) -> Tensor:
    """(K, K) -> (G, g, g), the blocks of the groups on its diagonal."""
    width = len(hessian)
    group = format.group(width)
    count = -(-width // group)
    padded = F.pad(hessian, (0, count * group - width) * 2).view(count, group, count, group)
    return padded.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()


def _difference(weight: Tensor, grids: tuple[Tensor, Tensor], format: IntFormat) -> Tensor:
    scale, zero = (spread(values, weight.shape[1], format) for values in grids)
    return (encode(weight, scale, zero, format) - zero) * scale - weight  # (N, K)


def _group_errors(weight: Tensor, grids: tuple[Tensor, Tensor], blocks: Tensor, format: IntFormat) -> Tensor:
    """Squared output error of each group by itself, (N, G) or (1, 1)."""
    difference = _difference(weight, grids, format)
    if format.group_size == "tensor":
        return ((difference @ blocks[0]) * difference).sum().view(1, 1)
    grouped = _groups(difference, format).transpose(0, 1)  # (G, N, g)
    return ((grouped @ blocks) * grouped).sum(-1).T


def _row_errors(weight: Tensor, grids: tuple[Tensor, Tensor], hessian: Tensor, format: IntFormat) -> Tensor:
    difference = _difference(weight, grids, format)
    return ((difference @ hessian) * difference).sum(1)  # (N,)


def scale_block(step: BlockStep, methods: dict[str, Awq]) -> tuple[Folds, list[tuple[Fold, Chosen]]]:
    """Scale every map of a block where its scales can be folded; its outputs stay what they were.

    Args:
        step: a block with its inputs and statistics.
        methods: full name of a map -> its own numbers.
    """
    block, prefix = step.module, step.prefixes[0]
    if not step.inputs:
        return Folds(refused=dict.fromkeys(step.linears, "no calibration text was given")), []
    device = next(block.parameters()).device
    numbers = _some(step.inputs)

    def run(chosen: Sequence[int] = numbers[:1]) -> None:
        for i in chosen:
            step.run(moved(step.inputs[i], device), moved(step.contexts[i], device))

    folds = find_folds(block, prefix, step.linears, run)
    calls = {branch: _calls(getattr(block, branch), run, numbers) for branch in {f.branch for f in folds.found}}
    chosen = []
    for fold in folds.found:
        statistics = [step.statistics.get(name) for name in fold.consumers]
        found = None
        if any(statistic is not None and statistic.tokens for statistic in statistics):
            found = search(fold, statistics, methods, getattr(block, fold.branch), calls[fold.branch])
        if found is None:
            folds.refused |= dict.fromkeys(fold.consumers, "no calibration token reached it")
            continue
        fold.apply(found.scale)
        chosen.append((fold, found))
    return folds, chosen


def _some(inputs: Sequence[Tensor]) -> list[int]:
    """Evenly spaced batches with at least `SEARCH_TOKENS` tokens, or all of them."""
    tokens = [x.shape[:-1].numel() for x in inputs]
    count = min(len(inputs), -(-SEARCH_TOKENS * len(inputs) // max(1, sum(tokens))))
    return [i * len(inputs) // count for i in range(count)]


def _calls(sublayer: nn.Module, run: Any, numbers: Sequence[int]) -> list[Call]:
    """Arguments of the sub-layer on these batches."""
    found: list[Call] = []
    handle = sublayer.register_forward_pre_hook(lambda _, args, named: found.append((args, named)), with_kwargs=True)
    try:
        run(numbers)
    finally:
        handle.remove()
    return found


def search(
    fold: Fold, statistics: list[Magnitudes | None], methods: dict[str, Awq], sublayer: nn.Module, calls: list[Call]
) -> Chosen:
    """Find the alpha of a fold.

    Args:
        statistics: of the consumers, in their order.
        methods: full name of a map -> its format and steps.
        sublayer: the module whose outputs are compared, where the fold's consumers are seen through it.
        calls: what it is called with.
    """
    started = time.perf_counter()
    activation = _activation(fold, statistics)
    weights = {name: module.weight.detach().float() for name, module in fold.consumers.items()}
    before = [mixed_of(sublayer(*args, **named)).y.double() for args, named in calls] if fold.whole else []
    steps = methods[next(iter(fold.consumers))].steps
    losses, scales = [], []
    for alpha in (step / steps for step in range(steps)):
        scale = activation.pow(alpha).clamp(min=SMALLEST_SCALE)
        scale = scale / (scale.max() * scale.min()).sqrt()
        columns = scale[fold.channels]
        rounded = {
            name: quantize(weight * columns, methods[name].format).dequantize() / columns
            for name, weight in weights.items()
        }
        if fold.whole:
            losses.append(_branch_loss(fold, rounded, sublayer, calls, before))
        else:
            losses.append(_map_loss(weights, rounded, statistics))
        scales.append(scale)
    best = min(range(steps), key=lambda step: losses[step])  # the first of equals: rounding as it is
    return Chosen(best / steps, scales[best], losses, (time.perf_counter() - started) / len(weights))


def _activation(fold: Fold, statistics: list[Magnitudes | None]) -> Tensor:
    """E|x| of the producer's channels over all tokens that its consumers read, (channels,)."""
    distinct = {id(one): one for one in statistics if one is not None and one.tokens}.values()
    mean = sum(one.magnitudes for one in distinct) / sum(one.tokens for one in distinct)  # (K,)
    count = torch.zeros(int(fold.channels.max()) + 1, dtype=mean.dtype, device=mean.device)
    total = count.index_add(0, fold.channels, mean)
    return (total / count.index_add(0, fold.channels, torch.ones_like(mean))).float()


def _branch_loss(
    fold: Fold, rounded: dict[str, Tensor], sublayer: nn.Module, calls: list[Call], before: list[Tensor]
) -> float:
    """Squared change of the sub-layer's output with the rounded weights, relative to that output."""
    dense = {name: module.weight.data for name, module in fold.consumers.items()}
    try:
        for name, module in fold.consumers.items():
            module.weight.data = rounded[name].to(dense[name].dtype)
        after = [mixed_of(sublayer(*args, **named)).y.double() for args, named in calls]
    finally:
        for name, module in fold.consumers.items():
            module.weight.data = dense[name]
    changed = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))
    return changed / max(sum(float(b.square().sum()) for b in before), 1e-30)


def _map_loss(weights: dict[str, Tensor], rounded: dict[str, Tensor], statistics: list[Magnitudes | None]) -> float:
    """Relative squared change of a map's own output over all its tokens."""
    (weight,), (value,), (statistic,) = weights.values(), rounded.values(), statistics
    return output_error(weight, value, statistic.matrix())

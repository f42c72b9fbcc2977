"""Many small trainings that differ in one choice each: their losses, how they compare, a table and a picture.

A variant is trained with every seed of the sweep; so is the baseline. What is reported is the paired difference: the
seed settles the initial weights and the order of the text, so loss(variant, seed) - loss(baseline, seed) has most of
that in common. The 95 % interval is Student's t over the seeds; with three of them it is wide, and says so.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from torch import Tensor, nn

from app.data.packing import TokenBlocks
from app.evaluation import formatting
from app.evaluation.intervals import Interval, t_quantile
from app.evaluation.metrics import Metric
from app.evaluation.quality import IGNORED, BlockSubset, evaluate_quality
from app.evaluation.report.charts import ACCENT, INK, MUTED, Chart
from models.shapes import COUNT, EACH, NUMBER, maybe

PADDING = -1
RUN = {  # the figures of one run, as a file keeps them
    "losses": {EACH: {"blocks": NUMBER, "sliding?": NUMBER}},
    "experts": {EACH: {"load": [NUMBER]}},
    **{"parameters": COUNT, "active_parameters": COUNT, "flops_per_token": NUMBER, "tokens_per_second": maybe(NUMBER)},
}


class Sliding(Sequence):
    """Blocks that overlap by half: each token, but those of the first half block, has at least half a block before it.

    Args:
        halves: blocks of half the length, in order; every one of their targets is predicted once.
    """

    def __init__(self, halves: Sequence[dict[str, Tensor]]) -> None:
        self.halves = halves

    def __len__(self) -> int:
        return len(self.halves)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        now = self.halves[index]
        now = {"documents": torch.zeros_like(now["tokens"])} | now
        before = self.halves[index - 1] if index else {name: torch.full_like(x, PADDING) for name, x in now.items()}
        before = {"documents": torch.zeros_like(now["tokens"])} | before
        before = before | {"tokens": before["tokens"].clamp(min=0), "targets": torch.full_like(now["targets"], IGNORED)}
        return {name: torch.cat([before[name], now[name]]) for name in ("tokens", "targets", "documents")}


def measure(
    model: nn.Module,
    blocks: TokenBlocks,
    lengths: Sequence[int],
    tokens: int,
    metric: Metric,
    examples: Callable[[TokenBlocks], Sequence] = lambda blocks: blocks,
) -> dict[str, dict]:
    """Loss of a model on the first `tokens` tokens of a split, in blocks of each length.

    Args:
        model: a Transformer.
        blocks: any blocks of the split; only the text behind them is used.
        lengths: tokens in a block. The first is the one of the training.
        tokens: how many are read, rounded down to whole blocks of the longest length.
        metric: whose quantity is measured.
        examples: what the task makes of blocks of text.

    Returns:
        `losses`, the mean of the quantity (of a language model, nats per token): length -> {"blocks": blocks side by
        side} and, where there are several lengths, {"sliding": blocks that overlap by half}; a length beyond bounded
        positions is left out. `experts`: the load of every layer with experts at the first length
        (app/evaluation/experts.py).
    """
    count = max(1, tokens // max(lengths)) * max(lengths)
    found, experts = {}, {}
    for length in lengths:
        if model.config.position.bounded and length > model.config.context:
            continue
        whole, halves = (examples(TokenBlocks(blocks.folder, size, last="drop")) for size in (length, length // 2))
        quality = evaluate_quality(model, BlockSubset.first(whole, count // length), metrics=(metric,))
        found[str(length)] = {"blocks": quality.mean(metric.quantity).value}
        experts = experts or quality.experts
        if len(lengths) > 1:
            overlapping = Sliding(BlockSubset.first(halves, 2 * count // length))
            quality = evaluate_quality(model, overlapping, metrics=(metric,))
            found[str(length)]["sliding"] = quality.mean(metric.quantity).value
    return {"losses": found, "experts": experts}


@dataclass(frozen=True)
class Outcome:
    """One variant over all seeds.

    Attributes:
        axis, name: which choice it is.
        parameters: of the model, and those of them that are `active` for a token.
        flops: of the forward for one token at the length of the training.
        rate: tokens per second of the training, the median over seeds; None where it was not measured.
        losses: mean of the metric's quantity (nats per token) of each seed at the length of the training.
        difference: to the baseline, paired by seed, with its interval.
        lengths: length -> (blocks, sliding where it was measured): the metric at the mean over the seeds.
        metric: what is shown.
    """

    axis: str
    name: str
    parameters: int
    active: int
    flops: int
    rate: float | None
    losses: tuple[float, ...]
    difference: Interval
    lengths: Mapping[str, tuple[float, ...]]
    metric: Metric

    @property
    def value(self) -> float:
        """The metric at the mean over the seeds; of a perplexity the geometric mean."""
        return self.metric.of(statistics.fmean(self.losses))


def mean_over_seeds(values: Sequence[float]) -> Interval:
    """The mean and Student's 95 % interval of it."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean, math.nan, math.nan)
    half = t_quantile(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return Interval(mean, mean - half, mean + half)


def outcome(axis: str, name: str, runs: Sequence[Mapping], baseline: Sequence[Mapping], metric: Metric) -> Outcome:
    """`Result` of the runs of one variant (one a seed, in the order of the baseline's)."""
    trained = next(iter(baseline[0]["losses"]))
    own = tuple(run["losses"][trained]["blocks"] for run in runs)
    base = [run["losses"][trained]["blocks"] for run in baseline]
    difference = mean_over_seeds([a - b for a, b in zip(own, base, strict=True)])
    lengths = {
        length: tuple(metric.of(statistics.fmean(run["losses"][length][form] for run in runs)) for form in forms)
        for length, forms in runs[0]["losses"].items()
    }
    rates = [run["tokens_per_second"] for run in runs if run["tokens_per_second"] is not None]
    sizes = (runs[0][size] for size in ("parameters", "active_parameters", "flops_per_token"))
    return Outcome(axis, name, *sizes, statistics.median(rates) if rates else None, own, difference, lengths, metric)


def table(outcomes: Sequence[Outcome], baseline: Outcome) -> str:
    """One row a variant as Markdown: the metric, its range over the seeds, and the difference to the baseline."""
    lines = [
        f"| axis | variant | parameters | FLOPs a token | tokens/s | {baseline.metric.label} (range over seeds) "
        f"| difference in {baseline.metric.quantity_unit} [95 %] |",
        "|---|---|---|---|---|---|---|",
        f"| | **{formatting.markdown(baseline.name)}** (baseline) | {_costs(baseline)} | {_ranged(baseline)} | |",
    ]
    for one in outcomes:
        low, high = (formatting.signed(f"{end:+.3f}") for end in (one.difference.low, one.difference.high))
        middle = formatting.signed(f"{one.difference.value:+.3f}")
        verdict = "" if one.difference.beyond_noise else " (within noise)"
        lines.append(
            f"| {formatting.markdown(one.axis)} | {formatting.markdown(one.name)} | {_costs(one)} | {_ranged(one)} "
            f"| {middle} [{low}, {high}]{verdict} |"
        )
    return "\n".join(lines)


def _costs(one: Outcome) -> str:
    rate = formatting.MISSING if one.rate is None else f"{one.rate:,.0f}"
    return f"{formatting.parameters(one.parameters, one.active)} | {formatting.flops(one.flops)} | {rate}"


def _ranged(one: Outcome) -> str:
    low, high = (one.metric.of(end) for end in (min(one.losses), max(one.losses)))
    if one.metric.relative:
        return f"{formatting.number(one.value)} ({formatting.number(low, 3)} to {formatting.number(high, 3)})"
    return f"{one.metric.show(one.value)} ({one.metric.show(low)} to {one.metric.show(high)})"


def extrapolation(outcomes: Sequence[Outcome]) -> str:
    """The metric at each length as Markdown: blocks side by side, and blocks that overlap by half."""
    lengths = list(max(outcomes, key=lambda one: len(one.lengths)).lengths)
    lines = [
        "| variant | " + " | ".join(f"{length} tokens" for length in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for one in outcomes:
        cells = [
            " / ".join(formatting.number(value, 3) for value in one.lengths[length])
            if length in one.lengths
            else "ends before"
            for length in lengths
        ]
        lines.append(f"| {formatting.markdown(one.name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences(outcomes: Sequence[Outcome], baseline: Outcome) -> Chart:
    """The difference of every variant to the baseline with its interval, a group of rows for each axis."""
    rows: list[Outcome | str] = []
    for axis in dict.fromkeys(one.axis for one in outcomes):
        rows += [axis, *sorted((one for one in outcomes if one.axis == axis), key=lambda one: one.difference.value)]

    def draw(figure: Figure) -> None:
        panel = figure.subplots()
        for row, one in enumerate(rows):
            if isinstance(one, str):
                continue
            colour = ACCENT if one.difference.beyond_noise else MUTED
            found = one.difference
            panel.plot([found.low, found.high], [row, row], color=colour, linewidth=4, alpha=0.3, solid_capstyle="butt")
            panel.plot(found.value, row, "o", color=colour, markersize=5)
        panel.axvline(0, color=INK, linewidth=1)
        panel.set_yticks(range(len(rows)), [row if isinstance(row, str) else row.name for row in rows])
        for label, row in zip(panel.get_yticklabels(), rows, strict=True):
            label.set_fontweight("bold" if isinstance(row, str) else "normal")
        panel.set_ylim(len(rows) - 0.4, -0.8)
        panel.set_xscale("symlog", linthresh=0.1)  # most differences are small, and some are not
        panel.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: formatting.signed(f"{value:+g}" if value else "0"))
        )
        side = "left" if baseline.metric.better == "lower" else "right"
        unit = f"{baseline.metric.quantity_unit.capitalize()} per token"
        panel.set_title(f"{unit} against the baseline: {side} is better")

    caption = (
        f"Difference in held-out loss of each variant to {baseline.name} ({baseline.metric.label} "
        f"{baseline.metric.show(baseline.value)}), paired by seed, with 95% t intervals over "
        f"{len(baseline.losses)} seeds; grey intervals contain zero"
    )
    return Chart("differences", caption, draw, 7.6, 0.9 + 0.21 * len(rows))

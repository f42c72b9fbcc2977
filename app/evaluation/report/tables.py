"""The rows of a report's tables, as text: one source for the Markdown and the HTML page."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from app.evaluation import formatting
from app.evaluation.formatting import MISSING, known
from app.evaluation.metrics import Metric
from app.tasks.base import task_of


@dataclass(frozen=True)
class Row:
    """One figure before and after. `tone`: good, bad or neutral, by the direction that is better for this figure."""

    label: str
    before: str
    after: str
    change: str
    interval: str = ""
    tone: str = "neutral"


@dataclass(frozen=True)
class Hero:
    """One of the four figures that matter: a caption, the figure now, what it was, how it moved."""

    caption: str
    figure: str
    unit: str
    was: str
    move: str
    tone: str


def tone(ratio, lower_is_better: bool, decided: bool = True) -> str:
    """good, bad or neutral for a ratio after/before; neutral where noise decides."""
    if not known(ratio) or not decided or abs(ratio - 1) < 1e-9:
        return "neutral"
    return "good" if (ratio < 1) == lower_is_better else "bad"


def comparison(figures: dict) -> list[tuple[str, list[Row]]]:
    """The before-and-after table in groups: quality, size, speed, and tasks where there are any."""
    groups = [("Quality", quality_rows(figures)), ("Size", size_rows(figures)), ("Speed", speed_rows(figures))]
    groups.append(("Tasks", task_rows(figures)))
    return [(name, rows) for name, rows in groups if rows]


def with_interval(block: dict, metric: Metric) -> str:
    """A quality figure with its own interval in brackets."""
    bounds = block.get("interval", {}).get(metric.kind)
    text, spread = metric.show(block.get(metric.kind)), formatting.interval(bounds, metric.show)
    return text if spread == MISSING else f"{text} [{spread}]"


def quality_rows(figures: dict) -> list[Row]:
    """Every metric of the task, divergence and agreement."""
    before, after = figures["before"].get("quality", {}), figures["after"].get("quality", {})
    change = figures["change"].get("quality", {})
    intervals = change.get("interval", {})
    rows, task = [], task_of(figures)
    for metric in task.metrics:
        name = metric.kind
        if not known(after.get(name)) and not known(before.get(name)):
            continue
        difference = change.get(name)
        both = known(before.get(name)) and known(after.get(name))
        ratio = 1 + after[name] - before[name] if both else None  # a figure may be 0 or below
        moved = metric.show_change(difference) if known(difference) else MISSING
        if metric.relative and known(change.get(f"{name}_ratio")):
            moved += f" ({formatting.change_percent(change[f'{name}_ratio'])})"
        mood = tone(ratio, metric.better == "lower", beyond_noise(change, metric))
        bounds = formatting.interval(intervals.get(name), metric.show_change)
        label = f"{metric.title}, {metric.unit}" if metric.unit else metric.title
        rows.append(Row(label, with_interval(before, metric), with_interval(after, metric), moved, bounds, mood))
    if known(change.get("kl_divergence")):
        bounds = formatting.interval(intervals["kl_divergence"], lambda value: formatting.number(value, 3))
        rows.append(
            Row("KL from the model before, nats", "", formatting.number(change["kl_divergence"], 3), "", bounds)
        )
        bounds = formatting.interval(intervals["agreement"], formatting.percent)
        rows.append(Row(f"Same {task.predicts}", "", formatting.percent(change["agreement"]), "", bounds))
    return rows


def beyond_noise(change: dict, metric: Metric) -> bool:
    """Whether the interval of a metric's change leaves out zero; that of the first one where it has none."""
    bounds = change.get("interval", {}).get(metric.kind)
    if not bounds or not all(known(bound) for bound in bounds):
        return change.get("beyond_noise", False)
    return bounds[0] > 0 or bounds[1] < 0


def size_rows(figures: dict) -> list[Row]:
    """Parameters and bytes."""
    before, after = figures["before"].get("size", {}), figures["after"].get("size", {})
    changes = figures["change"].get("size", {})
    labels: list[tuple[str, str, Callable]] = [
        ("stored_bytes", "Weights file", formatting.size),
        ("memory_bytes", "Weights in memory", formatting.size),
        ("cache_bytes", "Cache of a full context", formatting.size),
        ("parameters", "Parameters", formatting.count),
        ("nonzero_parameters", "Parameters that are not zero", formatting.count),
        ("active_parameters", "Parameters active for a token", formatting.count),
    ]
    rows = []
    for name, label, form in labels:
        if not known(before.get(name)) or not known(after.get(name)):
            continue
        if name == "cache_bytes" and not task_of(figures).generates:
            continue
        if name == "active_parameters" and all(b["active_parameters"] == b["parameters"] for b in (before, after)):
            continue
        ratio = changes.get(name, {}).get("ratio")
        moved = "same" if before[name] == after[name] else formatting.change_percent(ratio)
        mood = tone(ratio, True) if name.endswith("bytes") else "neutral"
        rows.append(Row(label, form(before[name]), form(after[name]), moved, "", mood))
    return rows


def speed_rows(figures: dict) -> list[Row]:
    """Throughputs, latencies, memory, arithmetic."""
    before, after = figures["before"].get("speed"), figures["after"].get("speed")
    changes = figures["change"].get("speed", {})
    if not before or not after:
        return []
    rows = []
    protocol = task_of(figures).protocol
    for name, label in protocol.throughputs:
        one = changes.get(name, {})
        doubt = formatting.doubt(one)
        moved = ", ".join(filter(None, (formatting.change_percent(one.get("ratio")), doubt)))
        bounds = formatting.interval(one.get("interval"), formatting.change_percent)
        mood = tone(one.get("ratio"), False, not doubt)
        rows.append(Row(label, formatting.rate(before[name]), formatting.rate(after[name]), moved, bounds, mood))
    plain: list[tuple[str, str, Callable]] = [
        ("first_token_ms", "Time to first token", formatting.milliseconds),
        ("peak_memory_bytes", "Peak memory", formatting.size),
        ("flops_per_token", "Arithmetic per token", formatting.flops),
    ]
    for name, label, form in plain:
        if not known(before.get(name)) or not known(after.get(name)):
            continue
        ratio = changes.get(name, {}).get("ratio")
        moved = "same" if before[name] == after[name] else formatting.change_percent(ratio)
        rows.append(Row(label, form(before[name]), form(after[name]), moved))
    latency = protocol.latency
    for quantile, label in (("p50", "median"), ("p95", "95th percentile")):
        values = [formatting.milliseconds(block[latency.name][quantile]) for block in (before, after)]
        ratio = changes.get(latency.name, {}).get(quantile, {}).get("ratio")
        rows.append(Row(f"{latency.label}, {label}", *values, formatting.change_percent(ratio)))
    return rows


def task_rows(figures: dict) -> list[Row]:
    """Each metric of each task, with its standard error."""
    before, after = figures["before"].get("tasks", {}), figures["after"].get("tasks", {})
    rows = []
    for task in after:
        for metric, value in after[task].items():
            was = before.get(task, {}).get(metric)
            if metric == "stderr" or not known(was) or not known(value):
                continue
            values = [formatting.number(number) for number in (was, value)]
            rows.append(Row(f"{task}, {metric}", *values, formatting.plus(value - was)))
    return rows


def heroes(figures: dict) -> list[Hero]:
    """The first metric, stored size, speed and agreement: the strip at the top of the page."""
    before, after, change = figures["before"], figures["after"], figures["change"]
    found, task = [], task_of(figures)
    metric, rate = task.metrics[0], task.protocol.throughputs[0]
    quality, moved = after.get("quality", {}), change.get("quality", {})
    if known(quality.get(metric.kind)):
        name, form = metric.kind, metric.show_change
        if metric.relative:
            name, form = f"{metric.kind}_ratio", formatting.change_percent
        interval = formatting.interval(moved.get("interval", {}).get(name), form)
        move = form(moved.get(name))
        move = f"{move} ({interval})" if interval != MISSING else move
        was = before["quality"].get(metric.kind)
        ratio = quality[metric.kind] / was if known(was) and was and known(moved.get(name)) else None
        mood = tone(ratio, metric.better == "lower", moved.get("beyond_noise", False))
        found.append(Hero(metric.title, metric.show(quality[metric.kind]), "", metric.show(was), move, mood))
    size, ratio = after.get("size", {}), change.get("size", {}).get("stored_bytes", {}).get("ratio")
    if known(ratio):
        figure, unit = formatting.size(size["stored_bytes"]).split(" ")
        move = f"{formatting.times(1 / ratio)} smaller" if ratio < 0.99 else formatting.change_percent(ratio)
        move = "same size" if ratio == 1 else move
        mood = tone(ratio, True)
        found.append(Hero("Stored size", figure, unit, formatting.size(before["size"]["stored_bytes"]), move, mood))
    speed = change.get("speed", {}).get(rate.name)
    if speed:
        rates = [formatting.rate(block["speed"][rate.name]) for block in (before, after)]
        move = formatting.doubt(speed) or f"{formatting.times(speed['ratio'])} as fast"
        mood = tone(speed["ratio"], False, speed["beyond_noise"])
        found.append(Hero(rate.label, *rates[1].split(" "), rates[0], move, mood))
    if known(moved.get("agreement")):
        kl = f"KL {formatting.number(moved['kl_divergence'], 3)} nats per {task.per}"
        figure = formatting.percent(moved["agreement"])
        found.append(Hero(f"Same {task.predicts}", figure.rstrip("%"), "%", "the model before", kl, "neutral"))
    return found


@dataclass(frozen=True)
class LayerTable:
    """Layer records as text.

    `asked`: (which layers, what else was asked of them). `pairs`: quantities with a column for what was asked and one
    for what came out. `rows`: name, shape, pairs [(asked, achieved)], also (what else came out), error, seconds, note,
    skipped.
    """

    asked: list[tuple[str, str]]
    pairs: list[str]
    also: bool
    error: str
    rows: list[dict]


FRACTIONS = ("sparsity", "ratio")


def quantity(name: str, value) -> str:
    """A requested or achieved value: shares as percentages, the rest as it is."""
    return formatting.percent(value) if name in FRACTIONS and known(value) else formatting.plain(value)


def layer_table(layers: Sequence[dict]) -> LayerTable:
    """Requested and achieved side by side for each layer, the error, the time, and the reason or note."""
    came = {name for layer in layers for name in layer["achieved"]}
    pairs = list(dict.fromkeys(name for layer in layers for name in layer["requested"] if name in came))
    kinds = Counter(layer["achieved"]["error_of"] for layer in layers if layer["achieved"].get("error_of"))
    usual = kinds.most_common(1)[0][0] if kinds else ""
    rows = []
    for layer in layers:
        also = {name: value for name, value in layer["achieved"].items() if name not in (*pairs, "error_of")}
        error = formatting.number(layer["error"], 3)
        kind = layer["achieved"].get("error_of", usual)
        rows.append(
            {
                "name": layer["name"],
                "shape": formatting.shape(layer["shape"]) or MISSING,
                "pairs": [
                    tuple(
                        quantity(name, layer[part][name]) if name in layer[part] else MISSING
                        for part in ("requested", "achieved")
                    )
                    for name in pairs
                ],
                "also": ", ".join(f"{name.replace('_', ' ')} {quantity(name, value)}" for name, value in also.items()),
                "error": error if kind == usual else f"{error} (of {kind})",
                "seconds": formatting.duration(layer["seconds"]),
                "note": layer["note"],
                "skipped": layer["skipped"],
            }
        )
    title = "Relative squared error" + (f" of {usual}" if usual else "")
    headings = [name.replace("_", " ") for name in pairs]
    return LayerTable(asked_of(layers, pairs), headings, any(row["also"] for row in rows), title, rows)


def asked_of(layers: Sequence[dict], shown: Sequence[str]) -> list[tuple[str, str]]:
    """Requested settings beside the quantities `shown`, once for all layers that share them."""
    groups: dict[str, list[str]] = {}
    for layer in layers:
        what = {name: value for name, value in layer["requested"].items() if name not in shown}
        text = ", ".join(f"{name.replace('_', ' ')} {quantity(name, value)}" for name, value in what.items())
        if text:
            groups.setdefault(text, []).append(layer["name"])
    return [
        (names[0] if len(names) == 1 else "every layer" if len(names) == len(layers) else f"{len(names)} layers", text)
        for text, names in groups.items()
    ]

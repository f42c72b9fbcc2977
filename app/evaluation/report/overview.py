"""One page over many model folders: every step's quality, size and speed, the Pareto front, what is dominated.

    write_overview(folders, directory)        what `espalier report DIR... --out DIR` and a pipeline write

It reads what the stages measured, measures nothing itself, and says where figures are not comparable.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from app.evaluation import formatting
from app.evaluation.formatting import known
from app.evaluation.report import charts, tables
from app.evaluation.report.charts import ChartPoint
from app.evaluation.report.pages import baseline_rows, baseline_values, draw, now, protocol, render, step
from app.tasks.base import Task, task_of
from models.errors import UserError
from models.io import read_json, write_json
from models.shapes import COUNT, EACH, NUMBER, POSITIVE, TEXT, check_shape, maybe

FORMAT, FORMAT_VERSION = "espalier-overview", 1
REPORT = "espalier-report"
_SIZE = {"parameters": COUNT, "active_parameters?": COUNT, "stored_bytes": maybe(COUNT), "memory_bytes": COUNT}
_MEASUREMENT = {
    **{"tokens": COUNT, "tokens_in_split": maybe(COUNT), "blocks": COUNT, "context": COUNT, "mean_context": NUMBER},
    **{"documents": TEXT, "stride": COUNT, "normalisation": TEXT, "intervals": TEXT, "data?": maybe(TEXT)},
}


def shape_of(task: Task) -> dict:
    """Schema of a report that the page relies on, by task."""
    first, rate = task.metrics[0], task.protocol.throughputs[0].name
    figure = maybe(POSITIVE) if first.relative else maybe(NUMBER)
    quality = {**{f"{metric.kind}?": maybe(NUMBER) for metric in task.metrics}, first.kind: figure, "tokens": COUNT}
    quality |= {"interval": {first.kind: [figure, figure]}}
    del quality[f"{first.kind}?"]
    speed = {rate: maybe(POSITIVE), "device": TEXT, "threads": COUNT, "dtype": TEXT, "rounds": {rate: [NUMBER]}}
    speed |= dict.fromkeys(task.protocol().describe(), COUNT)
    speed |= {"kernels?": [{"kernel": TEXT, "modules": COUNT, "largest_batch?": maybe(COUNT)}]}
    block = {"name": TEXT, "weights_sha256?": maybe(TEXT), "quality": quality, "size": _SIZE, "speed?": speed}
    return {
        **{"title": TEXT, "time": TEXT, "before": block, "after": block},
        "change": {"speed?": {f"{rate}?": {"ratio": maybe(NUMBER), "interval?": [maybe(NUMBER), maybe(NUMBER)]}}},
        **{"verdict": [{"topic": TEXT, "tone": TEXT, "text": TEXT}], "measurement": _MEASUREMENT},
        "baselines?": {EACH: {**quality, "source": TEXT}},
    }


@dataclass(frozen=True)
class Entry:
    """One model of the page: its name there, its figures, and the report that they come from."""

    name: str
    block: dict
    report: dict
    verdict: Sequence[dict] = ()
    title: str = ""

    @property
    def point(self) -> ChartPoint:
        """The model as a point on a chart."""
        return step(self.block, self.task, self.name)

    @property
    def task(self) -> Task:
        """The task that the model was trained for."""
        return task_of(self.report)


def read_report(folder: Path) -> dict:
    """A folder's report.json. Raises UserError where there is none, or one that is not as a stage wrote it."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; name folders that a stage has written")
    report = read_json(folder / "report.json")
    if report.get("format") != REPORT:
        raise UserError(f"{folder / 'report.json'} is not a report of a stage or a comparison; name such a folder")
    check_shape(report, shape_of(task_of(report)), str(folder / "report.json"))
    if ("speed" in report["before"]) != ("speed" in report["after"]):
        raise UserError(f"{folder / 'report.json'} has the speed of one of its two models only")
    return report


def collect(folders: Sequence[Path]) -> list[Entry]:
    """The models of the page, each once: a report's model before is added where no other report ends with it."""
    if not folders:
        raise UserError("there is no folder to report on; name at least one that a stage has written")
    reports = [(Path(folder), read_report(Path(folder))) for folder in folders]
    if len({task_of(report).kind for _, report in reports}) > 1:
        kinds = ", ".join(f"{folder.name} ({task_of(report).kind})" for folder, report in reports)
        raise UserError(f"a page holds the models of one task, and these are of several: {kinds}")
    results = {identity(report["after"]) for _, report in reports}
    entries: list[Entry] = []
    for folder, report in reports:
        before = identity(report["before"])
        if before not in results and before not in {identity(entry.block) for entry in entries}:
            entries.append(Entry(free_name(report["before"]["name"], entries), report["before"], report))
        name = free_name(folder.resolve().name, entries)
        entries.append(Entry(name, report["after"], report, report["verdict"], report["title"]))
    return entries


def identity(block: dict) -> str:
    """Identity of a model: the hash of its weights, or its name where nothing was stored."""
    return block.get("weights_sha256") or block["name"]


def free_name(name: str, entries: Sequence[Entry]) -> str:
    """The name, numbered where the page has it already."""
    taken, candidate, number = {entry.name for entry in entries}, name, 1
    while candidate in taken:
        number += 1
        candidate = f"{name} ({number})"
    return candidate


def warnings(entries: Sequence[Entry]) -> list[str]:
    """Warnings about figures of the page that cannot be compared, in sentences."""
    found = []
    for key, what in (
        ("data", "the text or the tokenizer"),
        ("tokens", "the number of tokens"),
        ("context", "the context length"),
        ("stride", "the stride"),
    ):
        if len({entry.report["measurement"].get(key) for entry in entries}) > 1:
            found.append(f"The figures of quality are not comparable: {what} differs between the reports.")
    machines = {
        (entry.block["speed"]["device"], entry.block["speed"]["threads"]) for entry in entries if "speed" in entry.block
    }
    if len(machines) > 1:
        found.append("The speeds are not comparable: they were measured on different machines or thread counts.")
    return found


def notes(entries: Sequence[Entry]) -> list[str]:
    """Remarks on figures that are comparable, in sentences."""
    found = []
    if len({entry.report["time"] for entry in entries if "speed" in entry.block}) > 1:
        found.append(
            "Each report timed its two models in turns in one process. Between reports the machine may have changed "
            "its pace: trust the speed change of a step more than the difference of two rates from two reports."
        )
    formats = sorted({entry.block["speed"]["dtype"] for entry in entries if "speed" in entry.block})
    if len(formats) > 1:
        found.append(f"The models were timed in different number formats: {' and '.join(formats)}.")
    return found


def fronts(entries: Sequence[Entry]) -> dict[str, list[str]]:
    """Pareto fronts (size, speed) of each model, or the model that dominates it in size: name -> words."""
    points = [entry.point for entry in entries if is_measured(entry)]
    sizes = [(point, point.stored_bytes) for point in points if known(point.stored_bytes)]
    speeds = [(point, point.rate) for point in points if known(point.rate)]
    found: dict[str, list[str]] = {entry.name: [] for entry in entries}
    for label, measured, more in (("size", sizes, False), ("speed", speeds, True)):
        for point, x in measured:
            if charts.on_front(point, x, measured, more):
                found[point.name].append(label)
    return found


def dominated(entries: Sequence[Entry]) -> list[str]:
    """A sentence for each model that another one beats or equals in size, speed and quality at once."""
    sentences = []
    for entry in entries:
        better = [other.name for other in entries if other is not entry and beats(other.point, entry.point)]
        if better:
            names = " and ".join(better) if len(better) < 3 else f"{better[0]} and {len(better) - 1} others"
            label = entry.task.metrics[0].label
            sentences.append(f"{entry.name} is dominated by {names}: no larger, no slower, and no worse in {label}.")
    return sentences


def beats(one: ChartPoint, other: ChartPoint) -> bool:
    """Whether `one` is at least as good as `other` in every figure that both have, and better in one."""
    if not known(one.value) or not known(other.value):
        return known(one.value) and not known(other.value)
    pairs = [(one.cost, other.cost), (one.stored_bytes, other.stored_bytes)]
    if known(one.rate) and known(other.rate):
        pairs.append((-one.rate, -other.rate))
    pairs = [(a, b) for a, b in pairs if known(a) and known(b)]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def is_measured(entry: Entry) -> bool:
    """Whether the first metric of a model is finite."""
    return known(entry.block["quality"][entry.task.metrics[0].kind])


def overview(entries: Sequence[Entry]) -> dict:
    """The content of the page's report.json: each model's block, its fronts, what is dominated, the warnings."""
    on = fronts(entries)
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "time": now(),
        "models": [
            {**entry.block, "name": entry.name, "title": entry.title, "fronts": on[entry.name]} for entry in entries
        ],
        "dominated": dominated(entries),
        "warnings": warnings(entries),
        "notes": notes(entries),
        "baselines": entries[0].report.get("baselines", {}),
        "task": entries[0].task.dump(),
    }


def write_overview(folders: Sequence[Path], directory: Path, title: str = "Models side by side") -> dict:
    """Write report.json, report.md, report.html and plots/ over the folders; return what report.json holds.

    Args:
        folders: folders with a report.json, in the order of the page (a pipeline's: the order of its stages).
        directory: an existing directory, usually from `models.checkpoint.writing`.

    Raises UserError for a folder without a report of a stage.
    """
    entries = collect(folders)
    content = overview(entries)
    write_json(directory / "report.json", content)
    points = [entry.point for entry in entries if is_measured(entry)]
    report, task = entries[0].report, entries[0].task
    metric, rate = task.metrics[0], task.protocol.throughputs[0]
    drawings = (
        [
            charts.values(points, baseline_values(report, metric), len(points) - 1, metric),
            charts.trade_offs(points, metric, rate),
        ]
        if points
        else []
    )
    drawings = [drawing for drawing in drawings if drawing is not None]
    draw(drawings, directory / "plots")
    page = {
        "title": title,
        "kicker": "Espalier report",
        "time": content["time"].replace("T", " ").replace("+00:00", " UTC"),
        "headline": headline(entries),
        "models": rows(entries, content),
        "dominated": content["dominated"],
        "warnings": content["warnings"],
        "notes": content["notes"],
        "charts": [{"name": chart.name, "caption": chart.caption, "svg": Markup(chart.svg())} for chart in drawings],
        "metric": metric,
        "metrics": task.shown,
        "rate": rate,
        "baselines": baseline_rows({"baselines": content["baselines"], "task": content["task"]}),
        "steps": [entry for entry in entries if entry.verdict],
        "protocol": protocol(report),
    }
    render("many.html", directory / "report.html", page)
    render("many.md", directory / "report.md", page)
    return content


def headline(entries: Sequence[Entry]) -> str:
    """The last model against the first, in a sentence."""
    first, last = entries[0].point, entries[-1].point
    if len(entries) == 1 or not known(first.value) or not known(last.value):
        return f"{len(entries)} model{'s' if len(entries) > 1 else ''}"
    metric, rate = entries[0].task.metrics[0], entries[0].task.protocol.throughputs[0]
    parts = [f"{metric.label} {metric.show(first.value)} → {metric.show(last.value)}"]
    if known(first.stored_bytes) and known(last.stored_bytes):
        parts.append(f"stored {formatting.size(first.stored_bytes)} → {formatting.size(last.stored_bytes)}")
    if known(first.rate) and known(last.rate):
        parts.append(f"{rate.label.lower()} {formatting.rate(first.rate)} → {formatting.rate(last.rate)}")
    return f"From {entries[0].name} to {entries[-1].name}: {', '.join(parts)}"


def rows(entries: Sequence[Entry], content: dict) -> list[dict]:
    """The table of the page: figures of each model, against the first one, and its fronts."""
    first = entries[0].point
    found = []
    for entry, model in zip(entries, content["models"], strict=True):
        point, size, quality = entry.point, entry.block["size"], entry.block["quality"]
        smaller = entry is not entries[0] and known(point.stored_bytes) and known(first.stored_bytes)
        found.append(
            {
                "name": entry.name,
                "title": entry.title,
                "figures": [
                    metric.show(quality.get(metric.kind)) if number else tables.with_interval(quality, metric)
                    for number, metric in enumerate(entry.task.shown)
                ],
                "stored": formatting.size(point.stored_bytes),
                "smaller": formatting.times(first.stored_bytes / point.stored_bytes) if smaller else formatting.MISSING,
                "memory": formatting.size(size["memory_bytes"]),
                "parameters": formatting.parameters(size["parameters"], size.get("active_parameters")),
                "decode": formatting.rate(point.rate),
                "step": step_change(entry),
                "fronts": " and ".join(model["fronts"]) or formatting.MISSING,
            }
        )
    return found


def step_change(entry: Entry) -> str:
    """Change of the speed in the entry's own step, measured in one process."""
    name = entry.task.protocol.throughputs[0].name
    change = entry.report["change"].get("speed", {}).get(name) if entry.verdict else None
    if not change:
        return formatting.MISSING
    return formatting.doubt(change) or formatting.times(change["ratio"])

"""The report of one stage or comparison: report.json, report.md, report.html, plots/, tensorboard/.

    write_report(directory, figures, records, about)    into a model folder (`models.checkpoint.writing`) or another

`figures` are what `figures.evaluate_pair` returns, `records` the stage's layer records, `about` what the page says of
where it comes from. The HTML page stands alone: no script, no font, no picture from outside.
"""

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from app.evaluation import formatting, sensitivity
from app.evaluation.assemble import clean
from app.evaluation.environment import environment
from app.evaluation.formatting import known
from app.evaluation.metrics import Metric
from app.evaluation.report import charts, tables
from app.evaluation.report.charts import Chart, ChartPoint
from app.evaluation.report.summary import Sentence, judge
from app.evaluation.report.tensorboard import write_events
from app.tasks.base import Task, task_of
from compress.calibration.records import LayerRecord
from models.io import write_json

FORMAT, FORMAT_VERSION = "espalier-report", 1
TEMPLATES = Path(__file__).parent / "templates"


def now() -> str:
    """This moment in UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclass(frozen=True)
class About:
    """Origin of a report: command, stage, versions.

    Args:
        title: the page's heading, for example "GPTQ, 4 bits, groups of 64".
        stage: quantize, prune, distill, compare.
        recipe: the resolved recipe of the stage, as it would be written in YAML.
        history: the stages so far, oldest first: {"stage", "title" or "name", "time", "seed", ...} each.
        data: what is to be said of the text: source, split, fingerprint.
        seed: of everything drawn at random.
        seconds: that the stage took, evaluation not counted.
        device: where the figures were measured.
        notes: further sentences for the verdict, on what the stage chose by itself.
        time: when, ISO 8601.
    """

    title: str
    stage: str
    recipe: dict = field(default_factory=dict)
    history: Sequence[dict] = ()
    data: dict = field(default_factory=dict)
    seed: int | None = None
    seconds: float | None = None
    device: str = "cpu"
    notes: Sequence[str] = ()
    time: str = field(default_factory=now)


def build_report(figures: dict, records: Sequence[LayerRecord], about: About) -> dict:
    """The content of report.json: figures, the verdict in words, layers, recipe, history, data, environment."""
    layers = [record.to_dict() for record in records]
    sentences = [*judge(figures, layers), *(Sentence("notes", "neutral", note) for note in about.notes)]
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": "comparison",
        "title": about.title,
        "stage": about.stage,
        "time": about.time,
        **figures,
        "verdict": [sentence.to_dict() for sentence in sentences],
        "layers": layers,
        "recipe": about.recipe,
        "history": list(about.history),
        "data": about.data,
        "seed": about.seed,
        "seconds": about.seconds,
        "environment": environment(about.device),
    }
    return clean(content)


def write_report(directory: Path, figures: dict, records: Sequence[LayerRecord], about: About) -> dict:
    """Write the report into an existing directory, and return what report.json holds."""
    report = build_report(figures, records, about)
    write_json(directory / "report.json", report)
    drawings = stage_charts(report)
    draw(drawings, directory / "plots")
    write_events(directory / "tensorboard", report, directory / "plots")
    page = stage_page(report, drawings)
    render("stage.html", directory / "report.html", page)
    render("stage.md", directory / "report.md", page)
    return report


def draw(drawings: Sequence[Chart], directory: Path) -> None:
    """Write the charts as PNG files."""
    directory.mkdir(parents=True, exist_ok=True)
    for drawing in drawings:
        drawing.png(directory)


@cache
def templates(html: bool) -> Environment:
    """The template environment; names that a page lacks are an error, and what is filled in is escaped."""
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=html,
        finalize=None if html else formatting.markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def render(template: str, path: Path, page: dict) -> None:
    """Fill a template and write it."""
    html = template.endswith(".html")
    path.write_text(templates(html).get_template(template).render(page), encoding="utf-8")


def step(block: dict, task: Task, name: str | None = None) -> ChartPoint:
    """A model's block as a point on a chart."""
    quality, metric = block["quality"], task.metrics[0]
    bounds = quality["interval"][metric.kind]
    rate = block.get("speed", {}).get(task.protocol.throughputs[0].name)
    stored = block["size"]["stored_bytes"]
    return ChartPoint(name or block["name"], quality[metric.kind], tuple(bounds), stored, rate, metric.better)


def baseline_values(report: dict, metric: Metric) -> dict[str, float]:
    """Baselines beside a model's figure."""
    found = {name: block[metric.kind] for name, block in report.get("baselines", {}).items()}
    return {name: value for name, value in found.items() if known(value)}


def stage_charts(report: dict) -> list[Chart]:
    """The charts of one comparison; those without data are left out."""
    before, after, task = report["before"], report["after"], task_of(report)
    metric = task.metrics[0]
    blocks = [*report.get("references", {}).values(), before, after]
    points = [step(block, task) for block in blocks if known(block["quality"][metric.kind])]
    found = []
    if points:
        found.append(charts.values(points, baseline_values(report, metric), 1, metric))
    if len(points) > 1:
        found.append(charts.trade_offs(points, metric, task.protocol.throughputs[0]))
    if "speed" in before and "speed" in after:
        speeds = [before["speed"], after["speed"]]
        found.append(charts.latency([before["name"], after["name"]], speeds, task.protocol))
    found.append(charts.layer_grid(report["layers"]))
    if "sensitivity" in report:
        found.append(sensitivity.picture(report["sensitivity"]))
    return [chart for chart in found if chart is not None]


def stage_page(report: dict, drawings: Sequence[Chart]) -> dict:
    """Fields of the comparison templates: every figure as text, in the order of the page."""
    headline, *sentences = report["verdict"]
    return {
        "title": report["title"],
        "kicker": f"Espalier report · {report['stage']}",
        "before": report["before"]["name"],
        "after": report["after"]["name"],
        "time": report["time"].replace("T", " ").replace("+00:00", " UTC"),
        "headline": headline,
        "sentences": sentences,
        "heroes": tables.heroes(report),
        "groups": tables.comparison(report),
        "charts": [{"name": chart.name, "caption": chart.caption, "svg": Markup(chart.svg())} for chart in drawings],
        "metric": task_of(report).metrics[0],
        "baselines": baseline_rows(report),
        "layers": tables.layer_table(report["layers"]) if report["layers"] else None,
        "sensitivity": sensitivity.table(report["sensitivity"]) if "sensitivity" in report else None,
        "skipped": sum(layer["skipped"] for layer in report["layers"]),
        "protocol": protocol(report),
        "facts": facts(report),
        "recipe": yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True) if report["recipe"] else "",
        "history": history_rows(report["history"]),
        "fence": Markup("`" * max(3, 1 + formatting.longest_run(str(report["recipe"])))),
    }


def baseline_rows(report: dict) -> list[dict]:
    """Reference models and baselines, each with the first metric and what it is."""
    task = task_of(report)
    metric = task.metrics[0]
    rows = [
        {"name": name, "value": tables.with_interval(block["quality"], metric), "source": "reference model"}
        for name, block in report.get("references", {}).items()
    ]
    for name, block in report.get("baselines", {}).items():
        source = f"{block['source']}; {block['tokens']:,} {task.per}s"
        rows.append({"name": name, "value": tables.with_interval(block, metric), "source": source})
    return rows


def protocol(report: dict) -> list[tuple[str, str]]:
    """Protocol of the measurements, as (term, description)."""
    how = report["measurement"]
    whole = how["tokens_in_split"]
    split = f"{how['blocks']} blocks of the split"
    if whole:
        share = f"{formatting.percent(how['tokens'] / whole)} of the split ({how['blocks']} blocks)"
        split = "the whole split" if how["tokens"] == whole else share
    task = task_of(report)
    metric = task.metrics[0]
    rows = [
        (metric.title, f"{metric.definition} over {split}: {how['tokens']:,} {task.per}s, each predicted once"),
        (
            "Context",
            f"up to {how['context']} tokens, {formatting.number(how['mean_context'], 3)} on average; "
            f"documents {how['documents']}",
        ),
        ("Stride", f"{how['stride']} tokens: blocks do not overlap"),
        ("Normalisation", how["normalisation"]),
        ("Intervals", f"{how['intervals']}; the change is paired, on the same {task.per}s in the same process"),
    ]
    speed = report["after"].get("speed")
    if speed:
        timing = task.protocol
        rounds = len(speed["rounds"][timing.throughputs[0].name])
        text = (
            f"{timing.say(speed)}; medians of {rounds} rounds in which the models take turns; the "
            "change is the median of the rounds' ratios with its 95% interval between order statistics"
        )
        rows.append(("Speed", text))
        rows.append(("Peak memory", "the weights as held, plus the most that torch's allocator added in a round"))
        if speed.get("kernels"):
            rows.append(("Kernels", "; ".join(map(kernel_line, speed["kernels"]))))
        formats = dict.fromkeys(report[side]["speed"]["dtype"] for side in ("before", "after"))
        rows.append(("Machine", f"{speed['device']}, {speed['threads']} threads, {' → '.join(formats)}"))
    return rows


def kernel_line(found: dict) -> str:
    """Kernel of some layers, such as "7 layers: aten::_int_mm", and its largest batch."""
    layers = "1 layer" if found["modules"] == 1 else f"{found['modules']} layers"
    largest = found.get("largest_batch")
    above = f", above {largest} tokens at once the dense product" if largest else ""
    return f"{layers}: {found['kernel']}{above}"


def facts(report: dict) -> list[tuple[str, list[tuple[str, str]]]]:
    """Data and environment, as titled lists of (term, description)."""
    data = [(key, formatting.plain(value)) for key, value in report["data"].items()]
    if report["measurement"]["data"]:
        data.append(("fingerprint", str(report["measurement"]["data"])))
    for side in ("before", "after"):
        if "weights_sha256" in report[side]:
            data.append((f"weights {side}, SHA-256", report[side]["weights_sha256"]))
    machine = [(key, str(value)) for key, value in report["environment"].items()]
    for key in ("seed", "seconds"):
        if report[key] is not None:
            machine.append((key, formatting.number(report[key], 6)))
    return [(title, rows) for title, rows in (("Data and weights", data), ("Environment", machine)) if rows]


def history_rows(history: Sequence[dict]) -> list[dict]:
    """The stages so far: what, when, with which seed."""
    return [
        {
            "stage": str(entry.get("stage", "")),
            "title": str(entry.get("title") or entry.get("name") or ""),
            "time": str(entry.get("time", "")).replace("T", " ").replace("+00:00", " UTC"),
            "seed": formatting.plain(entry["seed"]) if "seed" in entry else formatting.MISSING,
        }
        for entry in history
    ]

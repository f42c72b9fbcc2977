"""The pictures of a report: drawn once by matplotlib, written as PNG files and as SVG that follows the page's colours.

Every chart is a function `(figure, data) -> None`. `png` and `svg` render it; in the SVG each colour of the palette is
replaced by the page's CSS variable of that name, so that one drawing serves light, dark and paper, and the text stays
text. Nothing in the SVG refers to the outside.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import numpy as np
from markupsafe import escape
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from app.evaluation import formatting
from app.evaluation.formatting import known
from app.evaluation.metrics import Metric
from app.evaluation.report.label_placement import Box, Point, place_labels
from app.evaluation.speed import SpeedProtocol, Throughput

PALETTE = {"ink": "#1d2521", "muted": "#66716b", "rule": "#d5dad3", "accent": "#2e6b4c", "warm": "#a8501e"}
INK, MUTED, RULE, ACCENT, WARM = PALETTE.values()
SHADES = LinearSegmentedColormap.from_list("shades", ["white", ACCENT, INK])
WRITTEN = 16  # experts up to which their loads are written into a picture
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.parse_math": False,  # a name may hold dollars
    "svg.fonttype": "none",
    "svg.hashsalt": "espalier",
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "x",
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": INK,
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@dataclass(frozen=True)
class ChartPoint:
    """One model on a chart: a stage's result.

    Attributes:
        value: of the metric that the chart is about, with its interval.
        rate: tokens per second.
        better: which values of the metric are better, `lower` or `higher`.
    """

    name: str
    value: float
    interval: tuple[float, float]
    stored_bytes: float | None = None
    rate: float | None = None
    better: str = "lower"

    @property
    def cost(self) -> float:
        """The value so that less is better."""
        return self.value if self.better == "lower" else -self.value


@dataclass(frozen=True)
class Chart:
    """A drawing ready to be rendered: its file name, what it shows in a sentence, its size in inches."""

    name: str
    caption: str
    draw: Callable[[Figure], None]
    width: float
    height: float

    def figure(self) -> Figure:
        """Draw it, without pyplot and so without global state."""
        figure = Figure(figsize=(self.width, self.height), layout="constrained")
        self.draw(figure)
        return figure

    def png(self, directory: Path) -> Path:
        """Write `NAME.png` (on white, 160 dpi) into the directory."""
        path = directory / f"{self.name}.png"
        with mpl.rc_context(STYLE):
            self.figure().savefig(path, dpi=160, facecolor="white", metadata={"Software": None})
        return path

    def pixels(self) -> np.ndarray:
        """The same picture as (height, width, 3) float32 from 0 to 1, at 100 dpi."""
        buffer = io.BytesIO()
        with mpl.rc_context(STYLE):
            self.figure().savefig(buffer, format="png", dpi=100, facecolor="white")
        buffer.seek(0)
        return imread(buffer)[..., :3]

    def svg(self) -> str:
        """An inline `<svg>` element in the colours and the fonts of the page around it."""
        buffer = io.StringIO()
        with mpl.rc_context(STYLE):
            self.figure().savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        text = buffer.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r'\s(xmlns(:xlink)?|version)="[^"]*"', "", text).replace("xlink:href", "href")
        text = re.sub(r"font:\s*([\d.]+)px[^;\"]*", r"font-size: \1px; font-family: inherit", text)
        text = re.sub(r"font-family:\s*(?!inherit)[^;\"]*", "font-family: inherit", text)
        text = re.sub(r' id="([^"]+)"', rf' id="{self.name}-\1"', text)
        text = re.sub(r'(href="#|url\(#)', rf"\g<1>{self.name}-", text)
        for name, colour in PALETTE.items():
            text = text.replace(colour, f"var(--{name})")
        size = re.compile(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', re.DOTALL)
        return size.sub(rf'<svg \1 role="img" aria-label="{escape(self.caption)}">', text, count=1)


def plain_log_axis(axis) -> None:
    """A logarithmic axis labelled 10, 20, 50 rather than by powers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=7))
    axis.set_major_formatter(FuncFormatter(lambda value, _: formatting.number(value, 3)))
    axis.set_minor_formatter(NullFormatter())


def values(steps: Sequence[ChartPoint], baselines: dict[str, float], results: int, metric: Metric) -> Chart:
    """The metric of each step: close up with 95 % intervals, and beside it against the baselines.

    The last `results` steps are drawn in the accent colour; those before them are what they are held against.
    """

    def draw(figure: Figure) -> None:
        close, far = figure.subplots(1, 2, sharey=True, width_ratios=(1.7, 1))
        rows = range(len(steps))
        for row, step in zip(rows, steps, strict=True):
            colour = ACCENT if row >= len(steps) - results else MUTED
            if all(known(end) for end in step.interval):
                close.plot(step.interval, [row, row], color=colour, linewidth=5, alpha=0.3, solid_capstyle="butt")
            close.plot(step.value, row, "o", color=colour, markersize=6)
            label = metric.show(step.value)
            close.annotate(
                label, (step.value, row), (0, 8), textcoords="offset points", ha="center", fontsize=8.5, color=INK
            )
            far.plot(step.value, row, "o", color=colour, markersize=5)
        close.set_title(f"{metric.title}, with 95% interval")
        close.set_yticks(rows, [step.name for step in steps])
        close.set_ylim(len(steps) - 0.5, -0.6)
        close.margins(x=0.12)
        close.xaxis.set_major_locator(MaxNLocator(6))
        found = [step.value for step in steps]
        if metric.relative and max(found) > 8 * min(found):
            close.set_xscale("log")
            plain_log_axis(close.xaxis)
        far.set_title("Against the baselines" + (" (log scale)" if metric.relative else ""))
        if metric.relative:
            far.set_xscale("log")
            plain_log_axis(far.xaxis)
        for name, value in baselines.items():
            far.axvline(value, color=WARM, linewidth=1.2, linestyle=(0, (4, 2)))
            place = (value, len(steps) - 0.56)
            far.annotate(f"{name} ", place, ha="right", va="bottom", fontsize=8, color=WARM, rotation=90)
        far.margins(x=0.1)

    caption = (
        f"{metric.title} of each model, and the same against the baselines ({', '.join(baselines)}). The bars are each "
        "model's own 95% interval, over documents; the paired interval of a change is far narrower"
    )
    return Chart(metric.kind, caption, draw, 8.4, 1.35 + 0.42 * len(steps))


def trade_offs(steps: Sequence[ChartPoint], metric: Metric, rate: Throughput) -> Chart | None:
    """The metric against stored size and against speed; the Pareto front as a line. None without sizes."""
    measures = [("Stored size, MB", [(s, s.stored_bytes / 1e6) for s in steps if known(s.stored_bytes)])]
    measures.append((f"{rate.label}, tokens per second", [(s, s.rate) for s in steps if known(s.rate)]))
    measures = [(label, points) for label, points in measures if len(points) > 1]
    if not measures:
        return None

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 2, squeeze=False)[0]
        for unused in panels[len(measures) :]:
            unused.set_axis_off()
        fronts = []
        for panel, (label, points) in zip(panels, measures, strict=False):
            panel.grid(True, axis="both")
            faster = "second" in label
            front = sorted((x, s.value) for s, x in points if on_front(s, x, points, faster))
            fronts.append(front)
            panel.plot([x for x, _ in front], [y for _, y in front], color=ACCENT, linewidth=1.4, alpha=0.55)
            for step, x in points:
                held = (x, step.value) in front
                face = ACCENT if held else "none"
                panel.plot(x, step.value, "o", markersize=7, color=ACCENT if held else MUTED, markerfacecolor=face)
            panel.set_title(f"{metric.title} against {label[0].lower() + label[1:]}")
            panel.set_xlabel(f"{label}  ({'more' if faster else 'less'} is better)")
            panel.set_xlim(0, 1.12 * max(x for _, x in points))
            panel.margins(y=0.22)
        figure.draw_without_rendering()  # from here on the panels stand where they will be drawn
        for panel, (_, points), front in zip(panels, measures, fronts, strict=False):
            label_points(panel, [(step.name, (x, step.value)) for step, x in points], front)

    caption = f"{metric.title} against stored size and speed; filled points are on the Pareto front"
    return Chart("trade-offs", caption, draw, 8.4, 3.3)


def label_points(panel: Axes, points: Sequence[tuple[str, Point]], line: Sequence[Point]) -> None:
    """Write each name beside its point (in the units of the axes), clear of the others and of the line."""
    style = {"textcoords": "offset points", "ha": "left", "va": "bottom", "fontsize": 8.5, "color": INK}
    labels = [panel.annotate(name, place, (0, 0), **style) for name, place in points]
    extents = [label.get_window_extent() for label in labels]
    pixels = [tuple(panel.transData.transform(place)) for _, place in points]
    corners = [tuple(panel.transData.transform(place)) for place in line]
    point = panel.figure.dpi / 72  # pixels in a typographic point
    sizes = [(extent.width, extent.height) for extent in extents]
    boxes = place_labels(pixels, sizes, list(pairwise(corners)), Box(*panel.bbox.extents), gap=8 * point)
    for label, box, (x, y) in zip(labels, boxes, pixels, strict=True):
        label.set_position(((box.left - x) / point, (box.bottom - y) / point))


def on_front(step: ChartPoint, x: float, points: Sequence[tuple[ChartPoint, float]], more_is_better: bool) -> bool:
    """Whether no other point is at least as good in both measures and better in one."""
    sign = -1 if more_is_better else 1
    return not any(
        sign * other_x <= sign * x and other.cost <= step.cost and (sign * other_x < sign * x or other.cost < step.cost)
        for other, other_x in points
    )


def latency(names: Sequence[str], speeds: Sequence[dict], protocol: type[SpeedProtocol]) -> Chart | None:
    """Time per token or sequence (p50 to p95) of each model, and the rate of every interleaved round."""
    time, rate = protocol.latency, protocol.throughputs[0].name
    if not all(known(speed.get(rate)) for speed in speeds):
        return None

    def draw(figure: Figure) -> None:
        times, rounds = figure.subplots(1, 2, width_ratios=(1.3, 1))
        colours = [MUTED, ACCENT, WARM]
        for row, speed in enumerate(speeds):
            p50, p95 = speed[time.name]["p50"], speed[time.name]["p95"]
            times.plot([p50, p95], [row, row], color=colours[row], linewidth=5, alpha=0.3, solid_capstyle="butt")
            times.plot(p50, row, "o", color=colours[row], markersize=6)
            label = f"{formatting.milliseconds(p50)}, p95 {formatting.milliseconds(p95)}"
            times.annotate(label, (p50, row), (0, 9), textcoords="offset points", fontsize=8.5, color=INK)
        times.set_yticks(range(len(names)), names)
        times.set_ylim(len(names) - 0.5, -0.7)
        times.set_xlim(0, 1.35 * max(speed[time.name]["p95"] for speed in speeds))
        times.set_title(f"Milliseconds per {time.unit}, p50 to p95")
        columns = [speed["rounds"][rate] for speed in speeds]
        for series in zip(*columns, strict=False):
            rounds.plot(range(len(series)), series, color=RULE, linewidth=1.0, zorder=1)
        for column, series in enumerate(columns):
            rounds.plot([column] * len(series), series, "o", color=colours[column], markersize=4, alpha=0.8)
        rounds.grid(True, axis="y")
        rounds.grid(False, axis="x")
        rounds.set_xticks(range(len(names)), names)
        rounds.tick_params(axis="x", labelcolor=INK)
        rounds.tick_params(axis="y", labelcolor=MUTED)
        rounds.set_xlim(-0.5, len(names) - 0.5)
        rounds.set_ylim(0, 1.15 * max(max(series) for series in columns))
        rounds.set_title("Tokens per second, every round")

    caption = f"Time per {time.unit} and rate of each interleaved round"
    return Chart("latency", caption, draw, 8.4, 1.9 + 0.2 * len(names))


def layer_grid(layers: Sequence[dict]) -> Chart | None:
    """Bits, sparsity and error of every treated layer: a row for each block, a column for each of its matrices."""
    cells = {layer["name"]: place for layer in layers if (place := grid_place(layer["name"]))}
    treated = [layer for layer in layers if layer["name"] in cells and not layer["skipped"]]
    panels = [
        (title, {layer["name"]: value for layer in treated if known(value := read(layer))}, form)
        for title, read, form in (
            ("Bits per weight", lambda layer: layer["achieved"].get("bits"), lambda v: formatting.number(v, 3)),
            ("Sparsity", lambda layer: layer["achieved"].get("sparsity"), lambda v: formatting.percent(v, 0)),
            ("Relative squared error, %", lambda layer: layer["error"], lambda v: formatting.number(100 * v, 2)),
        )
    ]
    panels = [panel for panel in panels if panel[1]]
    panels = [panel for panel in panels if len(set(panel[1].values())) > 1] or panels[:1]  # one value says it in a word
    if not panels:
        return None
    rows = sorted({cells[layer["name"]][0] for layer in treated})
    columns = list(dict.fromkeys(cells[layer["name"]][1] for layer in treated))

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axis, (title, values, form) in zip(axes, panels, strict=True):
            high = max(values.values())
            for name, value in values.items():
                row, column = rows.index(cells[name][0]), columns.index(cells[name][1])
                strength = value / high if high > 0 else 0.0
                axis.bar(column, 0.92, 0.94, row - 0.46, color=ACCENT, alpha=0.06 + 0.5 * max(0.0, strength))
                if len(rows) <= 24:
                    axis.text(column, row, form(value), ha="center", va="center", fontsize=6.8, color=INK)
            axis.set_title(title)
            axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
            axis.set_yticks(range(len(rows)), [f"block {row}" for row in rows])
            axis.set_ylim(len(rows) - 0.5, -0.5)
            axis.set_xlim(-0.5, len(columns) - 0.5)
            axis.grid(False)
            axis.spines["bottom"].set_visible(False)
            axis.tick_params(axis="x", length=0, labelcolor=INK)

    height = 1.3 + min(0.27, 7 / len(rows)) * len(rows)
    shown = " and ".join(title.partition(",")[0].lower() for title, _, _ in panels).capitalize()
    return Chart("layers", f"{shown} of every treated matrix of the blocks, darker where larger", draw, 8.4, height)


def grid_place(name: str) -> tuple[int, str] | None:
    """Row and column in the layer grid: blocks.3.attention.q -> (3, "q"). None for a module outside the blocks."""
    match = re.fullmatch(r"blocks\.(\d+)\.(?:attention\.|feedforward\.)?(.+)", name)
    return (int(match[1]), match[2]) if match else None


def load_picture(models: Mapping[str, dict], caption: str, name: str = "expert-load") -> Chart | None:
    """The load of every layer's experts against an even one, a panel a model; None where no model has experts.

    Args:
        models: title of the panel -> figures of a model (app/evaluation/experts.py).
        caption: what the picture shows.
        name: of its file.
    """
    models = {title: figures for title, figures in models.items() if figures}
    if not models:
        return None
    heights = [len(figures) for figures in models.values()]

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(models), 1, squeeze=False, height_ratios=[height + 1 for height in heights])
        even = {title: [relative(layer["load"]) for layer in figures.values()] for title, figures in models.items()}
        highest = max(2.0, *(value for rows in even.values() for row in rows for value in row))
        for panel, (title, figures) in zip(panels[:, 0], models.items(), strict=True):
            widest = max(len(row) for row in even[title])
            rows = [row + [float("nan")] * (widest - len(row)) for row in even[title]]
            shown = panel.imshow(rows, cmap=SHADES, vmin=0, vmax=highest, aspect="auto", interpolation="nearest")
            for y, row in enumerate(rows if widest <= WRITTEN else []):
                for x, value in enumerate(row):
                    colour = "white" if value > 0.4 * highest else INK
                    text = formatting.number(value, 2) if formatting.known(value) else ""
                    panel.text(x, y, text, ha="center", va="center", fontsize=6.8, color=colour)
            panel.set_title(title)
            panel.set_yticks(range(len(rows)), [layer.replace("blocks.", "block ") for layer in figures])
            panel.set_xticks(range(0, widest, max(1, widest // 16)))
            panel.grid(False)
        panels[-1, 0].set_xlabel("expert")
        figure.colorbar(shown, ax=panels[:, 0].tolist(), label="load, 1 is even", shrink=min(1.0, 4 / sum(heights)))

    return Chart(name, caption, draw, 7.6, 0.9 + 0.55 * len(models) + 0.26 * sum(heights))


def relative(load: Sequence[float]) -> list[float]:
    """Each expert's load over the mean; all 0 where nothing reached an expert."""
    mean = sum(load) / len(load)
    return [one / mean if mean else 0.0 for one in load]

"""Draws docs/architecture.png: the packages as lanes, and through them the path of a batch and the path of a folder.

python docs/architecture_picture.py
"""

from pathlib import Path

import matplotlib

matplotlib.use("agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

LANES = (  # the one that imports the others first: (package, what it is, colour)
    ("recipes", "command line, YAML", "#fbeee0"),
    ("app", "Lightning: tasks, data,\nevaluation, reports", "#e4eefa"),
    ("compress", "a model goes in,\na smaller one comes out", "#e8f4e6"),
    ("models", "pure PyTorch,\none device", "#f1eaf6"),
)
HEIGHT, WIDTH = 2.0, 21.8  # of a lane
BATCH, FOLDER = "#b3541e", "#1f4e79"  # colours of the two paths


def row(package: str) -> float:
    """The middle of a lane."""
    names = [name for name, _, _ in LANES]
    return (len(LANES) - 1 - names.index(package) + 0.5) * HEIGHT


def box(axes: Axes, x: float, package: str, title: str, file: str, colour: str, width: float = 2.62) -> None:
    """A step at `x` of a lane: what is done, and in which file."""
    y, height = row(package), 1.2
    place = (x - width / 2, y - height / 2)
    axes.add_patch(FancyBboxPatch(place, width, height, "round,pad=0,rounding_size=0.12", fc="white", ec=colour))
    axes.text(x, y + 0.17, title, ha="center", va="center", fontsize=8.4, linespacing=1.1)
    axes.text(x, y - 0.41, file, ha="center", va="center", fontsize=6.1, family="monospace", color="#555555")


def arrow(axes: Axes, points: list[tuple[float, float]], colour: str) -> None:
    """A line through points, with a head at the last."""
    xs, ys = zip(*points, strict=True)
    axes.plot(xs[:-1], ys[:-1], color=colour, lw=1.3, solid_capstyle="butt")
    style = {"arrowstyle": "-|>", "color": colour, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=style)


def lanes(axes: Axes) -> None:
    for package, what, colour in LANES:
        y = row(package)
        axes.axhspan(y - HEIGHT / 2 + 0.04, y + HEIGHT / 2 - 0.04, color=colour, lw=0)
        axes.text(0.75, y + 0.3, f"{package}/", fontsize=11, weight="bold", va="center")
        axes.text(0.75, y - 0.3, what, fontsize=7.2, va="center", color="#444444")
    top, bottom = row("recipes") + 0.7, row("models") - 0.7
    arrow(axes, [(0.4, top), (0.4, bottom)], "#444444")
    axes.text(0.2, (top + bottom) / 2, "imports", rotation=90, fontsize=7.5, ha="center", va="center", color="#444444")


def batch_path(axes: Axes) -> None:
    """Text -> batch -> backbone -> head -> losses -> optimizer step -> next batch; at the end the model folder."""
    recipes, app, compress, models = row("recipes"), row("app"), row("compress"), row("models")
    left, middle, right = 5.0, 7.95, 10.9
    box(axes, left, "recipes", "espalier fit", "recipes/fit.py", BATCH)
    box(axes, left, "app", "1  text to batch\ntokens (B, T)", "app/data/module.py", BATCH)
    box(axes, left, "models", "2  embed\n(B, T, D)", "models/backbone.py", BATCH)
    box(axes, middle, "models", "3  Backbone.run\nover the blocks", "models/block.py", BATCH)
    box(axes, right, "models", "4  head\nlogits in chunks", "models/projection.py", BATCH)
    box(axes, right, "app", "5  losses\nof the task", "app/tasks/base.py", BATCH)
    box(axes, middle, "app", "6  gradients,\noptimizer step", "app/optim/muon.py", BATCH)
    arrow(axes, [(left, recipes - 0.6), (left, app + 0.6)], BATCH)
    arrow(axes, [(left, app - 0.6), (left, models + 0.6)], BATCH)
    arrow(axes, [(left + 1.31, models), (middle - 1.31, models)], BATCH)
    arrow(axes, [(middle + 1.31, models), (right - 1.31, models)], BATCH)
    arrow(axes, [(right, models + 0.6), (right, app - 0.6)], BATCH)
    arrow(axes, [(right - 1.31, app), (middle + 1.31, app)], BATCH)
    arrow(axes, [(middle - 1.31, app), (left + 1.31, app)], BATCH)
    arrow(axes, [(middle, app - 0.6), (middle, compress), (13.3, compress), (13.3, models + 0.6)], BATCH)
    axes.text((left + middle) / 2, app + 0.76, "next batch", fontsize=7, color=BATCH, ha="center", va="center")
    axes.text(middle + 0.12, compress - 0.2, "when training ends", fontsize=7, color=BATCH, va="center")


def folder_path(axes: Axes) -> None:
    """Model folder -> load -> compress -> save -> load both anew and evaluate -> report -> next stage."""
    recipes, app, compress, models = row("recipes"), row("app"), row("compress"), row("models")
    left, middle, right = 14.2, 17.2, 20.2
    box(
        axes,
        middle,
        "recipes",
        "espalier quantize, prune, distill: Stage.run",
        "recipes/commands/stage.py",
        FOLDER,
        8.6,
    )
    box(axes, left, "models", "model folder", "models/checkpoint.py", FOLDER)
    box(axes, left, "app", "1  load", "app/loading.py", FOLDER)
    box(axes, 16.3, "compress", "2  compress,\nblock by block", "compress/calibration/sequential.py", FOLDER)
    box(axes, middle, "models", "Backbone.run\nover one block", "models/backbone.py", FOLDER)
    box(axes, right, "models", "3  save: the\nsmaller folder", "models/checkpoint.py", FOLDER)
    box(axes, right, "app", "4  load both anew,\nevaluate both", "app/evaluation/assemble.py", FOLDER)
    box(axes, middle, "app", "5  report", "app/evaluation/report/pages.py", FOLDER)
    axes.text((left + middle) / 2, app + 0.76, "next stage", fontsize=7, color=FOLDER, ha="center", va="center")
    arrow(axes, [(left, recipes - 0.6), (left, app + 0.6)], FOLDER)
    arrow(axes, [(left, models + 0.6), (left, app - 0.6)], FOLDER)
    arrow(axes, [(15.25, app - 0.6), (15.25, compress + 0.6)], FOLDER)
    arrow(axes, [(16.5, compress - 0.6), (16.5, models + 0.6)], FOLDER)
    arrow(axes, [(17.3, models + 0.6), (17.3, compress - 0.6)], FOLDER)
    arrow(axes, [(17.61, compress), (19.5, compress), (19.5, models + 0.6)], FOLDER)
    arrow(axes, [(20.6, models + 0.6), (20.6, app - 0.6)], FOLDER)
    arrow(axes, [(right - 1.31, app), (middle + 1.31, app)], FOLDER)
    arrow(axes, [(middle - 1.31, app), (left + 1.31, app)], FOLDER)


def main() -> None:
    """Draw the picture beside this file."""
    figure, axes = pyplot.subplots(figsize=(13.6, 5.2))
    axes.set(xlim=(0, WIDTH), ylim=(-0.05, len(LANES) * HEIGHT + 0.7))
    axes.axis("off")
    lanes(axes)
    top = len(LANES) * HEIGHT + 0.35
    for x, text, colour in ((7.95, "a batch in training", BATCH), (17.2, "a folder through a stage", FOLDER)):
        axes.text(x, top, text, fontsize=10.5, color=colour, ha="center", va="center", weight="bold")
    batch_path(axes)
    folder_path(axes)
    figure.savefig(Path(__file__).with_name("architecture.png"), dpi=110, bbox_inches="tight", pad_inches=0.05)


if __name__ == "__main__":
    main()

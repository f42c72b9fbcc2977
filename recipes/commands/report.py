"""`espalier report`: one page over many folders, and the table that goes with it."""

from pathlib import Path
from typing import Any

from rich.table import Table

from app.evaluation import formatting
from app.evaluation.report.overview import write_overview
from app.tasks.base import task_of
from models.checkpoint import CONFIG
from models.io import writing
from recipes.commands import options, resume
from recipes.commands.terminal import out_console, say


def main(chosen: options.Report) -> None:
    """Run `espalier report`."""
    out = Path(chosen.out).expanduser().absolute()
    resume.check_output(out, chosen.overwrite)
    folders = [Path(folder).expanduser() for folder in chosen.folders]
    with writing(out, overwrite=chosen.overwrite) as target:
        content = write_overview(measured(folders), target)
    print_overview(content)
    say(f"written to {out}")


def measured(folders: list[Path]) -> list[Path]:
    """Return the folders that hold a report.

    A freshly trained model has none of its own; it is on the page as the model before the first stage that reports.
    """
    without = [folder for folder in folders if (folder / CONFIG).exists() and not (folder / "report.json").exists()]
    if len(without) == len(folders):
        return folders  # the page refuses them, and says why
    for folder in without:
        say(f"{folder} has no report of its own")
    return [folder for folder in folders if folder not in without]


def print_overview(content: dict[str, Any]) -> None:
    """Print one row a model and one a baseline, and what the page says in sentences."""
    table, task = Table(), task_of(content)
    metric, rate = task.metrics[0], task.protocol.throughputs[0].name
    for heading in ("", metric.label, "95% interval", "on disk", "in memory", rate.partition("_")[0], "best in"):
        table.add_column(heading, justify="right" if heading else "left")
    for model in content["models"]:
        quality, size = model["quality"], model["size"]
        table.add_row(
            model["name"],
            metric.show(quality[metric.kind]),
            formatting.interval(quality["interval"][metric.kind], metric.show),
            formatting.size(size["stored_bytes"]),
            formatting.size(size["memory_bytes"]),
            formatting.rate(model.get("speed", {}).get(rate)),
            " and ".join(model["fronts"]),
        )
    table.add_section()
    for name, block in content["baselines"].items():
        table.add_row(name, metric.show(block[metric.kind]))
    out_console().print(table)
    for sentence in (*content["dominated"], *content["warnings"]):
        say(sentence)

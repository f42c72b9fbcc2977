"""A report's figures in TensorBoard: scalars, the verdict and the recipe as text, the charts as images; a run's read.

Step 0 is the model before, step 1 the model after, so that every scalar is a line from one to the other.
"""

import statistics
from collections.abc import Iterator
from pathlib import Path

import yaml
from matplotlib.image import imread
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from app.evaluation.formatting import known


def scalars(block: dict, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a block with its path as a tag (quality/perplexity); lists and intervals are left out."""
    for name, value in block.items():
        if isinstance(value, dict) and name not in ("interval", "rounds"):
            yield from scalars(value, f"{prefix}{name}/")
        elif known(value) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


def write_events(directory: Path, report: dict, plots: Path) -> None:
    """Write one event file with the report's figures into `directory`, named without the machine's name."""
    with SummaryWriter(str(directory)) as writer:
        for step, side in enumerate(("before", "after")):
            for tag, value in scalars(report[side]):
                writer.add_scalar(tag, value, step)
        for name, block in {**report.get("baselines", {}), **report.get("references", {})}.items():
            for tag, value in scalars(block, f"{name}/"):
                writer.add_scalar(tag, value, 0)
        for tag, value in scalars(report["change"], "change/"):
            writer.add_scalar(tag, value, 1)
        for layer in report["layers"]:
            if known(layer["error"]):
                writer.add_scalar(f"layer_error/{layer['name']}", layer["error"], 1)
        writer.add_text("verdict", "\n".join(f"- {sentence['text']}" for sentence in report["verdict"]), 1)
        if report["recipe"]:
            recipe = yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True)
            writer.add_text("recipe", "".join(f"    {line}\n" for line in recipe.splitlines()), 1)
        for picture in sorted(plots.glob("*.png")):
            writer.add_image(f"plots/{picture.stem}", imread(picture)[..., :3], 1, dataformats="HWC")
    for file in directory.glob("events.out.tfevents.*"):
        file.rename(directory / "events.out.tfevents.0.report")


def median_scalar(directory: Path, tag: str) -> float | None:
    """The median over all entries of a scalar in a run's event files, or None where there is none."""
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        return None
    return statistics.median(event.value for event in events.Scalars(tag))

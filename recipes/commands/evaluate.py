"""`espalier evaluate`: one or more models on the same held-out text."""

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

from rich.table import Table

from app.evaluation import formatting
from app.evaluation.assemble import Subject, clean, evaluate_model
from app.loading import load_model, resolve_device, resolve_dtype
from app.tasks.base import Task, task_of
from models.errors import UserError
from models.io import write_json
from recipes.commands import options
from recipes.commands.stage_data import Text, speed_protocol
from recipes.commands.terminal import Bars, out_console, say


def main(chosen: options.Evaluate) -> None:
    """Run `espalier evaluate`: print a table, and write `{"models": {path: figures}, "baselines": {...}}` to --out."""
    options.check_seed(chosen.seed)
    out = checked_file(chosen.out, chosen.overwrite)
    figures = measure(chosen)
    if out is not None:
        write_figures(out, figures)
    out_console().print(table(figures))
    if out is not None:
        say(f"written to {out}")


def measure(chosen: options.Evaluate) -> dict[str, Any]:
    """Return the figures of every model, one after another, and the baselines of the first one's architecture.

    `notes` of a model say what of the data was left out.
    """
    device, dtype = resolve_device(chosen.device), resolve_dtype(chosen.dtype)
    found: dict[str, Any] = {"models": {}}
    task: Task | None = None
    for path in chosen.models:
        loaded = load_model(path, device, dtype)
        if task is not None and loaded.task.kind != task.kind:
            raise UserError(
                f"{path} was trained for {loaded.task.kind}, and {chosen.models[0]} for {task.kind}; evaluate the "
                "models of one task at a time"
            )
        task = task or loaded.task
        text = Text(chosen, loaded)
        blocks = text.held_out
        subject = Subject(loaded.model, loaded.source.path.name, loaded.source.folder)
        with Bars() as bars:
            found["models"][path] = evaluate_model(
                subject,
                blocks,
                task=text.task,
                speed=speed_protocol(chosen, text.task),
                batch_size=chosen.batch_size,
                progress=bars,
            )
            if "baselines" not in found:
                found["baselines"] = text.task.baselines(loaded.model.config, blocks, text.training, device=device)
        found["models"][path]["notes"] = text.notes
    return found | {"task": task.dump()}


def checked_file(out: str | None, overwrite: bool) -> Path | None:
    """Return --out as a path.

    Raises:
        UserError: it is a folder, a file that exists and is not to be replaced, or where nothing can be written.
    """
    if out is None:
        return None
    path = Path(out).expanduser().absolute()
    if path.is_dir():
        raise UserError(f"{path} is a folder; --out names the JSON file to write")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already; name another file or pass --overwrite")
    place = next(parent for parent in path.parents if parent.exists())
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return path


def write_figures(path: Path, figures: dict[str, Any]) -> None:
    """Write JSON to `path` whole or not at all, making the folders above it; a figure that is not finite is null.

    Raises:
        UserError: it cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(temporary, clean(figures))
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def table(figures: dict[str, Any]) -> Table:
    """One row a model, and one a baseline."""
    shown, task = Table(), task_of(figures)
    metric, *others = task.shown
    rates = [throughput.name for throughput in reversed(task.protocol.throughputs)]
    labels = (metric.label, "95% interval", *(other.label for other in others), "on disk", "in memory")
    for heading in ("", *labels, *(rate.partition("_")[0] for rate in rates)):
        shown.add_column(heading, justify="right" if heading else "left")
    for path, block in figures["models"].items():
        quality, size, speed = block["quality"], block["size"], block.get("speed", {})
        shown.add_row(
            path,
            metric.show(quality[metric.kind]),
            formatting.interval(quality["interval"][metric.kind], metric.show),
            *(other.show(quality.get(other.kind)) for other in others),
            formatting.size(size["stored_bytes"]),
            formatting.size(size["memory_bytes"]),
            *(formatting.rate(speed.get(rate)) for rate in rates),
        )
    shown.add_section()
    for name, block in figures["baselines"].items():
        shown.add_row(name, metric.show(block[metric.kind]), "", *(one.show(block.get(one.kind)) for one in others))
    return shown

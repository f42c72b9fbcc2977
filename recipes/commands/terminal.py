"""Terminal output of a stage: progress bars with a rate and the time left, and the table at the end.

Where nobody watches (a log file, a CI job) a bar becomes one plain line every few seconds.
"""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text
from torch import nn

from app.evaluation import formatting
from app.evaluation.report import tables
from compress.calibration.sequential import Progress, steps_of
from models.errors import printable


class PlainConsole(Console):
    """Prints text as it is: names are no markup, and their control characters are written as escapes."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(printable(text), **how)


console = PlainConsole(stderr=True)
LINE_EVERY = 10.0  # seconds between two lines of a log
LOG_WIDTH = 120  # columns of a table in a log


def out_console() -> Console:
    """The console of the command's own output, as wide as a table needs where that is no terminal."""
    console = PlainConsole()
    return console if console.is_terminal else PlainConsole(width=160)


def say(message: str) -> None:
    """Print one line for the person, beside the bars and not into the command's output."""
    console.print(message, soft_wrap=True)


def by_layer(bars: "Bars", phase: str, model: nn.Module) -> Callable[[Progress], None]:
    """Return what the compression driver reports each finished layer to: a bar over all layers."""
    before = [0]  # layers of the steps up to each one
    for one in steps_of(model):
        before.append(before[-1] + len(one.linears))
    seen: dict[int, int] = {}

    def report(step: Progress) -> None:
        seen[step.index] = seen.get(step.index, 0) + 1
        bars(phase, min(before[step.index] + seen[step.index], before[step.index + 1]), before[-1], step.layer)

    return report


class RateColumn(ProgressColumn):
    """Steps per second, or seconds per step where that reads better."""

    def render(self, task: Task) -> Text:
        return Text(rate(task.speed or task.finished_speed))


def rate(speed: float | None) -> str:
    """`12.3/s`, or `4.1 s each` below one a second."""
    if not speed:
        return ""
    return f"{formatting.number(float(speed), 3)}/s" if speed >= 1 else f"{formatting.number(1 / speed, 3)} s each"


class Bars:
    """Progress of named phases, one at a time: `with Bars() as bars: bars("rounding", done, total)`."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:32}", markup=False), BarColumn(), MofNCompleteColumn(), RateColumn())
        self._progress = RichProgress(*columns, TimeRemainingColumn(elapsed_when_finished=True), console=console)
        self._tasks: dict[str, int] = {}
        self._started: dict[str, float] = {}
        self._last_line = 0.0

    def __enter__(self) -> "Bars":
        if console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if console.is_terminal:
            self._progress.stop()

    def __call__(self, phase: str, done: int, total: int, detail: str = "") -> None:
        """Show that `done` of `total` steps of a phase are finished; `detail` names the latest."""
        now = time.monotonic()
        if phase not in self._started:
            self._last_line = now  # the first line when there is a rate to tell
        started = self._started.setdefault(phase, now)
        if console.is_terminal:
            if phase not in self._tasks:
                self._tasks[phase] = self._progress.add_task(phase, total=total)
            shown = f"{phase}: {detail}" if detail and done < total else phase
            self._progress.update(self._tasks[phase], completed=done, total=total, description=shown)
        elif done >= total or now - self._last_line > LINE_EVERY:
            self._last_line = now
            speed = done / (now - started) if now > started else 0.0
            left = f", {_minutes((total - done) / speed)} left" if speed and done < total else ""
            say(f"{phase}: {done}/{total} {rate(speed)}{left}")


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def print_summary(report: dict[str, Any]) -> None:
    """Print a report's table and verdict: what was, what is, what that means."""
    table = Table(title=report["title"], title_justify="left")
    table.add_column("")
    for name in (report["before"]["name"], report["after"]["name"], "change", "95% interval"):
        table.add_column(name, justify="right")
    for _, rows in tables.comparison(report):
        for row in rows:
            table.add_row(row.label, row.before, row.after, row.change, row.interval)
        table.add_section()
    console.print(table, width=None if console.is_terminal else LOG_WIDTH)
    for sentence in report["verdict"]:
        say(sentence["text"])

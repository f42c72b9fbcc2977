"""What a stage says while it works: progress bars with a rate and the time left, and the table at the end.

Where nobody watches (a log file, a CI job) a bar becomes one plain line every few seconds.
"""

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from app.evaluation import tables, wording

console = Console(file=sys.stderr, highlight=False)
LINE_EVERY = 10.0  # seconds between two lines of a log


def say(message: str) -> None:
    """Print one line for the person, beside the bars and not into the command's output."""
    console.print(message, soft_wrap=True)


class RateColumn(ProgressColumn):
    """Steps per second, or seconds per step where that reads better."""

    def render(self, task: Task) -> Text:
        return Text(rate(task.speed or task.finished_speed))


def rate(speed: float | None) -> str:
    """`12.3/s`, or `4.1 s each` below one a second."""
    if not speed:
        return ""
    return f"{wording.number(float(speed), 3)}/s" if speed >= 1 else f"{wording.number(1 / speed, 3)} s each"


class Bars:
    """Progress of named phases, one at a time: `with Bars() as bars: bars("rounding", done, total)`."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), RateColumn())
        self._progress = Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True), console=console)
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
    console.print(table)
    for sentence in report["verdict"]:
        say(sentence["text"])

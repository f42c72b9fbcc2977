"""Rounds in which all contestants take turns, and the rows that come of them.

A machine that is shared, warms up or throttles takes all contestants along, so what is reported is a ratio: the median
over the rounds of (this one's rate / the peer's rate in the same round), with a distribution-free 95 % interval.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from app.evaluation.intervals import Interval, ratio_of_rounds


@dataclass(frozen=True)
class Row:
    """One measured figure.

    Attributes:
        benchmark: which script it comes from.
        case: what was measured.
        value, low, high: median, smallest and largest over the rounds.
        unit: of the three.
        peer: the case that it is compared with, or "".
        ratio, ratio_low, ratio_high: this case against the peer and its 95 % interval; above 1 is better.
        note: settings that matter, or what stands in the way of reading the figure alone.
    """

    benchmark: str
    case: str
    value: float
    low: float
    high: float
    unit: str
    peer: str = ""
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def say(text: str) -> None:
    """Progress, on stderr: the table alone goes to stdout."""
    print(text, file=sys.stderr, flush=True)


def take_turns(
    name: str, cases: Mapping[str, Callable[[], float | None]], *, rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Seconds that each case took in each round.

    Args:
        name: of the benchmark, for the progress lines.
        cases: functions that do one piece of work. One that returns a number has timed itself.
        rounds: timed rounds; every second one runs in the opposite order.
        warmup: untimed calls of each case at the start (compilation, first touch of memory).
    """
    for case, run in cases.items():
        began = time.perf_counter()
        for _ in range(warmup):
            run()
        say(f"{name}: {case} is warm after {time.perf_counter() - began:.1f} s")
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    began = time.perf_counter()
    for number in range(rounds):
        for case in list(cases)[:: -1 if number % 2 else 1]:
            seconds[case].append(_timed(cases[case]))
        spent = time.perf_counter() - began
        say(f"{name}: round {number + 1} of {rounds}, {spent / (number + 1) * (rounds - number - 1):.0f} s left")
    return seconds


def _timed(run: Callable[[], float | None]) -> float:
    began = time.perf_counter()
    own = run()
    return time.perf_counter() - began if own is None else own


def rate_row(
    benchmark: str, case: str, seconds: Mapping[str, list[float]], work: float, unit: str, *, peer: str = "", note=""
) -> Row:
    """`work` done per second by a case, against the peer's rate when one is named."""
    rates = [work / value for value in seconds[case]]
    interval = _against(seconds, case, peer)
    return Row(benchmark, case, statistics.median(rates), min(rates), max(rates), unit, peer, *interval, note)


def time_row(
    benchmark: str, case: str, seconds: Mapping[str, list[float]], per: float, unit: str, *, peer: str = "", note=""
) -> Row:
    """Seconds of a case divided by `per`, against the peer when one is named (above 1: faster than the peer)."""
    values = [value / per for value in seconds[case]]
    interval = _against(seconds, case, peer)
    return Row(benchmark, case, statistics.median(values), min(values), max(values), unit, peer, *interval, note)


def _against(seconds: Mapping[str, list[float]], case: str, peer: str) -> tuple[float | None, ...]:
    if not peer:
        return None, None, None
    found: Interval = ratio_of_rounds(seconds[case], seconds[peer])
    return tuple(None if math.isnan(value) else value for value in (found.value, found.low, found.high))


def fastest(seconds: Mapping[str, list[float]], among: list[str]) -> str:
    """The case with the smallest median time."""
    return min(among, key=lambda case: statistics.median(seconds[case]))


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = ["| benchmark | case | median (range) | unit | ratio [95 %] | against |", "|---|---|---|---|---|---|"]
    for row in rows:
        ratio = ""
        if row.ratio is not None:
            ratio = f"**{row.ratio:.2f}**"
            if row.ratio_low is not None:
                ratio += f" [{row.ratio_low:.2f}, {row.ratio_high:.2f}]"
        value = f"{row.value:,.4g} ({row.low:,.4g} - {row.high:,.4g})"
        lines.append(f"| {row.benchmark} | {row.case} | {value} | {row.unit} | {ratio} | {row.peer} |")
    notes = list(dict.fromkeys(f"- {row.benchmark}: {row.note}" for row in rows if row.note))
    return "\n".join(lines + (["", *notes] if notes else []))

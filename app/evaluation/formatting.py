"""Numbers as people read them. Units are decimal (1 MB = 10^6 bytes); a missing or non-finite figure is a dash."""

import math
import re
from collections.abc import Sequence

from markupsafe import Markup

MISSING = "\u2013"
MINUS = "\u2212"


def markdown(text) -> str:
    """Text as it stands in a line or a cell of Markdown: no HTML, link, emphasis, code or new line comes from it."""
    if isinstance(text, Markup):  # what a template marks as Markdown already
        return text
    escaped = re.sub(r"([\\`*|])", r"\\\1", str(text)).replace("](", "]\\(")
    return " ".join(escaped.replace("&", "&amp;").replace("<", "&lt;").split("\n"))


def code(text) -> Markup:
    """Text as a code span of Markdown."""
    text = " ".join(str(text).split("\n")).replace("|", "\\|")
    fence = "`" * (1 + longest_run(text))
    return Markup(f"{fence} {text} {fence}" if len(fence) > 1 else f"`{text}`")


def longest_run(text: str) -> int:
    """Backticks that stand side by side in the text, at most: what encloses it needs one more."""
    return max(map(len, re.findall("`+", text)), default=0)


def known(value) -> bool:
    """Whether this is a figure: a finite number."""
    return isinstance(value, (int, float)) and math.isfinite(value)


def signed(text: str) -> str:
    """The same text with a typographic minus."""
    return text.replace("-", MINUS)


def number(value, digits: int = 4) -> str:
    """A whole number in full, another with `digits` significant digits; in exponent notation below 1e-4 only."""
    if not known(value):
        return MISSING
    if value == 0 or isinstance(value, int):
        return signed(f"{int(value):,}")
    rounded = float(f"{value:.{digits - 1}e}")
    magnitude = math.floor(math.log10(abs(rounded)))
    if magnitude < -4:
        return signed(f"{value:.{digits - 1}e}")
    return signed(f"{rounded:,.{max(0, digits - 1 - magnitude)}f}")


def scaled(value, units: Sequence[str], digits: int = 3) -> str:
    """A figure with the largest of `units` (each a thousand of the last) that keeps it at one or more."""
    if not known(value):
        return MISSING
    step = 0
    while step + 1 < len(units) and abs(round(value / 1000**step, 2)) >= 1000:
        step += 1
    figure = value / 1000**step
    text = f"{figure:,.0f}" if step == 0 and float(figure).is_integer() else number(float(figure), digits)
    return signed(f"{text} {units[step]}".rstrip())


def size(value) -> str:
    """Bytes: 21.3 MB."""
    return scaled(value, ("B", "kB", "MB", "GB", "TB"))


def count(value) -> str:
    """A count: 5.41 M."""
    return scaled(value, ("", "k", "M", "B", "T"))


def parameters(total, active=None) -> str:
    """Weights, and those active for a token where not all are: 5.41 M (2.13 M active)."""
    return count(total) if active in (None, total) else f"{count(total)} ({count(active)} active)"


def flops(value) -> str:
    """Floating-point operations: 10.9 MFLOP."""
    return scaled(value, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"))


def milliseconds(value) -> str:
    """A time in milliseconds: 3.21 ms."""
    return MISSING if not known(value) else f"{number(float(value), 3)} ms"


def duration(seconds) -> str:
    """A time in seconds, shown in the unit that fits."""
    if not known(seconds) or seconds == 0:
        return MISSING
    return f"{seconds:,.1f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def rate(value) -> str:
    """Tokens per second: 1,234 tok/s."""
    return MISSING if not known(value) else f"{number(float(value), 4)} tok/s"


def plus(value) -> str:
    """A difference with its sign."""
    text = number(value, 3)
    return text if text in (MISSING, "0") or value < 0 else f"+{text}"


def percent(fraction, digits: int = 1) -> str:
    """A share: 96.2 %."""
    return MISSING if not known(fraction) else signed(f"{100 * fraction:.{digits}f}%")


def change_percent(ratio, digits: int = 1) -> str:
    """A ratio as a change: +1.5%, \u221276.4%."""
    if not known(ratio):
        return MISSING
    change = 100 * (ratio - 1)
    if change != 0 and abs(change) < 0.5 * 10**-digits:
        digits += 2
    return signed(f"{change:+,.{digits}f}%")


def times(ratio) -> str:
    """A factor of one or more: 4.3\u00d7."""
    return MISSING if not known(ratio) else f"{number(float(ratio), 2 if ratio < 10 else 3)}\u00d7"


def shape(sides: Sequence[int]) -> str:
    """The sides of a matrix."""
    return " \u00d7 ".join(str(side) for side in sides)


def interval(bounds, form=number) -> str:
    """Both ends of an interval in one form: 20.1 to 20.7."""
    if bounds is None or not all(known(bound) for bound in bounds):
        return MISSING
    return f"{form(bounds[0])} to {form(bounds[1])}"


def doubt(change: dict) -> str:
    """Why the ratio of a `change` decides nothing: the noise of its rounds, or too few of them; empty where it does."""
    if change.get("beyond_noise"):
        return ""
    return "within noise" if interval(change.get("interval")) != MISSING else "too few rounds for an interval"


def plain(value) -> str:
    """A value of a recipe or record."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and math.isfinite(value):
        return signed(f"{value:.4g}") if abs(value) < 1e4 else number(value)
    if isinstance(value, int):
        return number(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(plain(item) for item in value) or "none"
    return str(value)

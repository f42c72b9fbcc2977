"""Errors that are said in one sentence: wrong input, and runs that fail."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A wrong input: the message says what is wrong, where, and what would be right. The command line exits with 2."""


class RunFailed(Exception):
    """A fault of a run, not of its input, said in one sentence. The command line exits with 1."""


class Notice(UserWarning):
    """A warning that is a sentence for the person; the command line prints it as one line, without a place in code."""


_SPACES = "\n\t\u00a0\u2009\u202f"


def printable(text: str) -> str:
    """The text as a terminal may see it: what controls it, or turns the direction of letters, is written as escapes."""
    return "".join(one if one.isprintable() or one in _SPACES else ascii(one)[1:-1] for one in text)


def did_you_mean(word: object, choices: Iterable[object]) -> str:
    """Return `" (did you mean 'x'?)"` for the choice nearest to `word`, or the list of choices when none is near."""
    choices = sorted(map(str, choices))
    near = difflib.get_close_matches(str(word)[:100], choices, n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else f" (one of: {', '.join(choices)})"

"""What the user got wrong, said in one sentence."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A wrong input: the message says what is wrong, where, and what would be right. The command line exits with 2."""


def did_you_mean(word: object, choices: Iterable[object]) -> str:
    """Return `" (did you mean 'x'?)"` for the choice nearest to `word`, or the list of choices when none is near."""
    choices = sorted(map(str, choices))
    near = difflib.get_close_matches(str(word)[:100], choices, n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else f" (one of: {', '.join(choices)})"

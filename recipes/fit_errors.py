"""Errors of jsonargparse and Lightning about wrong input, as one sentence each."""

import inspect
import re
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from models.errors import UserError, did_you_mean
from recipes.trust import HARMLESS, refusal

KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "dict": "keys and values",
    "list": "a list",
    "tuple": "a list",
    "NoneType": "null",
    "timedelta": "a time (DD:HH:MM:SS)",
}


@contextmanager
def explained(verb: str) -> Iterator[None]:
    """Turn the parser's and the trainer's complaints inside the block into UserError."""
    try:
        yield
    except ArgumentError as error:
        raise UserError(f"espalier {verb}: {sentence(str(error))}") from None
    except MisconfigurationException as error:
        raise UserError(f"espalier {verb}: {' '.join(str(error).split())}") from None
    except RecursionError as error:
        if not _raised_in(error, "jsonargparse"):
            raise
        raise UserError(f"espalier {verb}: a value holds lists or mappings nested too deep to be read") from None
    except (ValueError, TypeError) as error:  # the parser wraps what an option object says about its own arguments
        if (own := _user_error(error)) is not None:
            raise UserError(f"espalier {verb}: {own}") from None
        if not _raised_in(error, "lightning", "jsonargparse"):
            raise
        raise UserError(f"espalier {verb}: {' '.join(str(error).split())}") from None


def _raised_in(error: BaseException, *packages: str) -> bool:
    """Whether one of the packages, which know our options alone, has raised the error itself."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] in packages


def _user_error(error: BaseException | None) -> UserError | None:
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def sentence(message: str) -> str:
    """Return what is wrong, where, and what would be right.

    Args:
        message: a complaint of jsonargparse, which spans lines and shows Python types.
    """
    message = " ".join(message.split())
    found = re.match(r'Parser key "([\w.]+)":', message)
    key = found[1] if found else "a value"
    for pattern, explain in _EXPLANATIONS:
        if match := re.search(pattern, message):
            return explain(key, message, *match.groups())
    return message


def _denied(key: str, message: str, name: str) -> str:
    return refusal(key, name)


def _option(key: str, message: str, class_path: str, option: str) -> str:
    module, _, name = class_path.rpartition(".")
    kind = _known(module, name)
    options = list(inspect.signature(kind).parameters) if inspect.isclass(kind) else []
    return f"{key}: {name} has no option '{option}'{did_you_mean(option, options)}"


def _option_value(key: str, message: str, class_path: str, option: str, kind: str, value: str) -> str:
    return _value(f"{key}: {option} of {class_path.rpartition('.')[2]}", message, kind, value)


def _value(key: str, message: str, kind: str, value: str) -> str:
    words = []
    for choices, name, plain in re.findall(r"Literal\[(.*?)\]|<class '(?:[\w.]+\.)?(\w+)'>|\b(list|dict)\[", kind):
        words.append(f"one of {choices}" if choices else KINDS.get(name or plain, name))
    given = "null" if value == "None" else value or "blanks"
    return f"{key} must be {' or '.join(dict.fromkeys(words)) or kind}, not {given}"


def _mapping(key: str, message: str, value: str) -> str:
    return f"{key} must be keys and values, not {value}"


def _class(key: str, message: str, name: str) -> str:
    return f"{key}: there is no '{name}'{did_you_mean(name, _choices(key, message))}"


def _specification(key: str, message: str) -> str:
    return f"{key} must be {{class_path: NAME, init_args: {{...}}}} with one of: {', '.join(_choices(key, message))}"


def _choices(key: str, message: str) -> list[str]:
    """The names of the classes that the argument takes: those of the list, or else from the types in the message."""
    if key in HARMLESS:
        return [kind.rpartition(".")[2] for kind in HARMLESS[key]]
    names = set()
    for path in re.findall(r"<class '([\w.]+\.[\w.]+)'>|list\[([\w.]+)\]", message):
        module, _, name = (path[0] or path[1]).rpartition(".")
        base = _known(module, name)
        names |= {kind.__name__ for kind in _below(base)} if inspect.isclass(base) else set()
    return sorted(names)


def _known(module: str, name: str) -> Any:
    """Attribute of a module that is imported already; nothing is imported for a message."""
    return getattr(sys.modules.get(module), name, None)


def _below(base: type) -> set[type]:
    direct = {kind for kind in base.__subclasses__() if not kind.__name__.startswith("_")}
    return direct.union(*(_below(kind) for kind in direct))


def _required(key: str, message: str, names: str) -> str:
    missing = [name.partition(".")[2] or name for name in names.split(", ")]
    return f"{' and '.join(missing)} must be given, in a recipe (-c FILE) or as --{missing[0]}"


_EXPLANATIONS = (
    (r"Importing '([\w.]+)' is not allowed", _denied),
    (r"Problem with given class_path '([\w.]+)': Option '(\w+)' is not accepted", _option),
    (
        r"Problem with given class_path '([\w.]+)': Parser key \"(\w+)\": Expected an? (.+?)\. Got value: (\S+)",
        _option_value,
    ),
    (r"Expected a dot import path string: (\S+)", _class),
    (r"Not a valid subclass of \w+", _specification),
    (r"^Parser key \"[\w.]+\": Unable to load config '(.*?)'", _mapping),
    (r"^Parser key \"[\w.]+\": Does not validate .*? Subtypes: \[(.*?)\] Errors: .* Given value: ?(.*)$", _value),
    (r"^Parser key \"[\w.]+\": Expected an? (.+?)\. Got value: ?(.*)$", _value),
    (r"the following arguments are required: (.*)$", _required),
)

"""The shape of a JSON file that Espalier has written, checked where it is read again: such files get edited and cut."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from models.errors import UserError

EACH = "*"  # as a key of a shape: every key of the mapping


@dataclass(frozen=True)
class Leaf:
    """A value that is no mapping and no list: what it is called, and whether a value is one."""

    words: str
    fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 and value == value


TEXT = Leaf("text", lambda value: isinstance(value, str))
NUMBER = Leaf("a number", _is_number)
POSITIVE = Leaf("a number above 0", lambda value: _is_number(value) and value > 0)
COUNT = Leaf("a whole number of at least 1", lambda value: type(value) is int and 1 <= value < 2**63)
VALUES = Leaf("keys and values", lambda value: isinstance(value, dict))
Shape = Leaf | Mapping[str, "Shape"] | list["Shape"]


def maybe(leaf: Leaf) -> Leaf:
    """The same, or null."""
    return Leaf(f"{leaf.words} or null", lambda value: value is None or leaf.fits(value))


def check_shape(value: Any, shape: Shape, where: str) -> None:
    """Raise UserError for the first place in a tree of JSON values that is not as the shape says.

    Args:
        shape: a leaf; `{"key": shape, "key?": shape}`, where the question mark is of keys that may be missing, and
            further keys are let by; or `[shape]`, a list of any length, or `[shape, shape]`, one of that length.
        where: the file, and the place in it.
    """
    if isinstance(shape, Leaf):
        if not shape.fits(value):
            raise UserError(f"{where} must be {shape.words}, not {_shown(value)}")
    elif isinstance(shape, list):
        if not isinstance(value, list) or (len(shape) > 1 and len(value) != len(shape)):
            many = f" of {len(shape)} values" if len(shape) > 1 else ""
            raise UserError(f"{where} must be a list{many}, not {_shown(value)}")
        for index, inner in enumerate(value):
            check_shape(inner, shape[index % len(shape)], f"{where}[{index}]")
    else:
        _check_mapping(value, shape, where)


def _check_mapping(value: Any, shape: Mapping[str, Shape], where: str) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{where} must hold keys and values, not {_shown(value)}")
    joined = "." if ": " in where else ": "
    for key, inner in shape.items():
        name = key.removesuffix("?")
        if key == EACH:
            for each, content in value.items():
                check_shape(content, inner, f"{where}{joined}{each}")
        elif name in value:
            check_shape(value[name], inner, f"{where}{joined}{name}")
        elif name == key:
            raise UserError(f"{where} has no {name!r}, which Espalier writes there")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."

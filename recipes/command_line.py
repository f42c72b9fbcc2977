"""The command line of every verb: recipes (`-c FILE`) in their order, then `--key value` and `--key.sub value`.

What comes later wins: mappings merge, lists and values are replaced, and another `kind` (or `class_path`) replaces the
mapping that it stands in.
"""

import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import jsonargparse
import yaml

from models.errors import UserError, did_you_mean
from models.parsing import Malformed, parse_yaml, read_plain

COMMAND_LINE = ("overwrite", "trust")  # a recipe may come from anybody, and neither replaces a folder nor trusts itself
_RECIPES = Path(__file__).parent


def read_value(text: str) -> Any:
    """The value of YAML on the command line or in a recipe; `Once:` and `{a, b}`, without any values, stay text."""
    value = parse_yaml(text)
    return text if isinstance(value, dict) and value and all(v is None for v in value.values()) else value


jsonargparse.set_loader("yaml", read_value, (Malformed,))  # for every parser, that of `fit` too
# jsonargparse writes defaults as YAML, and that of one of Lightning's callbacks is an Enum
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


class CommandLine(NamedTuple):
    """What stood behind a verb: files of recipes, flags with their texts, and words without a flag, each in order."""

    recipes: list[str]
    flags: list[tuple[str, str]]
    words: list[str]


def split(
    verb: str, argv: list[str], keys: Collection[str] | None = None, switches: Collection[str] = COMMAND_LINE
) -> CommandLine:
    """Separate recipes, flags and words.

    Args:
        keys: those of a recipe, dotted; a flag is one of them, or one below or above it. None: any flag will do.
        switches: flags that alone mean true.

    Raises:
        UserError: an unknown flag, or one without its value.
    """
    found, rest = CommandLine([], [], []), list(argv)
    while rest:
        argument = rest.pop(0)
        if not re.match(r"--?[A-Za-z_]", argument):
            found.words.append(argument)
            continue
        flag, equals, text = argument.partition("=")
        name, recipe = flag.removeprefix("--"), flag in ("-c", "--config")
        if not recipe and keys is not None:
            _check_flag(verb, name, keys)
        if not equals and name in switches:
            text = rest.pop(0) if rest and rest[0] in ("true", "false") else "true"
        elif not equals:
            if not rest or re.match(r"--?[A-Za-z]", rest[0]):
                needed = "the path of a recipe" if recipe else "a value"
                raise UserError(f"espalier {verb}: {argument} needs {needed}")
            text = rest.pop(0)
        if recipe:
            found.recipes.append(text)
        else:
            found.flags.append((name, text))
    return found


def _check_flag(verb: str, name: str, keys: Collection[str]) -> None:
    if not any(f"{name}.".startswith(f"{key}.") or key.startswith(f"{name}.") for key in keys):
        prefix = name.rpartition(".")[0]
        near = _nearest(name, f"{prefix}." if prefix else "", keys, "--")
        raise UserError(f"espalier {verb}: unknown option --{name.removeprefix('-')}{near}")


def nested(dotted: str, value: Any) -> dict[str, Any]:
    """`a.b` and a value as {a: {b: value}}."""
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return value


def flag_value(name: str, text: str, keys: Collection[str], texts: Collection[str]) -> Any:
    """What a flag stands for: plain values of known keys stay text, which the parser reads by their type.

    Args:
        texts: keys whose values are always text.
    """
    if name in texts:
        return text
    try:
        value = read_value(text)
    except Malformed:
        return text
    return value if name not in keys or isinstance(value, dict | list) else text


def merged(before: Any, now: Any, expand: Callable[[str, str], Any] | None = None, where: str = "") -> Any:
    """`before` with what `now` says.

    Args:
        expand: dotted key, name -> the mapping that the name stands for. None: its `kind`.
        where: the dotted key of both.
    """
    if not isinstance(now, dict):
        same = isinstance(now, str) and isinstance(before, dict) and _last(now) == _last(_name(before))
        return before if same else now
    if isinstance(before, str):
        before = {"kind": before} if expand is None else expand(where, before)
    named = _name(now)
    if not isinstance(before, dict) or (named is not None and _last(named) != _last(_name(before))):
        return now
    inner = {key: merged(before.get(key), value, expand, f"{where}.{key}".lstrip(".")) for key, value in now.items()}
    return before | inner


def _name(values: Mapping[str, Any]) -> Any:
    return values.get("kind", values.get("class_path"))


def _last(name: Any) -> str:
    """The last part of the name of a class; a kind as it is."""
    return str(name).rpartition(".")[2]


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the mapping that a YAML file holds.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    path = Path(path)
    try:
        values = read_plain(path, parse_yaml)
    except FileNotFoundError:
        raise UserError(f"there is no recipe {path}") from None
    except (OSError, Malformed) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of keys to values, not a {type(values).__name__}")
    return values


def find_recipe(name: str, file: Path, where: str | os.PathLike[str]) -> Path:
    """Return the recipe that `file` names: beside it, below the working directory, or one of Espalier's own.

    Raises:
        UserError: there is none; `where` is the place that names it.
    """
    places = [file.parent / name, Path(name).expanduser(), _RECIPES / name]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise UserError(f"{where}: there is no recipe {name} beside {file} or in the working directory")
    return found


def check_keys(values: Mapping[str, Any], keys: Collection[str], where: str | os.PathLike[str], at: str = "") -> None:
    """Raise UserError for the first key that is not among the dotted ones, with the nearest that is.

    What is below one of them is for the parser to read.
    """
    for key, value in values.items():
        path = f"{at}{key}"
        if path in keys:
            continue
        if not any(known.startswith(f"{path}.") for known in keys):
            raise UserError(f"{where}: unknown key '{path}'{_nearest(path, at, keys)}")
        if isinstance(value, Mapping):
            check_keys(value, keys, where, f"{path}.")
        elif value is not None:
            raise UserError(f"{where}: {path} must hold keys and values, not {value!r}")


def _nearest(path: str, at: str, keys: Iterable[str], dashes: str = "") -> str:
    """` (did you mean ...?)`: a sibling that is spelt alike, or the same name elsewhere, or the siblings there are."""
    last = path.removeprefix(at)
    elsewhere = sorted(known for known in keys if known.rpartition(".")[2] == last)
    siblings = {known.removeprefix(at).partition(".")[0] for known in keys if known.startswith(at)}
    near = did_you_mean(last, siblings)
    if "did you mean" not in near and elsewhere:
        return f" (did you mean '{dashes}{elsewhere[0]}'?)"
    return near.replace("did you mean '", f"did you mean '{dashes}{at if dashes else ''}")


def refuse_keys(values: Mapping[str, Any], keys: Iterable[str], where: str | os.PathLike[str]) -> None:
    """Raise UserError for a key that a recipe may not hold: what is replaced or trusted is for the person to say."""
    for key in keys:
        if key in values:
            raise UserError(
                f"{where}: '{key}' is no key of a recipe; it can only be given on the command line: --{key}"
            )


def refuse_classes(values: Mapping[str, Any], where: str | os.PathLike[str]) -> None:
    """Raise UserError for a class, however deep: the parser would import it where any value may stand."""
    for key, value in values.items():
        if (named := _class_in(value)) is not None:
            raise UserError(f"{where}: {key} names the class {named}; nothing here takes a class")


def _class_in(value: Any) -> str | None:
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"])
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((named for one in inner if (named := _class_in(one)) is not None), None)

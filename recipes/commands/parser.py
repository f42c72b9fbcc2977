"""From a dataclass of options to a command-line parser, and from a parser's complaint to one sentence."""

import argparse
import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import jsonargparse
import yaml

from models.errors import UserError, did_you_mean
from models.parsing import Malformed, parse_yaml, read_plain
from recipes.commands.options import check_numbers
from recipes.values import check_finite

Options = TypeVar("Options")
COMMAND_LINE = ("overwrite", "trust")  # a recipe may come from anybody, and neither replaces a folder nor trusts itself
_RECIPES = Path(__file__).parents[1]


def _value(text: str) -> Any:
    """The value of YAML on the command line or in a recipe; `Once:` and `{a, b}`, without any values, stay text."""
    value = parse_yaml(text)
    return text if isinstance(value, dict) and value and all(v is None for v in value.values()) else value


jsonargparse.set_loader("yaml", _value, (Malformed,))  # for every parser, that of `fit` too
# jsonargparse writes defaults as YAML, and that of one of Lightning's callbacks is an Enum
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


def build_parser(verb: str, options: type, *, partial: bool = False) -> jsonargparse.ArgumentParser:
    """Return the parser of `espalier VERB`: one argument a field, plus `-c/--config FILE` for a recipe.

    partial: nothing is required, and nothing is positional: the parser of a recipe alone.
    """
    parser = jsonargparse.ArgumentParser(
        prog=f"espalier {verb}", description=options.__doc__, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("-c", "--config", action="config", help="recipe (YAML); several merge from left to right")
    own = options.__annotations__  # what this verb alone has comes first in its help, what verbs share after that
    for field in sorted(dataclasses.fields(options), key=lambda field: field.name not in own):
        if partial:
            parser.add_argument(f"--{field.name}", type=field.type | None, default=None)
        elif "metavar" in field.metadata:
            parser.add_argument(field.name, **_arguments(field))
        else:
            parser.add_argument(f"--{field.name}", **_arguments(field))
    return parser


def _arguments(field: dataclasses.Field) -> dict[str, Any]:
    arguments: dict[str, Any] = {"type": field.type, "help": field.metadata["help"]}
    if "metavar" in field.metadata:
        arguments["metavar"] = field.metadata["metavar"]
        if field.metadata["nargs"]:
            arguments |= {"nargs": field.metadata["nargs"], "type": get_args(field.type)[0]}
        return arguments
    if field.type is bool:  # `--overwrite` alone means true
        arguments |= {"nargs": "?", "const": True}
    if field.default is not dataclasses.MISSING:
        return arguments | {"default": field.default}
    if field.default_factory is not dataclasses.MISSING:
        return arguments | {"default": field.default_factory()}
    return arguments | {"required": True}


def parse_arguments(verb: str, options: type[Options], argv: list[str]) -> Options:
    """Return the options that `argv` and the recipes it names give; what stands on the command line wins.

    Raises:
        UserError: an unknown key or flag, a value of the wrong type, a missing option, a recipe that is no YAML.
    """
    recipes, rest = _split_recipes(verb, argv)
    keys = {field.name for field in dataclasses.fields(options)}
    for recipe in recipes:
        values = read_recipe(recipe)
        check_keys(values, keys, recipe)
        refuse_keys(values, COMMAND_LINE, recipe)
        check_given(options, values, recipe)
        check = build_parser(verb, options, partial=True)
        _parsed(options, lambda: check.parse_object(values), recipe)  # noqa: B023 (called at once)
    _check_flags(verb, rest, keys)
    parser = build_parser(verb, options)
    argv = [f"--config={recipe}" for recipe in recipes] + rest
    return _checked(options(**_parsed(options, lambda: parser.parse_args(argv), parser.prog)), parser.prog)


def parse_values(verb: str, options: type[Options], values: dict[str, Any], where: str) -> Options:
    """Return the options that a mapping gives: a stage inside a pipeline file.

    Raises:
        UserError: as `parse_arguments`; `where` names the file and the stage.
    """
    check_keys(values, {field.name for field in dataclasses.fields(options)}, where)
    check_given(options, values, where)
    parser = build_parser(verb, options)
    return _checked(options(**_parsed(options, lambda: parser.parse_object(values), where)), where)


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


def check_keys(values: dict[str, Any], allowed: set[str], where: str | os.PathLike[str]) -> None:
    """Raise UserError for the first key that is not allowed, with the nearest one that is, and for a class anywhere.

    The parser would import a class that stands where any value may.
    """
    for key in values:
        if key not in allowed:
            raise UserError(f"{where}: unknown key '{key}'{did_you_mean(str(key), allowed)}")
        if (named := _class_in(values[key])) is not None:
            raise UserError(f"{where}: {key} names the class {named}; nothing here takes a class")


def refuse_keys(values: Mapping[str, Any], keys: Iterable[str], where: str | os.PathLike[str]) -> None:
    """Raise UserError for a key that a recipe may not hold: what is replaced or trusted is for the person to say."""
    for key in keys:
        if key in values:
            raise UserError(
                f"{where}: '{key}' is no key of a recipe; it can only be given on the command line: --{key}"
            )


def _class_in(value: Any) -> str | None:
    """The first `class_path` in a value of YAML, however deep; None: there is none."""
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"])
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((named for one in inner if (named := _class_in(one)) is not None), None)


def check_given(options: type, values: dict[str, Any], where: str | os.PathLike[str]) -> None:
    """Raise UserError for `null` where an option must have a value; jsonargparse takes it for one that is not given."""
    for field in dataclasses.fields(options):
        if values.get(field.name, field) is None and type(None) not in get_args(field.type):
            raise UserError(f"{where}: {field.name} must be {_describe(field.type)}, not null")


def _checked(chosen: Options, where: str) -> Options:
    try:
        check_numbers(chosen)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return chosen


def _split_recipes(verb: str, argv: list[str]) -> tuple[list[str], list[str]]:
    """Take `-c FILE` out of the arguments: recipes come first, so that the command line wins wherever it stands."""
    recipes, rest, arguments = [], [], iter(argv)
    for argument in arguments:
        if argument in ("-c", "--config"):
            recipe = next(arguments, None)
            if recipe is None:
                raise UserError(f"espalier {verb}: {argument} needs the path of a recipe")
            recipes.append(recipe)
        elif argument.startswith("--config="):
            recipes.append(argument.removeprefix("--config="))
        else:
            rest.append(argument)
    return recipes, rest


def _check_flags(verb: str, argv: list[str], keys: set[str]) -> None:
    known = {f"--{key}" for key in (*keys, "help", "print_config")}
    for argument in argv:
        flag = re.match(r"--[A-Za-z_][\w-]*", argument)
        if flag and flag[0] not in known:
            raise UserError(f"espalier {verb}: unknown option {flag[0]}{did_you_mean(flag[0], known)}")


def _parsed(options: type, parse: Callable[[], jsonargparse.Namespace], where: str) -> dict[str, Any]:
    try:
        namespace = parse()
    except argparse.ArgumentError as error:
        raise UserError(f"{where}: {_sentence(str(error), options)}") from None
    values = {field.name: getattr(namespace, field.name) for field in dataclasses.fields(options)}
    check_finite(values)
    return values


def _sentence(message: str, options: type) -> str:
    """Return jsonargparse's complaint, which spans lines and shows Python types, as one sentence."""
    fields = {field.name: field for field in dataclasses.fields(options)}
    key = re.match(r'Parser key "([\w.]+)"', message)
    if key and key[1] in fields:
        given = re.search(r"(?:Given|Got) value: (.*)", message)
        return f"{key[1]} must be {_describe(fields[key[1]].type)}, not {given[1] if given else 'that'}"
    missing = re.match(r"the following arguments are required: (.*)", message)
    if missing:
        absent = [name.strip().lstrip("-") for name in missing[1].split(",")]
        shown = [fields[name].metadata.get("metavar", f"--{name}") for name in absent if name in fields]
        return f"{' and '.join(shown)} must be given (--help lists the options)"
    return _one_line(message)


def _describe(kind: Any) -> str:
    """Return a type as a person would say it."""
    words = {
        dict: "a mapping",
        list: "a list",
        Any: "anything",
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "true or false",
        type(None): "nothing",
    }
    if (plain := kind if kind in words else get_origin(kind)) in words:
        return words[plain]
    arguments = get_args(kind)
    if arguments and all(isinstance(argument, str | int) for argument in arguments):  # a Literal
        return "one of " + ", ".join(str(argument) for argument in arguments)
    inner = [_describe(argument) for argument in arguments if argument is not type(None)]
    return " or ".join(dict.fromkeys(inner)) or str(kind)


def _one_line(message: object) -> str:
    return re.sub(r"\s+", " ", str(message)).strip()

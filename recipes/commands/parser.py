"""From a dataclass of options to a command-line parser, and from a parser's complaint to one sentence."""

import argparse
import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_args, get_origin

import jsonargparse

from models.errors import UserError
from recipes.command_line import (
    COMMAND_LINE,
    check_keys,
    flag_value,
    merged,
    nested,
    read_recipe,
    refuse_classes,
    refuse_keys,
    split,
)
from recipes.commands.options import Names, Spec, check_numbers
from recipes.kinds import describe, kinds
from recipes.values import check_finite

Options = TypeVar("Options")
Where = str | os.PathLike[str]


def print_help(verb: str, options: type) -> None:
    """Print the options of a verb, and what the registries hold that they choose from."""
    parser = build_parser(verb, options)
    lists = [(name, one.metadata) for name, one in _fields(options).items() if one.metadata["registry"]]
    parser.epilog = "\n\n".join(describe(name, more["registry"], more["beside"]) for name, more in lists)
    parser.print_help()


def build_parser(verb: str, options: type) -> jsonargparse.ArgumentParser:
    """Return the parser of `espalier VERB`, one argument a field."""
    parser = jsonargparse.ArgumentParser(
        prog=f"espalier {verb}",
        description=options.__doc__,
        formatter_class=_Help,
        exit_on_error=False,
        allow_abbrev=False,
    )
    again = "recipe (YAML); several merge from left to right"
    parser.add_argument("-c", "--config", metavar="FILE", default=argparse.SUPPRESS, help=again)
    own = options.__annotations__  # what this verb alone has comes first in its help, what verbs share after that
    fields = _fields(options)
    for name, field in sorted(fields.items(), key=lambda item: item[0] not in own):
        parser.add_argument(name if "metavar" in field.metadata else f"--{name}", **_arguments(field))
    for name, (_, kind) in short_forms(options).items():
        if name not in fields:
            parser.add_argument(f"--{name}", type=kind | None, default=None, help=argparse.SUPPRESS)
    return parser


class _Help(jsonargparse.DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of what stands below the options."""


def _fields(options: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(options)}


def _arguments(field: dataclasses.Field) -> dict[str, Any]:
    arguments: dict[str, Any] = {"type": field.type, "help": field.metadata["help"]}
    if "metavar" in field.metadata:
        arguments["metavar"] = field.metadata["metavar"]
        if field.metadata["nargs"]:
            arguments |= {"nargs": field.metadata["nargs"], "type": get_args(field.type)[0]}
        return arguments
    if field.default_factory is not dataclasses.MISSING:
        return arguments | {"default": field.default_factory()}
    return arguments | ({"required": True} if _required(field) else {"default": field.default})


def _required(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def short_forms(options: type) -> dict[str, tuple[str, Any]]:
    """The options of an object that may stand beside it: name -> (the option whose object it is, type)."""
    fields = _fields(options)
    found = {name: (field.metadata["of"], field.type) for name, field in fields.items() if field.metadata["of"]}
    for key, field in fields.items():
        for kind in kinds(field.metadata["registry"]) if field.metadata["beside"] else ():
            for one in kind.options:
                found.setdefault(one.name, (key, one.type or Spec | Names))
    return found


def parse_arguments(verb: str, options: type[Options], argv: list[str]) -> Options:
    """Return the options that `argv` and the recipes it names give; what stands on the command line wins.

    Raises:
        UserError: an unknown key or flag, a value of the wrong type, a missing option, a recipe that is no YAML.
    """
    fields, where = _fields(options), f"espalier {verb}"
    keys = {*fields, *short_forms(options)}
    line = split(verb, argv, keys, [name for name, field in fields.items() if field.type is bool])
    sources: list[tuple[Mapping[str, Any], Where]] = [(read_recipe(path), path) for path in line.recipes]
    for values, path in sources:
        refuse_keys(values, COMMAND_LINE, path)
    texts = {name for name, field in fields.items() if field.type in (str, str | None)}
    said: dict[str, Any] = {}
    for name, text in line.flags:
        said = merged(said, nested(name, flag_value(name, text, keys, texts)))
    words = list(line.words)
    for name, field in fields.items():
        if "metavar" in field.metadata and words:
            said[name] = words if field.metadata["nargs"] else words.pop(0)
            words = [] if field.metadata["nargs"] else words
    chosen = parse_sources(verb, options, [*sources, (said, where)])
    if words:
        raise UserError(f"{where}: unrecognized arguments: {' '.join(words)}")
    return chosen


def parse_sources(verb: str, options: type[Options], sources: Iterable[tuple[Mapping[str, Any], Where]]) -> Options:
    """Return the options that mappings give, each with the place that it comes from; later ones win."""
    fields, shorts = _fields(options), short_forms(options)
    values: dict[str, Any] = {name: field.default for name, field in fields.items() if field.metadata["registry"]}
    places: dict[str, Where] = {}  # of each key
    for source, where in sources:
        check_keys(source, {*fields, *shorts}, where)
        refuse_classes(source, where)
        _check_given(options, source, where)
        for name, (key, _) in shorts.items():
            if isinstance(source.get(key), dict) and name in source[key]:
                if name in source:
                    raise UserError(f"{where}: {name} stands both in {key} and beside it; keep one of them")
                values.pop(name, None)
        values = merged(values, source)
        places |= dict.fromkeys(source, where)
    if missing := [field for name, field in fields.items() if _required(field) and name not in values]:
        missing.sort(key=lambda field: "metavar" not in field.metadata)
        shown = [field.metadata.get("metavar", f"--{field.name}") for field in missing]
        raise UserError(f"{where}: {' and '.join(shown)} must be given (--help lists the options)")
    found = _parsed(verb, options, values, places)
    for name in shorts.keys() - fields.keys():
        if (value := found.pop(name)) is not None:
            key = shorts[name][0]
            found[key] = merged(found[key], {name: value})
    try:
        chosen = options(**found)
        check_finite(found)
        check_numbers(chosen)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return chosen


def _parsed(verb: str, options: type, values: Mapping[str, Any], places: Mapping[str, Where]) -> dict[str, Any]:
    """The values by their types, defaults where there are none."""
    try:
        found = vars(build_parser(verb, options).parse_object(dict(values)))
    except argparse.ArgumentError as error:
        message, where = str(error), f"espalier {verb}"
        types = {name: field.type for name, field in _fields(options).items()}
        types |= {name: kind for name, (_, kind) in short_forms(options).items()}
        if (key := re.match(r'Parser key "([\w]+)', message)) and key[1] in types:
            given = re.search(r"(?:Given|Got) value: (.*)", message)
            message = f"{key[1]} must be {_describe(types[key[1]])}, not {given[1] if given else 'that'}"
            where = places.get(key[1], where)
        raise UserError(f"{where}: {' '.join(message.split())}") from None
    except RecursionError:
        raise UserError(f"espalier {verb}: a value holds lists or mappings nested too deep to be read") from None
    return {key: value for key, value in found.items() if key != "config"}


def _check_given(options: type, values: Mapping[str, Any], where: Where) -> None:
    """Raise UserError for `null` where an option must have a value; jsonargparse takes it for one that is not given."""
    for name, field in _fields(options).items():
        if values.get(name, field) is None and type(None) not in get_args(field.type):
            raise UserError(f"{where}: {name} must be {_describe(field.type)}, not null")


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

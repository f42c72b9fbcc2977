"""The arguments of fit, validate, test and predict before jsonargparse sees them.

Three things are done here because the parser cannot: sub-keys of the architecture on the command line
(`--model.architecture.width 512`), the flags that mean the same in every verb (`--data`, `--seed`, `--device`, ...),
and one clear sentence for an unknown key or flag.
"""

import copy
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from app.tasks.architecture import read_architecture
from models.errors import UserError, did_you_mean
from models.parsing import Malformed, parse_yaml
from recipes.commands.parser import COMMAND_LINE, read_recipe, refuse_keys

ARCHITECTURE = "model.architecture"
ALIASES = {  # a flag that every verb understands alike -> the keys of a recipe that it sets
    "data": ("data.source",),
    "sequence_length": ("data.sequence_length",),
    "seed": ("seed_everything", "data.seed"),
    "device": ("trainer.accelerator",),
    "dtype": ("model.compute_dtype",),
}
FLAGS = ("overwrite", "trust")  # may stand without a value


def prepare(verb: str, argv: list[str], keys: Iterable[str]) -> list[str]:
    """Return `argv` as the parser of `verb` understands it.

    Args:
        verb: fit, validate, test or predict.
        argv: what stood behind the verb.
        keys: the keys that the parser knows, dotted.

    Raises:
        UserError: an unknown key in a recipe, an unknown flag, a recipe that cannot be read.
    """
    keys = set(keys)
    recipes, flags = _split(verb, argv)
    architecture: Any = None
    for path in recipes:
        values = read_recipe(path)
        refuse_keys(values, (*COMMAND_LINE, "config"), path)
        check_keys(values, keys, path)
        architecture = _found(values, ARCHITECTURE) or architecture
    rest, changes = [], {}
    for name, value in flags:
        _check_flag(verb, name, keys)
        if name.startswith(f"{ARCHITECTURE}."):
            changes[name.removeprefix(f"{ARCHITECTURE}.")] = _plain(value)
        elif name == ARCHITECTURE:
            architecture, changes = _plain(value), {}
        else:
            for target in _targets(name, value):
                rest += [f"--{target}"] if value is None else [f"--{target}={value}"]
    if changes:
        architecture = changed(read_architecture(architecture or {}), changes)
    if architecture is not None:
        text = architecture if isinstance(architecture, str) else json.dumps(numbers(architecture))
        rest.append(f"--{ARCHITECTURE}={text}")
    return [f"--config={path}" for path in recipes] + rest


def changed(architecture: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the architecture with dotted keys set; a spec given as a bare name becomes `{kind: NAME}` first."""
    result = copy.deepcopy(dict(architecture))
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        place = result
        for parent in parents:
            inner = place.get(parent)
            if isinstance(inner, str):
                inner = {"kind": inner}
            if inner is not None and not isinstance(inner, dict):
                raise UserError(f"--{ARCHITECTURE}.{dotted}: {parent} is {inner!r} and has no keys")
            place[parent] = {} if inner is None else inner
            place = place[parent]
        place[last] = value
    return result


def check_keys(values: Mapping[str, Any], keys: set[str], where: str | Path, prefix: str = "") -> None:
    """Raise UserError for the first key that no parser argument has, with the nearest one that does."""
    for key, value in values.items():
        path = f"{prefix}{key}"
        if path in keys:
            continue
        if not any(known.startswith(f"{path}.") for known in keys):
            raise UserError(f"{where}: unknown key '{path}'{_nearest(path, prefix, keys)}")
        if isinstance(value, Mapping):
            check_keys(value, keys, where, f"{path}.")
        elif value is not None:
            raise UserError(f"{where}: {path} must hold keys and values, not {value!r}")


def trusting(argv: list[str]) -> bool:
    """Whether recipes may name any class. The processes that Lightning starts for other devices get the same `argv`."""
    return "--trust" in argv


def _split(verb: str, argv: list[str]) -> tuple[list[str], list[tuple[str, str | None]]]:
    """Separate the recipes from the flags, each flag with its value or None."""
    recipes, flags, i = [], [], 0
    while i < len(argv):
        argument = argv[i]
        name, equals, value = argument.lstrip("-").partition("=")
        following = argv[i + 1] if i + 1 < len(argv) else None
        alone = following is None or re.match(r"--?[A-Za-z]", following) is not None
        i += 1
        if not argument.startswith("-"):
            raise UserError(f"espalier {verb}: '{argument}' stands alone; a recipe is given with -c {argument}")
        if not equals and not alone:
            value, equals, i = following, "=", i + 1
        if argument.startswith(("-c", "--config")) and name in ("c", "config"):
            if not equals:
                raise UserError(f"espalier {verb}: {argument} needs the path of a recipe")
            recipes.append(value)
        elif name in FLAGS and not equals:
            flags.append((name, "true"))
        else:
            flags.append((name, value if equals else None))
    return recipes, [(name, value) for name, value in flags if name != "trust"]


def _targets(name: str, value: str | None) -> tuple[str, ...]:
    if name == "data" and value is not None and value.endswith((".yaml", ".yml")):
        return (name,)
    return ALIASES.get(name, (name,))


def _check_flag(verb: str, name: str, keys: set[str]) -> None:
    name = name.rstrip("+")
    if name in ("h", "help", "print_config") or name in keys or name in ALIASES or name.startswith("help."):
        return
    name = name.removesuffix(".help")
    if any(known.startswith(f"{name}.") or name.startswith(f"{known}.") for known in keys) or name in keys:
        return
    prefix = name.rpartition(".")[0]
    near = _nearest(name, f"{prefix}." if prefix else "", keys | set(ALIASES)).replace("'", "")
    raise UserError(f"espalier {verb}: unknown option --{name}{near}")


def _nearest(path: str, prefix: str, keys: set[str]) -> str:
    """` (did you mean ...?)`: a sibling that is spelt alike, or the same name elsewhere, or the siblings there are."""
    last = path.removeprefix(prefix)
    elsewhere = sorted(known for known in keys if known.rpartition(".")[2] == last)
    siblings = {known.removeprefix(prefix).partition(".")[0] for known in keys if known.startswith(prefix)}
    near = did_you_mean(last, siblings)
    if "did you mean" not in near and elsewhere:
        return f" (did you mean '{elsewhere[0]}'?)"
    return near


def _found(values: Mapping[str, Any], dotted: str) -> Any:
    for key in dotted.split("."):
        values = values.get(key) if isinstance(values, Mapping) else None
    return values


def _plain(value: str | None) -> Any:
    try:
        return parse_yaml(value or "")
    except Malformed:
        return value


def numbers(value: Any) -> Any:
    """Return a value of YAML 1.1, which reads `5e5` as a text, with such texts as numbers."""
    if isinstance(value, Mapping):
        return {key: numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [numbers(inner) for inner in value]
    exponent = isinstance(value, str) and re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", value)
    return float(value) if exponent else value

"""The arguments of fit, validate, test and predict as one mapping, which jsonargparse then reads."""

import re
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from app.tasks.architecture import read_architecture
from models.errors import UserError
from recipes.command_line import (
    COMMAND_LINE,
    check_keys,
    flag_value,
    merged,
    nested,
    read_recipe,
    refuse_keys,
    split,
)
from recipes.trust import HARMLESS

ARCHITECTURE = "model.architecture"
ALIASES = {  # a flag that every verb understands alike -> the keys of a recipe that it sets
    "data": ("data.source",),
    "sequence_length": ("data.sequence_length",),
    "seed": ("seed_everything", "data.seed"),
    "device": ("trainer.accelerator",),
    "dtype": ("model.compute_dtype",),
    "model.from": ("model.from_",),
}
TASK = "model.task"
OF_A_CLASS = ("class_path", "init_args", "dict_kwargs")
SHOWN = re.compile(r"-h$|--([\w.]+\.)?help\b|--print_config")  # what is asked for in place of a run


def trusting(argv: list[str]) -> bool:
    """Whether recipes may name any class. The processes that Lightning starts for other devices get the same `argv`."""
    return "--trust" in argv


def chosen_task(verb: str, argv: list[str]) -> str | None:
    """The kind of `model.task` that recipes and flags name, which decides what options `data` has; None: they do not.

    Nothing else is looked at yet.
    """
    line = split(verb, [argument for argument in argv if not SHOWN.match(argument)])
    values: dict[str, Any] = {}
    for path in line.recipes:
        values = merged(values, read_recipe(path))
    for name, text in line.flags:
        if f"{name}.".startswith(f"{TASK}."):
            values = merged(values, nested(name, flag_value(name, text, (), ())))
    model = values.get("model")
    task = model.get("task") if isinstance(model, dict) else None
    kind = task.get("kind") if isinstance(task, dict) else task
    return kind if isinstance(kind, str) else None


def types_of(parser: LightningArgumentParser) -> dict[str, Any]:
    """The dotted keys of a recipe, with their types."""
    types = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    keys = {key.removesuffix(".help") for key in types}
    return {key: types.get(key) for key in keys if not any(other.startswith(f"{key}.") for other in keys)}


def prepare(verb: str, argv: list[str], types: dict[str, Any]) -> dict[str, Any]:
    """Return what recipes and flags say together.

    Args:
        verb: fit, validate, test or predict.
        argv: what stood behind the verb.
        types: the keys that the parser knows, dotted, with their types.

    Raises:
        UserError: an unknown key in a recipe, an unknown flag, a recipe that cannot be read.
    """
    line = split(verb, argv, {*types, *ALIASES, "trust"})
    if line.words:
        word = line.words[0]
        raise UserError(f"espalier {verb}: '{word}' stands alone; a recipe is given with -c {word}")
    values: dict[str, Any] = {}
    for path in line.recipes:
        recipe = _with_reserved(read_recipe(path))
        refuse_keys(recipe, (*COMMAND_LINE, "config"), path)
        check_keys(recipe, types.keys(), path)
        values = merged(values, recipe, expand=expand)
    for name, text in line.flags:
        for key in _targets(name, text):
            values = _with_flag(values, key, text, types)
    return values


def _with_reserved(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe with `model.from`, a word of Python's, under the name that the parser knows it by."""
    model = recipe.get("model")
    if not isinstance(model, dict) or "from" not in model:
        return recipe
    return recipe | {"model": {("from_" if key == "from" else key): value for key, value in model.items()}}


def expand(where: str, name: str) -> dict[str, Any]:
    """What a bare name stands for, so that it can be changed in part."""
    if where == ARCHITECTURE:
        return read_architecture(name)
    return {"class_path" if where in HARMLESS else "kind": name}


def _targets(name: str, text: str) -> tuple[str, ...]:
    if name == "trust":
        return ()
    if name == "data" and text.endswith((".yaml", ".yml")):
        return (name,)
    return ALIASES.get(name, (name,))


def _with_flag(values: dict[str, Any], key: str, text: str, types: dict[str, Any]) -> dict[str, Any]:
    texts = [name for name, kind in types.items() if kind in (str, str | None)]
    value = flag_value(key, text, types.keys(), texts)
    if isinstance(value, str) and any(name.startswith(f"{key}.") for name in types):  # a part of a recipe in its file
        value = read_recipe(value)
        check_keys(value, types.keys(), f"--{key} {text}", f"{key}.")
    return merged(values, nested(_in_class(key), value), expand=expand)


def _in_class(key: str) -> str:
    """The key of an option of a class, which stands among its `init_args`."""
    for name in HARMLESS:
        if key.startswith(f"{name}.") and key.removeprefix(f"{name}.").partition(".")[0] not in OF_A_CLASS:
            return f"{name}.init_args.{key.removeprefix(f'{name}.')}"
    return key

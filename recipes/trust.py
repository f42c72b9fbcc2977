"""Trust: the classes that a recipe may name without `--trust`, and the check of a parsed recipe.

A recipe may come from anybody. A class that starts processes, unpickles, sends figures to a service or writes where it
is told is not in the list; neither is one that is not needed. With `--trust` any class may be named anywhere.
"""

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from jsonargparse import Namespace, set_parsing_settings

from models.errors import UserError

REFUSED = ("trainer.default_root_dir", "trainer.model_registry")  # a place to write, and one to send checkpoints to


@dataclass(frozen=True)
class Harmless:
    """A class that a recipe may name.

    Attributes:
        why: it does no harm.
        options: those that may hold text, a list or a mapping; any option may hold a number, true, false or null.
        paths: options that name a place to write, which is below the folder of the run.
    """

    why: str
    options: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()


_NUMBERS, _PROFILE = "It takes numbers.", ("dirpath", "filename")
HARMLESS = {  # the keys that take a class, or a list of them -> the classes
    "model.optimizer": {
        "app.optim.AdamW": Harmless(_NUMBERS, ("betas",)),
        "app.optim.Muon": Harmless(_NUMBERS, ("betas",)),
    },
    "model.schedule": {
        "app.optim.Constant": Harmless(_NUMBERS),
        "app.optim.Cosine": Harmless(_NUMBERS),
        "app.optim.WarmupStableDecay": Harmless(_NUMBERS),
    },
    "model.compile": {
        "app.tasks.compile.CompileBlocks": Harmless("Its backend is one that torch knows.", ("mode", "backend")),
    },
    "model.activation_checkpointing": {
        "app.activation_checkpointing.CheckpointBlocks": Harmless("It has no options."),
        "app.activation_checkpointing.CheckpointOperations": Harmless("It has no options."),
    },
    "trainer.callbacks": {
        "lightning.pytorch.callbacks.DeviceStatsMonitor": Harmless("It logs the load of the devices."),
        "lightning.pytorch.callbacks.EarlyStopping": Harmless("It ends a run by a logged figure.", ("monitor", "mode")),
        "lightning.pytorch.callbacks.GradientAccumulationScheduler": Harmless(_NUMBERS, ("scheduling",)),
        "lightning.pytorch.callbacks.LearningRateMonitor": Harmless("It logs the rate.", ("logging_interval",)),
        "lightning.pytorch.callbacks.ModelSummary": Harmless("It prints a table of the layers."),
        "lightning.pytorch.callbacks.RichModelSummary": Harmless("It prints a table of the layers."),
        "lightning.pytorch.callbacks.RichProgressBar": Harmless("It prints a bar.", ("theme",)),
        "lightning.pytorch.callbacks.Timer": Harmless("It ends a run by the clock.", ("duration", "interval")),
        "lightning.pytorch.callbacks.TQDMProgressBar": Harmless("It prints a bar."),
    },
    "trainer.logger": {
        "lightning.pytorch.loggers.CSVLogger": Harmless(
            "It writes figures as text.", ("prefix",), ("save_dir", "name", "version")
        ),
        "lightning.pytorch.loggers.TensorBoardLogger": Harmless(
            "It writes figures as events.", ("prefix",), ("save_dir", "name", "version", "sub_dir")
        ),
    },
    "trainer.profiler": {
        "lightning.pytorch.profilers.AdvancedProfiler": Harmless("It writes times as text.", (), _PROFILE),
        "lightning.pytorch.profilers.PyTorchProfiler": Harmless("It writes a trace.", ("sort_by_key",), _PROFILE),
        "lightning.pytorch.profilers.SimpleProfiler": Harmless("It writes times as text.", (), _PROFILE),
    },
    "trainer.strategy": {
        "app.strategies.FSDP2": Harmless("It starts this command on other devices.", ("process_group_backend",)),
        "lightning.pytorch.strategies.DDPStrategy": Harmless(
            "It starts this command on other devices.", ("process_group_backend", "timeout", "start_method")
        ),
        "lightning.pytorch.strategies.SingleDeviceStrategy": Harmless("It moves tensors to a device.", ("device",)),
    },
    "trainer.plugins": {
        "lightning.pytorch.plugins.environments.LightningEnvironment": Harmless("It reads the environment."),
        "lightning.pytorch.plugins.environments.SLURMEnvironment": Harmless("It reads the environment."),
        "lightning.pytorch.plugins.environments.TorchElasticEnvironment": Harmless("It reads the environment."),
    },
}


def local_files_only() -> None:
    """Let the parser read recipes from this machine alone: Lightning lets it open any address that fsspec knows."""
    set_parsing_settings(config_read_mode_fsspec_enabled=False, config_read_mode_urls_enabled=False)


def restrict_imports() -> None:
    """Let the parser import the classes of the list alone, and make none where a value may be anything."""
    names = {name for kinds in HARMLESS.values() for kind in kinds for name in (kind, _own_name(kind))}
    set_parsing_settings(
        import_path_denylist=["*"], import_path_allowlist=sorted(names), instantiate_subclass_spec_in_any=False
    )


@cache
def _own_name(kind: str) -> str:
    """The name of a class by the module that defines it."""
    module, _, name = kind.rpartition(".")
    found = getattr(importlib.import_module(module), name)
    return f"{found.__module__}.{found.__qualname__}"


def check_recipe(values: Mapping[str, Any]) -> None:
    """Raise UserError for what a parsed recipe names and may not without `--trust`.

    Args:
        values: keys and values, classes as `{class_path: NAME, init_args: {...}}`, nothing instantiated.
    """
    for key in REFUSED:
        if _at(values, key) is not None:
            raise UserError(f"{key} is for --trust only; what a run writes goes to OUT and OUT.run")
    for key, specification in _classes(values):
        _check_class(key, specification)


def refusal(key: str, named: str) -> str:
    """The sentence for a class that only `--trust` allows."""
    able = [kind.rpartition(".")[2] for kind in HARMLESS.get(key, ())]
    return f"{key} names {named}; without --trust it may name {', '.join(able) or 'no class'}"


def _classes(value: Any, key: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every mapping with a `class_path`, wherever it stands, with its dotted key; none inside another."""
    if isinstance(value, Mapping):
        if "class_path" in value:
            yield key, value
            return
        for name, inner in value.items():
            yield from _classes(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _classes(inner, key)


def _check_class(key: str, specification: Mapping[str, Any]) -> None:
    named = str(specification["class_path"])
    known = next((kind for kind in HARMLESS.get(key, ()) if named in (kind, _own_name(kind))), None)
    if known is None:
        raise UserError(refusal(key, named))
    kind, harmless = known.rpartition(".")[2], HARMLESS[key][known]
    for name, value in _arguments(specification).items():
        if name in harmless.paths:
            _check_place(f"{key}: {name} of {kind}", value)
        elif name in harmless.options:
            if inner := next(_classes(value), None):
                raise UserError(f"{key}: {name} of {kind} names {inner[1]['class_path']}, which only --trust allows")
        elif value and not isinstance(value, bool | int | float):
            raise UserError(f"{key}: {name} of {kind} is {value!r}; only --trust allows more than a number there")


def _arguments(specification: Mapping[str, Any]) -> dict[str, Any]:
    return {**(specification.get("init_args") or {}), **(specification.get("dict_kwargs") or {})}


def _check_place(what: str, value: Any) -> None:
    """Raise UserError for a path that leads, or could lead, out of the folder that it is taken from."""
    text = "" if value is None else str(value)
    path = PurePath(text)
    if path.is_absolute() or ".." in path.parts or any(sign in text for sign in ("~", "$", "://", "\0")):
        raise UserError(f"{what} is {text!r}; without --trust it must be a plain path, which is below OUT.run")


def place_below(trainer: Namespace, run: Path | None) -> None:
    """Take the relative paths of the trainer's loggers and profilers from the run's folder, in place.

    Raises:
        UserError: there is one, and no run's folder.
    """
    loggers = trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
    for one in (*loggers, trainer.profiler):
        arguments = one.get("init_args") if isinstance(one, Namespace) else None
        for name in ("save_dir", "dirpath"):
            if not arguments or (given := arguments.get(name)) is None:
                continue
            if run is None:
                raise UserError(f"trainer: {name} is {str(given)!r}, and without --out there is no folder of a run")
            arguments[name] = str(run / given)


def _at(values: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        values = values.get(key) if isinstance(values, Mapping) else None
    return values

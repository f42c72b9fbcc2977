"""Numbers that every parser takes and no run can mean, refused before any work."""

import importlib
import math
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, get_args, get_type_hints

from models.errors import UserError

LEAST: dict[str, tuple[float, tuple[Any, ...]]] = {  # key of a recipe of fit: smallest number, and what else may stand
    "trainer.max_steps": (1, (-1,)),
    "trainer.max_epochs": (1, (-1,)),
    "trainer.min_steps": (0, ()),
    "trainer.min_epochs": (0, ()),
    "trainer.accumulate_grad_batches": (1, ()),
    "trainer.num_nodes": (1, ()),
    "trainer.devices": (1, (-1,)),
    "trainer.check_val_every_n_epoch": (1, ()),
    "trainer.log_every_n_steps": (0, ()),
    "trainer.val_check_interval": (1e-9, ()),
    "trainer.limit_train_batches": (1e-9, ()),
    "trainer.limit_val_batches": (0, ()),
    "trainer.limit_test_batches": (0, ()),
    "trainer.limit_predict_batches": (0, ()),
    "trainer.overfit_batches": (0, ()),
    "trainer.num_sanity_val_steps": (0, (-1,)),
    "trainer.reload_dataloaders_every_n_epochs": (0, ()),
    "data.vocab_size": (257, ()),  # the bytes, and the end of text
    "model.z_loss": (0, ()),
    "samples.max_new_tokens": (1, ()),
    "samples.temperature": (0, ()),
    "samples.seed": (0, ()),
}
MOST = {  # key of a recipe of fit: largest number; what is above ends the machine's memory or never ends
    "trainer.accumulate_grad_batches": 10**6,
    "trainer.devices": 1024,
    "trainer.num_nodes": 10**5,
    "data.batch_size": 10**6,
    "data.sequence_length": 2**30,
    "data.vocab_size": 2**22,
    "data.workers": 1024,
    "samples.max_new_tokens": 10**6,
}
LARGEST = 2**32  # of a seed: NumPy's generators have 32 bits


def check_finite(values: Mapping[str, Any], where: str = "") -> None:
    """Raise UserError for the first number in nested mappings and lists that is infinite or none at all."""
    for key, value in values.items():
        inner = dict(enumerate(value)) if isinstance(value, list | tuple) else value
        if isinstance(inner, Mapping):
            check_finite(inner, f"{where}{key}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}{key} is {value}; it must be a finite number")


def check_nulls(values: Mapping[str, Any], where: str = "") -> None:
    """Raise UserError for an option of a class that is null and may not be: the parser passes it on to the class."""
    if isinstance(values.get("class_path"), str) and isinstance(values.get("init_args"), Mapping):
        module, _, name = values["class_path"].rpartition(".")
        hints = get_type_hints(getattr(importlib.import_module(module), name).__init__)
        for key, value in values["init_args"].items():
            if value is None and key in hints and type(None) not in get_args(hints[key]) and hints[key] is not Any:
                raise UserError(f"{where}{key} of {name} is null; give a value, or leave it out for its default")
    for key, value in values.items():
        if isinstance(value, Mapping):
            check_nulls(value, where if key == "init_args" else f"{where}{key}.")


def check_times(trainer: Mapping[str, Any]) -> None:
    """Raise UserError for a time, given as a mapping, that is not above 0 or none that `timedelta` knows."""
    for key in ("val_check_interval", "max_time"):
        value = trainer.get(key)
        try:
            right = not isinstance(value, Mapping) or timedelta(**value) > timedelta(0)
        except (TypeError, ValueError, OverflowError):
            right = False
        if not right:
            raise UserError(f"trainer.{key} is {value}; a time must be above 0, such as {{hours: 1}} or 00:01:00:00")


def check_numbers(flat: Mapping[str, Any]) -> None:
    """Raise UserError for a number of a recipe of fit, given by dotted keys, that is out of the range of its key."""
    for key, (least, others) in LEAST.items():
        value = flat.get(key)
        if isinstance(value, int | float) and value < least and value not in others:
            bound = "above 0" if 0 < least < 1 else f"at least {least:g}"
            also = f", or {' or '.join(str(other) for other in others)}" if others else ""
            raise UserError(f"{key} is {value}; it must be {bound}{also}")
    for key, most in MOST.items():
        value = flat.get(key)
        if isinstance(value, int) and value > most:
            raise UserError(f"{key} is {value}; it must be at most {most:,}")
    for key in ("data.seed", "samples.seed"):
        if (flat.get(key) or 0) >= LARGEST:
            raise UserError(f"{key} is {flat[key]}; it must be at least 0 and below 2^32")

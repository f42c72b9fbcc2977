"""The shared core: pure PyTorch, one device, no Lightning. `models.load(folder)` loads a model folder."""

from typing import Any

from models.cpu.features import guard_onednn

guard_onednn()  # before the first bf16 product of the process: see there


def __getattr__(name: str) -> Any:
    """`load`, fetched when it is first asked for: importing `models` must not import torch."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from models.checkpoint import load

    return load

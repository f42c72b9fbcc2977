"""Quantization methods by name: one file a method, each registered here and chosen in YAML as `{kind: gptq, ...}`."""

from typing import Protocol

from compress.quantization.grid import IntFormat
from models.registry import Registry

METHODS = Registry("method", example="{kind: gptq, act_order: false}")


class Quantizer(Protocol):
    """What a registered class offers beside `compress.calibration.Method`: a frozen dataclass of the method's numbers.

    Attributes:
        format: the integer grid, for a method that has one; filled in from the options `bits`, `group_size` and
            `symmetric`, which stand beside the method and not in it.
        calibrates: whether it looks at calibration text.
        grid: which of `bits`, `group_size` and `symmetric` mean something to it; the others are refused when given.
        bits: the bits of a weight that it can be asked for; empty where it has no such number.
    """

    format: IntFormat
    calibrates: bool
    grid: tuple[str, ...]
    bits: tuple[int, ...]

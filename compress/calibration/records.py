"""Layer records: achieved beside requested compression of each layer, with the reason where it was skipped."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LayerRecord:
    """One layer of a compression run.

    Attributes:
        name: module name in the model, e.g. `blocks.0.attention.q`.
        shape: of its dense weight, (out, in) or (vocabulary, width); empty where no weight is meant.
        requested: what was asked for, e.g. `{"method": "gptq", "bits": 3, "group_size": 64}`.
        achieved: what came out in the same words, e.g. `{"bits": 3.25}` with scales, zeros and padding counted.
        error: relative squared error, or None where none was measured. `achieved["error_of"]` says of what:
            `outputs`, |X(W - V)'|^2 / |XW'|^2 over the calibration tokens, or `weights`, |W - V|^2 / |W|^2.
        seconds: spent on this layer.
        note: reason why it was skipped, or which fallback was taken; empty when all went as asked.
        skipped: whether the layer was left as it was.
    """

    name: str
    shape: tuple[int, ...]
    requested: dict[str, Any] = field(default_factory=dict)
    achieved: dict[str, Any] = field(default_factory=dict)
    error: float | None = None
    seconds: float = 0.0
    note: str = ""
    skipped: bool = False

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON types."""
        return {**asdict(self), "shape": list(self.shape)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "LayerRecord":
        """The inverse of `to_dict`."""
        return cls(**{**data, "shape": tuple(data["shape"])})

    @classmethod
    def skip(
        cls, name: str, shape: tuple[int, ...], reason: str, requested: dict[str, Any] | None = None
    ) -> "LayerRecord":
        """A layer that was left as it was, and why."""
        return cls(name, tuple(shape), requested or {}, {}, None, 0.0, reason, True)

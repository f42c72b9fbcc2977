"""Pruning methods by name: each is registered here and chosen in YAML as `{kind: wanda, pattern: "2:4"}`.

To add a method, write a frozen dataclass of its options that is a `PruningMethod`, or a `Criterion` (sparsify.py) where
it scores single weights, put `@METHODS.register("name")` above it and its module into `compress/pruning/__init__.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import nn

from compress.calibration.records import LayerRecord
from compress.calibration.sequential import Batch, Progress
from compress.calibration.store import Store
from models.config import ModelConfig
from models.registry import Registry

METHODS = Registry("method", example="{kind: wanda, pattern: 2:4}")


class PruningMethod(ABC):
    """Base class of the registered methods, each a frozen dataclass of its options.

    Attributes:
        split: of the text, from which its batches are drawn.
    """

    kind: ClassVar[str]
    split: ClassVar[str] = "train"

    @property
    def calibrated(self) -> bool:
        """Whether it looks at text."""
        return True

    @abstractmethod
    def title(self) -> str:
        """The method in a few words: "Wanda, 50%"."""

    def check(self, config: ModelConfig) -> None:  # noqa: B027  (most prune every model)
        """Raise UserError for a model that has nothing of what the method prunes."""

    @abstractmethod
    def prune(
        self,
        model: nn.Module,
        batches: Sequence[Batch] | None,
        *,
        store: Store,
        progress: Callable[[Progress], None],
        searching: Callable[[int, int], None],
    ) -> tuple[list[LayerRecord], dict[str, Any]]:
        """Prune a `Transformer` in place; `model.config` is true afterwards.

        Args:
            batches: text, where it is `calibrated`.
            store: what an interrupted run goes on from.
            progress: called for each layer that is done.
            searching: called with (done, in all) by a method that tries changes of the whole model instead.

        Returns the record of every layer, and JSON by the name of the file that keeps it beside the model.
        """

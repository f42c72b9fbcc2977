"""Allocation of sparsity: how much each layer gives up, where a share of all weights goes."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import nn

from compress.calibration.sequential import Batch
from models.registry import Registry

LAYER_SPARSITIES = Registry("allocation of sparsity", example="{kind: owl, spread: 0.08}")


class SparsityAllocation(ABC):
    """Base class of the registered allocations, each a frozen dataclass of its options.

    Attributes:
        calibrated: whether it looks at text.
    """

    kind: ClassVar[str]
    calibrated: ClassVar[bool] = False

    @abstractmethod
    def sparsities(
        self, model: nn.Module, shapes: Mapping[str, tuple[int, int]], sparsity: float, batches: Sequence[Batch] | None
    ) -> dict[str, float]:
        """The sparsity of each layer, in [0, 1); over all their weights it is `sparsity`.

        Args:
            model: a dense `Transformer`; it stays as it is.
            shapes: name of a linear layer -> (out, in) of its weight.
            batches: calibration tokens, where it is `calibrated`.

        Raises:
            UserError: there is no such allocation.
        """

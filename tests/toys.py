"""A quantizer and a pruning criterion of a few lines, for tests that register them."""

from dataclasses import dataclass

import torch

from compress.calibration.records import LayerRecord
from compress.pruning.sparsify import Criterion
from compress.quantization.quantizer import Quantizer, requested


@dataclass(frozen=True)
class Halves(Quantizer):
    """Every weight to the nearest multiple of `step`; nothing is packed."""

    step: float = 0.5

    def compress(self, name, module, statistic):
        module.weight.data = (module.weight / self.step).round() * self.step
        return None, LayerRecord(name, tuple(module.weight.shape), requested(self))


@dataclass(frozen=True)
class Column(Criterion):
    """The number of the input."""

    def scores(self, weight, statistic):
        return torch.arange(weight.shape[1], dtype=torch.float32).expand_as(weight)

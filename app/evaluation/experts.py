"""Expert usage: statistics of the latest forwards, summed by layer.

load               share of the pairs of token and expert that each expert got (models/experts/mixture.py)
load_variation     standard deviation of the load over its mean: 0 where all experts get the same
dropped            share of the pairs that found no room
entropy            of the router's probabilities, in nats, the mean over tokens
balance            the auxiliary loss without its weight: 1 where the load is even

L layers with experts, E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.experts import MixtureOfExperts

SINGLES = ("dropped", "entropy", "balance")

Figures = dict[str, dict]  # layer -> {"load": [E numbers], "load_variation", "dropped", "entropy", "balance"}


class Loads:
    """Adds up the statistics of every layer with experts. Nothing waits for the device before `figures`.

    Args:
        model: a Transformer.
    """

    def __init__(self, model: nn.Module) -> None:
        found = {name: module for name, module in model.named_modules() if isinstance(module, MixtureOfExperts)}
        self.layers = {name.removesuffix(".feedforward"): module for name, module in found.items()}
        self.clear()

    def clear(self) -> None:
        """Forget what was added."""
        self.total: Tensor | None = None  # every layer's load and its single figures one behind another, fp64
        self.tokens = 0

    def add(self, tokens: int) -> None:
        """Take in the latest forward, which ran on so many tokens."""
        parts = []
        for module in self.layers.values():
            found = module.statistics
            parts += [found.load, *(getattr(found, name).reshape(1) for name in SINGLES)]
        if parts:
            now = tokens * torch.cat([part.double() for part in parts])
            self.total = now if self.total is None else self.total + now
            self.tokens += tokens

    def means(self) -> Tensor | None:
        """The mean over the tokens, all layers in one tensor; None where nothing was added."""
        return None if self.total is None else self.total / max(1, self.tokens)

    def figures(self, means: Tensor | None = None) -> Figures:
        """Every layer's figures from `means` (by default this object's), read from the device in one go."""
        means = self.means() if means is None else means
        if means is None:
            return {}
        values, found = means.tolist(), {}
        for name, module in self.layers.items():
            count = module.spec.count
            load, singles, values = values[:count], values[count:][: len(SINGLES)], values[count + len(SINGLES) :]
            found[name] = {"load": load, "load_variation": variation(load), **dict(zip(SINGLES, singles, strict=True))}
        return found


def variation(load: Sequence[float]) -> float:
    """Standard deviation over mean; 0 for experts that nothing reached."""
    mean = sum(load) / len(load)
    return (sum((one - mean) ** 2 for one in load) / len(load)) ** 0.5 / mean if mean else 0.0

"""Observer: forward pre-hooks that update the statistics of linear layers on calibration tokens.

B batch, T tokens of a row, N tokens, K input channels of a linear layer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compress.calibration.statistics import Statistic, StatisticType


class Enough(Exception):
    """Every statistic has had its share of this batch: the rest of the forward would change nothing."""


class Observer:
    """Updates statistics from forward pre-hooks; linear layers that read the very same tensor share one statistic.

    `depth` is the router of a block that only some tokens take part in: what fills up its rows is no token.
    """

    def __init__(self, types: dict[str, StatisticType], device: torch.device, depth: nn.Module | None = None) -> None:
        self.types, self.device, self.depth = types, device, depth
        self.statistics: dict[str, Statistic] = {}
        self.valid: Tensor | None = None
        self._owners: dict[str, str] = {}  # map -> the one that updates its statistic
        self._seen: dict[tuple[int, StatisticType], tuple[Tensor, str]] = {}
        self._calls: list[str] = []
        self._first: list[str] | None = None  # the calls of the first batch, when they have reached every map

    def begin(self, valid: Tensor | None) -> None:
        """A new batch: `valid` (B, T) marks its tokens that are not padding; None means all of them."""
        if self._first is None and set(self._calls) == set(self.types):
            self._first = self._calls
        self.valid, self._calls = valid, []
        self._seen.clear()

    def take(self, name: str, x: Tensor) -> None:
        """The map `name` reads x (B, T, K), or (N, K) where tokens were picked. Raises Enough after the last map."""
        _, owner = self._seen.setdefault((id(x), self.types[name]), (x, name))  # held, so that its id stays its own
        if self._owners.setdefault(name, owner) != owner:
            self._part(name)
        if self._owners[name] == name:
            if name not in self.statistics:
                self.statistics[name] = self.types[name](x.shape[-1], self.device)
            if torch.is_autocast_enabled(x.device.type):  # what the map will compute with
                x = x.to(torch.get_autocast_dtype(x.device.type))
            valid = self._real()
            whole = valid is None or x.shape[:-1] != valid.shape
            self.statistics[name].update(x.flatten(0, -2) if whole else x[valid.to(x.device)])  # (N, K)
        self.statistics[name] = self.statistics[self._owners[name]]
        self._calls.append(name)
        if self._calls == self._first:
            raise Enough

    def real(self, count: int) -> Tensor | None:
        """Mask of the tokens among the `count` rows that now pass (bool, (count,)); None: all of them."""
        valid = self._real()
        return None if valid is None or valid.numel() != count else valid.flatten()

    def _real(self) -> Tensor | None:
        return self.valid if self.depth is None else self.depth.kept

    def _part(self, name: str) -> None:
        """Give the map `name`, which now reads another input than its owner, a statistic of its own."""
        owner = self._owners[name]
        if owner == name:
            return
        if self._calls.count(owner) != self._calls.count(name):  # the owner's has seen what this map has not
            raise RuntimeError(f"{name} and {owner} read one input at first, and two now")
        self._owners[name] = name
        self.statistics[name] = deepcopy(self.statistics[owner])

    @contextmanager
    def watching(self, linears: dict[str, nn.Module]) -> Iterator[None]:
        """Take what these maps read, by their names, where a statistic is asked for."""

        def watch(name: str, module: nn.Module) -> RemovableHandle:
            return module.register_forward_pre_hook(lambda _, args: self.take(name, args[0]))

        handles = [watch(name, linears[name]) for name in self.types]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

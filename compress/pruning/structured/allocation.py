"""Allocation: the number of units that each layer keeps when a ratio of all of them is removed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compress.pruning.patterns import smallest
from models.registry import Registry

ALLOCATIONS = Registry("allocation")

Counts = dict[int, int]  # block -> number of units


class Allocation(Protocol):
    """Turns a ratio into the number of units that each block keeps."""

    kind: str

    def keep(self, counts: Counts, ratio: float, multiple: int, scores: Callable[[], Mapping[int, Tensor]]) -> Counts:
        """Units kept by each block of `counts` (units that it has now); `scores()` gives scores (units,) of each.

        A kept number is a multiple of `multiple`, or all there are. It may be 0: the caller refuses that.
        """


@ALLOCATIONS.register("uniform")
@dataclass(frozen=True)
class Uniform:
    """The same ratio in every block: equal blocks stay equal, as formats with one width for all layers need."""

    def keep(self, counts: Counts, ratio: float, multiple: int, scores: Callable[[], Mapping[int, Tensor]]) -> Counts:
        return {block: rounded(count - round(ratio * count), multiple, count) for block, count in counts.items()}


@ALLOCATIONS.register("global")
@dataclass(frozen=True)
class Global:
    """The ratio holds over all blocks together; blocks whose units matter less lose more, and no block loses all.

    Scores are divided by their block's mean, as their scale differs between blocks.
    """

    def keep(self, counts: Counts, ratio: float, multiple: int, scores: Callable[[], Mapping[int, Tensor]]) -> Counts:
        scored = scores()
        tiny = torch.finfo(torch.float32).tiny
        scaled = [scored[block].float().cpu() / scored[block].float().mean().cpu().clamp_min(tiny) for block in counts]
        total = sum(counts.values())
        if round(ratio * total) >= total:
            return dict.fromkeys(counts, 0)
        dropped = smallest(torch.cat(scaled)[None], round(ratio * total))[0].split(list(counts.values()))
        kept = {block: count - int(gone.sum()) for (block, count), gone in zip(counts.items(), dropped, strict=True)}
        return {block: rounded(max(1, kept[block]), multiple, count) for block, count in counts.items()}


def rounded(kept: int, multiple: int, count: int) -> int:
    """`kept` to the nearest multiple, at least one multiple unless nothing is kept, at most `count`."""
    if kept <= 0:
        return 0
    return min(count, max(1, round(kept / multiple)) * multiple)

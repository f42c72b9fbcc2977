"""Expert capacity: the number of tokens that an expert takes in training, and their order of priority.

G groups that share the places (sequences, or the whole batch), L tokens of a group, E experts, k experts of a token.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.errors import UserError, did_you_mean

GROUPS = ("sequence", "batch")
PRIORITIES = ("token", "choice", "probability")


@dataclass(frozen=True)
class Capacity:
    """An expert has factor * L k / E places in each group of L tokens, rounded up, and at least 1.

    A pair of a token and an expert that finds no place is dropped: the token passes the expert by, on the residual
    stream. L counts padding too (so shapes are fixed), but padding takes no place. Only in training; evaluation and
    generation drop nothing. Rounded up, a factor of 1 never drops anything at a perfectly even load.

    Args:
        factor: places for each pair at an even load (Switch Transformer, arXiv 2101.03961, section 2.2).
        per: whether each `sequence` has its places, or all of a micro-`batch` have them together.
        priority: who comes first: the earlier `token`; the first `choice` of all tokens before the second of any
            (GShard, arXiv 2006.16668); or the pair of the larger `probability` (V-MoE, arXiv 2106.05974). With `token`
            per sequence no token's output depends on a later one, in training either. With the two others a later token
            can take the place of an earlier one, in training.
    """

    factor: float = 1.25
    per: str = "sequence"
    priority: str = "token"

    def __post_init__(self) -> None:
        if not 0 < self.factor < math.inf:
            raise UserError(f"the capacity factor must be above 0, got {self.factor}: experts would drop every token")
        if self.per not in GROUPS:
            raise UserError(f"capacity is per {' or '.join(GROUPS)}, not {self.per!r}{did_you_mean(self.per, GROUPS)}")
        if self.priority not in PRIORITIES:
            raise UserError(
                f"the priority of a capacity is {', '.join(PRIORITIES)}, not {self.priority!r}"
                f"{did_you_mean(self.priority, PRIORITIES)}"
            )

    def places(self, tokens: int, count: int, top_k: int) -> int:
        """Places of one of `count` experts in a group of so many tokens of `top_k` experts each."""
        return max(1, math.ceil(round(self.factor * tokens * top_k / count, 6)))

    def keep(self, chosen: Tensor, probabilities: Tensor, real: Tensor | None, count: int) -> Tensor:
        """Mask of the assignments within the capacity.

        Args:
            chosen: (B, T, k) experts.
            probabilities: (B, T, k) of the pairs.
            real: (B, T) bool, which tokens are no padding; None: all.
            count: E.

        Returns:
            (B, T, k) bool.
        """
        wanted = chosen if real is None else torch.where(real[..., None], chosen, count)
        groups = len(chosen) if self.per == "sequence" else 1
        wanted = wanted.reshape(groups, -1, chosen.shape[-1])  # (G, L, k)
        places = self.places(wanted.shape[1], count, wanted.shape[2])
        if self.priority == "choice":
            kept = within(wanted.transpose(1, 2).flatten(1), places, count)  # (G, k L)
            return kept.view(groups, wanted.shape[2], -1).transpose(1, 2).reshape(chosen.shape)
        wanted = wanted.flatten(1)  # (G, L k)
        if self.priority == "token":
            return within(wanted, places, count).view(chosen.shape)
        order = probabilities.detach().reshape(groups, -1).argsort(dim=1, descending=True, stable=True)
        kept = within(wanted.gather(1, order), places, count)
        return torch.empty_like(kept).scatter(1, order, kept).view(chosen.shape)


def within(wanted: Tensor, places: int, count: int) -> Tensor:
    """Mask of the entries of a queue (G, P) of experts, E for none, among the first `places` of their expert."""
    takes = wanted[..., None] == torch.arange(count, device=wanted.device)  # (G, P, E)
    position = takes.cumsum(1, dtype=torch.int32)  # (G, P, E), from 1
    return (takes & (position <= places)).any(-1)

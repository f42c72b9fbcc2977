"""Pooling: m summary vectors of a chunk or a segment of tokens.

B batch, X pieces of the sequence, K vectors of each, m summaries of each, D width.

Pieces may be partly or wholly empty: what is masked takes no part, and the summary of nothing is zero.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from models.errors import UserError
from models.linear import Drawn, Linear
from models.registry import Registry

POOLINGS = Registry("pooling")


class PoolingSpec(Protocol):
    """Interface of a pooling in a config; `summaries` is m."""

    summaries: int

    def build(self, width: int) -> nn.Module:
        """The module, a `Pooling` of vectors of this width."""

    def flops(self, width: int, vectors: int) -> int:
        """Forward FLOPs of the matrix products that make one piece of so many vectors into its summaries."""


class Pooling(Protocol):
    """A built pooling."""

    def __call__(self, x: Tensor, mask: Tensor) -> Tensor:
        """Summarise x (B, X, K, D), of which mask (B or 1, X, K) bool says what is there: (B, X, m, D)."""


@POOLINGS.register("mean")
@dataclass(frozen=True)
class Mean:
    """The mean of the vectors: one summary, nothing learned."""

    summaries = 1

    def build(self, width: int) -> nn.Module:
        return MeanPooling()

    def flops(self, width: int, vectors: int) -> int:
        return 0


@POOLINGS.register("query")
@dataclass(frozen=True)
class LearnedQueries:
    """Learned queries attend to the vectors; every query gives a summary.

    A query scores the vectors themselves: a key map before would only be another query. A value map is not needed
    either, because the attention that reads the summary has one.

    Args:
        summaries: queries.
    """

    summaries: int = 1

    def __post_init__(self) -> None:
        if self.summaries < 1:
            raise UserError(f"summaries must be at least 1, got {self.summaries}")

    def build(self, width: int) -> nn.Module:
        return QueryPooling(self.summaries, width)

    def flops(self, width: int, vectors: int) -> int:
        return 4 * self.summaries * width * vectors


@POOLINGS.register("han")
@dataclass(frozen=True)
class Han:
    """Hierarchical attention network (Yang et al., NAACL 2016, eq. 5-7): one summary, the sum of alpha_t h_t with

        u_t = tanh(W h_t + b)        alpha = softmax(u_t . u_w)

    Args:
        hidden: channels of u_t. Nothing: as many as h_t has.
    """

    summaries = 1

    hidden: int | None = None

    def __post_init__(self) -> None:
        if self.hidden is not None and self.hidden < 1:
            raise UserError(f"hidden must be at least 1 channel, got {self.hidden}")

    def build(self, width: int) -> nn.Module:
        return HanPooling(width, self.hidden or width)

    def flops(self, width: int, vectors: int) -> int:
        hidden = self.hidden or width
        return 2 * vectors * (width * hidden + hidden + width)


class MeanPooling(nn.Module):
    """The module of `Mean`."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        there = mask[..., None].to(x.dtype)  # (B or 1, X, K, 1)
        return (x * there).sum(2, keepdim=True) / there.sum(2, keepdim=True).clamp(min=1)  # (B, X, 1, D)


class QueryPooling(Drawn):
    """The module of `LearnedQueries`."""

    def __init__(self, summaries: int, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.empty(summaries, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.queries)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = x @ self.queries.T.to(x.dtype) * x.shape[-1] ** -0.5  # (B, X, K, m)
        return _weighted(scores, x, mask)


class HanPooling(nn.Module):
    """The module of `Han`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.map = Linear(width, hidden, bias=True, std=0.02)
        self.context = Linear(hidden, 1, bias=False, std=1.0)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return _weighted(self.context(torch.tanh(self.map(x))), x, mask)


def _weighted(scores: Tensor, x: Tensor, mask: Tensor) -> Tensor:
    """Sums of x (B, X, K, D) with the softmax of scores (B, X, K, m) over what is there: (B, X, m, D)."""
    exact = torch.promote_types(scores.dtype, torch.float32)
    there = mask[..., None]  # (B or 1, X, K, 1)
    scores = scores.to(exact).masked_fill(~there, torch.finfo(exact).min)  # finite, or nothing at all would be NaN
    weights = scores.softmax(2).masked_fill(~there, 0.0).to(x.dtype)  # (B, X, K, m)
    return weights.transpose(2, 3) @ x

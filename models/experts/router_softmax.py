"""Routers by a softmax over all experts: Mixtral's, Switch's and GShard's.

N tokens, E experts, k experts of a token.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from models.errors import UserError
from models.experts.router import ROUTERS, Router, Routing, TopKSpec, check_jitter, check_weights


@ROUTERS.register("softmax")
@dataclass(frozen=True)
class Softmax(TopKSpec):
    """p = softmax(W x); the k experts of the largest p (Mixtral, arXiv 2401.04088; Qwen3-MoE).

    Args:
        weights: `renormalised`, p of the chosen experts divided by their sum, which is the softmax over the chosen
            logits alone, or their `probability` p (Qwen3-MoE without `norm_topk_prob`).
        jitter: in training, the router's input is multiplied by noise of U(1 - jitter, 1 + jitter).
    """

    weights: str = "renormalised"
    jitter: float = 0.0

    def __post_init__(self) -> None:
        check_weights(self.weights)
        check_jitter(self.jitter)

    def build(self, width: int, count: int, top_k: int, *, biased: bool) -> Router:
        return Router(self, width, count, top_k, biased=biased)


@ROUTERS.register("switch")
@dataclass(frozen=True)
class Switch(TopKSpec):
    """The one expert of the largest p, which counts p (Switch Transformer, arXiv 2101.03961, section 2).

    The weights are drawn from a truncated normal distribution of variance scale / D.

    Args:
        jitter: as for `softmax`; only the router sees this noise.
        scale: of the initial weights (section 2.4).
    """

    weights: ClassVar[str] = "probability"

    jitter: float = 0.01
    scale: float = 0.1

    def __post_init__(self) -> None:
        check_jitter(self.jitter)
        if not self.scale > 0:
            raise UserError(f"scale must be above 0, got {self.scale}")

    def check(self, count: int, top_k: int) -> None:
        if top_k != 1:
            raise UserError(f"router 'switch' chooses one expert: give top_k: 1, not {top_k}, or router: softmax")

    def build(self, width: int, count: int, top_k: int, *, biased: bool) -> Router:
        return Router(self, width, count, top_k, biased=biased, std=(self.scale / width) ** 0.5, truncated=True)


@ROUTERS.register("gshard")
@dataclass(frozen=True)
class GShard(TopKSpec):
    """The two experts of the largest p, the second one by chance (GShard, arXiv 2006.16668, algorithm 1).

    g1 and g2 are their p divided by the sum of both. In training the second expert is used with probability 2 g2; where
    it is not, its place in the expert counts as taken, as in the algorithm. Its capacity of 2 S / E per sequence is
    `capacity: {factor: 1.0, priority: choice}`, its loss `balance: [{kind: auxiliary, choices: first}]`.

    Args:
        random_second: whether chance decides at all.
    """

    weights: ClassVar[str] = "renormalised"

    random_second: bool = True

    def check(self, count: int, top_k: int) -> None:
        if top_k != 2:
            raise UserError(f"router 'gshard' chooses two experts: give top_k: 2, not {top_k}, or router: softmax")

    def build(self, width: int, count: int, top_k: int, *, biased: bool) -> Router:
        return GShardRouter(self, width, count, top_k, biased=biased)


class GShardRouter(Router):
    """The module of `GShard`."""

    def forward(self, x: Tensor, real: Tensor | None = None, decision: Tensor | None = None) -> Routing:
        routing = super().forward(x, real, decision)
        if not (self.training and self.spec.random_second):
            return routing
        accepted = 2 * routing.weights.detach() > torch.rand_like(routing.weights)  # (N, 2)
        first = torch.arange(2, device=accepted.device) == 0  # (2,)
        return routing._replace(accepted=accepted | first)

"""The router of DeepSeek-V3: a sigmoid for each expert, and groups of experts.

N tokens, E experts, k experts of a token.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from models.errors import UserError
from models.experts.router import ROUTERS, Router, Routing, TopKSpec, check_weights

EPS = 1e-20  # added to the sum of the weights, as in the published model


@ROUTERS.register("sigmoid")
@dataclass(frozen=True)
class Sigmoid(TopKSpec):
    """s = sigmoid(W x); the k experts of the largest s + b (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

    b is the bias of `balance: [{kind: bias}]`, or 0. What the balance is measured by is s divided by the sum over all
    experts.

    Args:
        groups: into how many the experts are divided.
        top_groups: of these, how many a token may choose experts from: those with the largest sum of their two best
            s + b.
        weights: s of the chosen experts, `renormalised` or as they are (`probability`).
        scale: of the weights.
    """

    groups: int = 1
    top_groups: int = 1
    weights: str = "renormalised"
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_weights(self.weights)
        if not 1 <= self.top_groups <= self.groups:
            raise UserError(f"top_groups must be from 1 to the {self.groups} groups, got {self.top_groups}")
        if not self.scale > 0:
            raise UserError(f"scale must be above 0, got {self.scale}")

    def check(self, count: int, top_k: int) -> None:
        if count % self.groups or count // self.groups < 2:
            raise UserError(f"{count} experts do not divide into {self.groups} equal groups of at least 2")
        if top_k > count // self.groups * self.top_groups:
            raise UserError(
                f"top_k is {top_k}, and {self.top_groups} of {self.groups} groups hold only "
                f"{count // self.groups * self.top_groups} experts"
            )

    def build(self, width: int, count: int, top_k: int, *, biased: bool) -> Router:
        return SigmoidRouter(self, width, count, top_k, biased=biased)


class SigmoidRouter(Router):
    """The module of `Sigmoid`."""

    def forward(self, x: Tensor, real: Tensor | None = None, decision: Tensor | None = None) -> Routing:
        logits = self.projection(x.flatten(0, 1))  # (N, E)
        scores = logits.sigmoid()
        chosen = self.choose(scores) if decision is None else decision
        weights = self.weigh(scores.gather(1, chosen))
        return Routing(logits, scores / (scores.sum(-1, keepdim=True) + EPS), chosen, chosen, weights)

    def choose(self, scores: Tensor) -> Tensor:
        scores = scores.detach() if self.bias is None else scores.detach() + self.bias
        if self.spec.top_groups < self.spec.groups:
            grouped = scores.unflatten(-1, (self.spec.groups, -1))  # (N, G, E / G)
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(self.spec.top_groups, dim=-1).indices  # (N, top groups)
            out = (best[:, :, None] != best.new_ones(self.spec.groups).cumsum(0) - 1).all(1)  # (N, G)
            scores = grouped.masked_fill(out[..., None], -math.inf).flatten(1)
        return scores.topk(self.top_k, dim=-1).indices

    def weigh(self, scores: Tensor) -> Tensor:
        total = scores.sum(-1, keepdim=True) + EPS
        return self.spec.scale * (scores / total if self.spec.weights == "renormalised" else scores)

"""Expert choice: the experts choose their tokens (arXiv 2202.09368).

B batch, T tokens of a row, N = B T, E experts, k experts of a token on average, C tokens of an expert in a row.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from models.experts.router import ROUTERS, Router, Routing


@ROUTERS.register("expert_choice")
@dataclass(frozen=True)
class ExpertChoice:
    """p = softmax(W x); of each sequence every expert takes the T k / E tokens of the largest p, which count p.

    So all experts have the same load, and a token has any number of experts, k on average. T counts the tokens of a row
    but padding, and the number is rounded up. A token's experts depend on all other tokens of its row, those behind it
    and those of other documents too: it works in encoders alone, and packing changes what comes out.
    """

    directions = ("bidirectional",)
    directions_because = (
        "an expert takes the best tokens of a whole sequence, so whether it takes one depends on those behind it"
    )
    per_token = False
    estimates_load = False
    groups = 1

    def check(self, count: int, top_k: int) -> None:
        pass

    def learns(self, top_k: int) -> bool:
        return True

    def build(self, width: int, count: int, top_k: int, *, biased: bool) -> Router:
        return ExpertChoiceRouter(self, width, count, top_k, biased=biased)

    def flops_per_token(self, width: int, count: int) -> int:
        return 2 * width * count


class ExpertChoiceRouter(Router):
    """The module of `ExpertChoice`."""

    def forward(self, x: Tensor, real: Tensor | None = None, decision: Tensor | None = None) -> Routing:
        rows, length, _ = x.shape
        logits = self.projection(x.flatten(0, 1))  # (N, E)
        probabilities = logits.softmax(-1)
        places = math.ceil(length * self.top_k / self.count)
        if decision is None:
            scores = probabilities.detach().view(rows, length, -1).transpose(1, 2)  # (B, E, T)
            scores = scores if real is None else scores.masked_fill(~real[:, None], -1.0)
            local = scores.topk(places, dim=-1).indices  # (B, E, C)
            decision = local + length * torch.arange(rows, device=x.device)[:, None, None]
        tokens = decision.flatten()  # (R,) with R = B E C
        experts = torch.arange(self.count, device=x.device)[None, :, None].expand_as(decision).flatten()
        weights = probabilities.view(-1).gather(0, tokens * self.count + experts)
        accepted = None
        if real is not None:
            share = -(-real.sum(1) * self.top_k // self.count)  # (B,) C of each row
            rank = torch.arange(places, device=x.device)
            accepted = (rank < share[:, None, None]).expand_as(decision).reshape(-1, 1)
        return Routing(logits, probabilities, decision, experts[:, None], weights[:, None], accepted, tokens=tokens)

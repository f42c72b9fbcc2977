"""Token-expert assignments: tokens, experts and weights, as a router gives them to the experts.

N tokens, E experts, k experts of a token, P pairs of a token and an expert.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Assignments(NamedTuple):
    """Pairs of a token and an expert, dropped ones included, so that P does not depend on the data.

    Attributes:
        tokens: (P,) int64, row of x.
        experts: (P,) int64, E for a pair that was dropped.
        weights: (P,) at least fp32, what the expert's output counts.
        per_token: k where the pairs 0 to k - 1 are those of token 0, the next k those of token 1, and so on; 0 where
            they are in any other order. It tells the experts nothing new, but lets them sum k neighbours.
    """

    tokens: Tensor
    experts: Tensor
    weights: Tensor
    per_token: int = 0


def token_pairs(chosen: Tensor, weights: Tensor) -> Assignments:
    """The pairs of tokens that chose k experts each: chosen (N, k) int64, E where dropped, weights (N, k)."""
    count, k = chosen.shape
    tokens = torch.arange(count, device=chosen.device)[:, None].expand(-1, k)  # (N, k)
    return Assignments(tokens.reshape(-1), chosen.reshape(-1), weights.reshape(-1), k)

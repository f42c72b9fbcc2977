"""The noisy top-k router of the sparsely gated layer (arXiv 1701.06538).

N tokens, D model width, E experts, k experts of a token.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from models.errors import UserError
from models.experts.router import ROUTERS, Router, RouterMap, Routing, TopKSpec


@ROUTERS.register("noisy_top_k")
@dataclass(frozen=True)
class NoisyTopK(TopKSpec):
    """H = W x + softplus(W_noise x) n with n of N(0, 1) in training; softmax over the k largest H (eqs. 3 to 5).

    Both maps begin as 0: all experts are chosen alike at first, by the noise. In evaluation there is none.
    """

    estimates_load = True
    weights: ClassVar[str] = "renormalised"

    def check(self, count: int, top_k: int) -> None:
        if top_k < 2:
            raise UserError(
                f"router 'noisy_top_k' learns from the weights of at least 2 experts: give top_k: 2, not {top_k}"
            )

    def build(self, width: int, count: int, top_k: int, *, biased: bool) -> Router:
        return NoisyRouter(self, width, count, top_k, biased=biased)


class NoisyRouter(Router):
    """The module of `NoisyTopK`.

    Attributes:
        noise: D -> E, W_noise.
    """

    def __init__(self, spec: NoisyTopK, width: int, count: int, top_k: int, *, biased: bool) -> None:
        super().__init__(spec, width, count, top_k, biased=biased, std=0.0)
        self.noise = RouterMap(width, count, std=0.0)

    def forward(self, x: Tensor, real: Tensor | None = None, decision: Tensor | None = None) -> Routing:
        flat = x.flatten(0, 1)  # (N, D)
        logits = noisy = self.projection(flat)  # (N, E)
        load = None
        if self.training:
            scale = F.softplus(self.noise(flat))  # (N, E)
            noisy = logits + torch.randn_like(logits) * scale
            load = self.load(logits, noisy, scale)
        chosen = self.choose(noisy) if decision is None else decision
        weights = noisy.gather(1, chosen).softmax(-1)
        return Routing(logits, noisy.softmax(-1), chosen, chosen, weights, load=load)

    def load(self, logits: Tensor, noisy: Tensor, scale: Tensor) -> Tensor:
        """Probability (N, E) of each expert to be in the top k when its own noise alone is drawn again (eq. 9)."""
        if self.top_k == self.count:
            return torch.ones_like(logits)
        largest = noisy.topk(self.top_k + 1, dim=-1).values  # (N, k + 1)
        within = noisy > largest[:, -1:]  # those must beat the next one, all others the last of the chosen
        threshold = torch.where(within, largest[:, -1:], largest[:, -2:-1])  # (N, E)
        return torch.special.ndtr((logits - threshold) / scale)

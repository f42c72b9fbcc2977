"""Protocol of routers: the experts of each token and the weights of their outputs.

What keeps the load of the experts even is apart (models/experts/balancing.py), and so is how many tokens an expert
takes (models/experts/capacity.py). All is computed in at least fp32, whatever the dtype of the model.

B batch, T tokens of a row, N = B T tokens, D model width, E experts, k experts of a token.
"""

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.errors import UserError
from models.fp32 import ExactBuffers, exact, without_autocast
from models.linear import Linear
from models.registry import Registry

ROUTERS = Registry("router", example="{kind: softmax}")
WEIGHTS = ("renormalised", "probability")


class Routing(NamedTuple):
    """The experts of each token.

    Attributes:
        logits: (N, E) at least fp32, without noise.
        probabilities: (N, E) at least fp32, that sum to 1: what the balance is measured by.
        decision: what the router chose, in its own form: all that a recomputation must be told to choose alike.
        chosen: (N, k) int64 experts, the first choice first.
        weights: (N, k) at least fp32, what their outputs count.
        accepted: (N, k) bool, of chosen pairs those that the router wants after all; None: all of them.
        load: (N, E) at least fp32, how probably each expert is chosen; None where the router has no such estimate.
        tokens: (R,) int64, where `chosen`, `weights` and `accepted` have R rows of their own, the token of each row;
            None where row n is token n.
    """

    logits: Tensor
    probabilities: Tensor
    decision: Tensor
    chosen: Tensor
    weights: Tensor
    accepted: Tensor | None = None
    load: Tensor | None = None
    tokens: Tensor | None = None


class RouterSpec(Protocol):
    """Base spec of a router.

    Attributes:
        directions: of `causal` and `bidirectional`, what the model can be; where it is one, `directions_because`.
        per_token: whether the experts of a token, in evaluation, depend on that token alone. Where not, neither packing
            nor the other tokens of the row leave a token as it is.
        estimates_load: whether it fills in `Routing.load`.
        groups: of experts, of which a token is given some; 1: it chooses among all experts.
    """

    directions: tuple[str, ...]
    per_token: bool
    estimates_load: bool
    groups: int

    def check(self, count: int, top_k: int) -> None:
        """Raise UserError where the router cannot choose `top_k` of `count` experts."""

    def learns(self, top_k: int) -> bool:
        """Whether the loss of a model reaches the router that chooses `top_k` experts."""

    def build(self, width: int, count: int, top_k: int, *, biased: bool) -> "Router":
        """The module; `biased`: with a number for each expert that is added to its score when experts are chosen."""

    def flops_per_token(self, width: int, count: int) -> int:
        """Forward FLOPs of one token, in evaluation."""


class TopKSpec:
    """Base of token-choice routers: the best k experts of each token by itself."""

    directions = ("causal", "bidirectional")
    per_token = True
    estimates_load = False
    groups = 1
    weights: str = "probability"
    jitter: float = 0.0

    def check(self, count: int, top_k: int) -> None:
        pass

    def learns(self, top_k: int) -> bool:
        return top_k > 1 or self.weights != "renormalised"

    def flops_per_token(self, width: int, count: int) -> int:
        return 2 * width * count


class RouterMap(Linear):
    """A linear map of a router: it computes in at least fp32, also under autocast, and draws with a scale of its own.

    Args:
        std: of the weights; 0 begins with none.
        truncated: whether the normal distribution ends at two of these.
    """

    def __init__(self, width: int, count: int, *, std: float, truncated: bool = False) -> None:
        self.own_std, self.truncated = std, truncated
        super().__init__(width, count, bias=False, std=std)

    def reset_parameters(self) -> None:
        if self.truncated:
            nn.init.trunc_normal_(self.weight, std=self.own_std, a=-2 * self.own_std, b=2 * self.own_std)
        else:
            nn.init.normal_(self.weight, std=self.own_std)

    def forward(self, x: Tensor) -> Tensor:
        x = exact(x)
        with without_autocast(x.device):
            return F.linear(x, self.weight.to(x.dtype))


class Router(ExactBuffers):
    """Chooses k experts for each token by its scores; the parent of all routers.

    Args:
        spec: of the router.
        width: D.
        count: E.
        top_k: k.
        biased: whether there is a `bias`.
        std: of the projection.
        truncated: likewise.

    Attributes:
        projection: D -> E.
        bias: (E,) at least fp32, added to the scores where experts are chosen, and only there (arXiv 2408.15664).
    """

    def __init__(
        self, spec: Any, width: int, count: int, top_k: int, *, biased: bool, std: float = 0.02, truncated: bool = False
    ) -> None:
        super().__init__()
        self.spec, self.top_k, self.count = spec, top_k, count
        self.projection = RouterMap(width, count, std=std, truncated=truncated)
        self.register_buffer("bias", exact(torch.zeros(count)) if biased else None)
        self.exact_buffers = ("bias",) if biased else ()

    def reset_parameters(self) -> None:
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, real: Tensor | None = None, decision: Tensor | None = None) -> Routing:
        """Choose.

        Args:
            x: (B, T, D).
            real: (B, T) bool, which tokens are no padding; None: all.
            decision: that of an earlier forward, which is then repeated.
        """
        logits = self.projection(jittered(x, self.spec.jitter, self.training).flatten(0, 1))  # (N, E)
        probabilities = logits.softmax(-1)
        chosen = self.choose(probabilities) if decision is None else decision
        weights = self.weigh(probabilities.gather(1, chosen))
        return Routing(logits, probabilities, chosen, chosen, weights)

    def choose(self, scores: Tensor) -> Tensor:
        """The k experts (N, k) of the largest scores (N, E), the bias added."""
        scores = scores.detach() if self.bias is None else scores.detach() + self.bias
        return scores.topk(self.top_k, dim=-1).indices

    def weigh(self, scores: Tensor) -> Tensor:
        """Weights (N, k) by the scores of the chosen experts (N, k)."""
        return scores / scores.sum(-1, keepdim=True) if self.spec.weights == "renormalised" else scores


def jittered(x: Tensor, jitter: float, training: bool) -> Tensor:
    """x, in training times noise of U(1 - jitter, 1 + jitter), in at least fp32."""
    if not (training and jitter):
        return x
    x = exact(x)
    return x * torch.empty_like(x).uniform_(1 - jitter, 1 + jitter)


def check_weights(weights: str) -> None:
    if weights not in WEIGHTS:
        raise UserError(f"a router's weights are {' or '.join(WEIGHTS)}, not {weights!r}")


def check_jitter(jitter: float) -> None:
    if not 0 <= jitter < 1:
        raise UserError(f"jitter must be at least 0 and below 1, got {jitter}")

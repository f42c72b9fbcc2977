"""The mixture of experts as a feed-forward in a config."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from models.errors import UserError, did_you_mean
from models.experts.balancing import BALANCES, Bias
from models.experts.capacity import Capacity
from models.experts.mixture import MixtureOfExperts
from models.experts.router import ROUTERS
from models.experts.router_softmax import Softmax
from models.registry import Several, Single
from models.specs import FEEDFORWARDS, FeedForwardSpec

LAYOUTS = ("stacked", "separate")
MOST_SEPARATE = 4096  # experts with a module each
NETWORKS = ("swiglu", "mlp")  # what an expert can be


@FEEDFORWARDS.register("experts")
@dataclass(frozen=True)
class Experts(FeedForwardSpec):
    """A router sends each token to a few of many feed-forwards, and sums what they make of it by its weights.

    A token's experts and their weights depend, to the bit, on that token alone unless the router or the capacity says
    otherwise. What the experts compute does so but for rounding: how many tokens an expert has decides in what order a
    product sums.

    Args:
        count: E, experts.
        expert: the network of each, a `swiglu` or `mlp`.
        top_k: k, experts of a token.
        router: how they are chosen (models/experts/router.py).
        balance: what keeps their load even, any number of ways together (models/experts/balancing.py).
        capacity: how many tokens an expert takes in training (models/experts/capacity.py); nothing: all.
        shared: a network that sees every token, added to the experts' output (DeepSeekMoE, arXiv 2401.06066).
        layout: `stacked`, all experts' weights in one tensor and computed together, or `separate`, a module an expert.
    """

    count: int
    expert: Any = field(metadata={"registry": FEEDFORWARDS})
    top_k: int = 2
    router: Any = field(default_factory=Softmax, metadata={"registry": ROUTERS})
    balance: tuple[Any, ...] = field(default=(), metadata={"registry": Several(BALANCES)})
    capacity: Any = field(default=None, metadata={"registry": Single(Capacity)})
    shared: Any = field(default=None, metadata={"registry": FEEDFORWARDS})
    layout: str = "stacked"

    def __post_init__(self) -> None:
        if self.count < 2:
            raise UserError(f"a mixture needs at least 2 experts, got {self.count}")
        if not 1 <= self.top_k <= self.count:
            raise UserError(f"top_k must be from 1 to the {self.count} experts that there are, got {self.top_k}")
        for key in ("expert", "shared"):
            network = getattr(self, key)
            if network is not None and network.kind not in NETWORKS:
                raise UserError(f"{key}: an expert is a {' or '.join(NETWORKS)}, not {network.kind}")
        if self.layout not in LAYOUTS:
            raise UserError(f"unknown layout {self.layout!r}{did_you_mean(self.layout, LAYOUTS)}")
        if self.layout == "separate" and self.count > MOST_SEPARATE:
            raise UserError(f"layout separate has a module an expert, at most {MOST_SEPARATE}, got {self.count}")
        self.router.check(self.count, self.top_k)
        self._check_balance()

    def _check_balance(self) -> None:
        router, kinds = self.router, [balance.kind for balance in self.balance]
        if kinds.count("bias") > 1:
            raise UserError("balance: one bias is enough; leave the others out")
        for balance in self.balance:
            if balance.needs == "load" and not router.estimates_load:
                raise UserError(
                    f"balance {balance.kind!r} needs an estimate of the load, which only router 'noisy_top_k' has, "
                    f"and not {router.kind!r}"
                )
            if balance.needs == "counts" and not router.per_token:
                raise UserError(
                    f"balance {balance.kind!r} evens out what tokens choose, and with router {router.kind!r} all "
                    "experts have the same load; leave it out"
                )
        if self.capacity is not None and not router.per_token:
            raise UserError(f"router {router.kind!r} fills each expert alike and knows no other capacity; leave it out")

    def check(self, direction: str, context: int) -> None:
        """Raise UserError in a model of that direction and so many tokens of training where this cannot work."""
        if direction not in self.router.directions:
            raise UserError(f"router {self.router.kind!r} cannot be {direction}: {self.router.directions_because}")
        if self.capacity is not None and self.capacity.factor * context * self.top_k < self.count:
            raise UserError(
                f"a capacity factor of {self.capacity.factor} leaves each of {self.count} experts less than one of a "
                f"sequence's {context} tokens, so nearly all are dropped; 1.0 has places for an even load"
            )

    @property
    def rate(self) -> float | None:
        """Of the balancing bias; None without one."""
        return next((balance.rate for balance in self.balance if isinstance(balance, Bias)), None)

    def build(self, width: int, branches: int, *, layer: int = 0, layers: int = 1) -> MixtureOfExperts:
        return MixtureOfExperts(self, width, branches, layer=layer, layers=layers)

    def build_router(self, width: int) -> nn.Module:
        return self.router.build(width, self.count, self.top_k, biased=self.rate is not None)

    def flops_per_token(self, width: int) -> int:
        """Of what one token passes: the router, k experts and the shared one."""
        networks = [self.expert] * self.top_k + ([] if self.shared is None else [self.shared])
        router = self.router.flops_per_token(width, self.count)
        return router + sum(network.flops_per_token(width) for network in networks)

    def idle_parameters(self, width: int) -> int:
        """Parameters of the experts that a token does not choose."""
        with torch.device("meta"):
            expert = self.expert.build(width, 1)
        return (self.count - self.top_k) * sum(parameter.numel() for parameter in expert.parameters())

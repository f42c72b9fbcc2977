"""The module of a mixture of experts: router, experts, what is counted, and the losses that balance them.

B batch, T new tokens, N = B T tokens, P pairs of a token and an expert, D model width, E experts, k experts of a token.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.attention.protocol import NOTHING, ForwardInputs, Mixed
from models.experts.assignments import Assignments, token_pairs
from models.experts.balancing import Auxiliary, Routed
from models.experts.router import Routing
from models.experts.separate import SeparateExperts
from models.experts.stacked import StackedExperts
from models.feedforward import FeedForward

DECISIONS = ("experts", "kept")  # names of the state that a recomputation repeats


class Statistics(NamedTuple):
    """Statistics of the latest forward: load, dropped tokens, entropy; without padding, detached.

    Attributes:
        load: (E,) share of the pairs that each expert got, dropped ones apart.
        dropped: share of the pairs that no expert got: over capacity, or by the chance of GShard's second expert. With
            expert choice the share of the tokens that no expert took.
        entropy: mean of the router's entropy, in nats.
        balance: the auxiliary loss of the micro-batch over all choices, unweighted: 1 at an even load.
    """

    load: Tensor
    dropped: Tensor
    entropy: Tensor
    balance: Tensor


class MixtureOfExperts(FeedForward):
    """The module of `Experts`: (B, T, D) -> (B, T, D).

    Args:
        spec: of the mixture.
        width: D.
        branches: sub-layers of the model that write into the residual stream.
        layer: number of the layer.
        layers: of the model that have experts; losses are averaged over them.

    Attributes:
        router: chooses the experts.
        experts: their networks.
        shared: the network that sees every token, or None.
    """

    def __init__(self, spec: Any, width: int, branches: int, *, layer: int = 0, layers: int = 1) -> None:
        super().__init__()
        self.spec, self.layer, self.layers, self.layout = spec, layer, layers, spec.layout
        self.router = spec.build_router(width)
        kind = StackedExperts if spec.layout == "stacked" else SeparateExperts
        self.experts = kind(spec.count, spec.expert, width, branches)
        self.shared = None if spec.shared is None else spec.shared.build(width, branches)
        self._latest: tuple[Routed, Tensor] | None = None  # of the latest forward, and the pairs' experts (P,)
        self._counts: Tensor | None = None  # (E,) choices of the latest forward in training
        self._seen: Tensor | None = None  # (E,) choices of the forwards before it since the last step

    def forward(self, x: Tensor, inputs: ForwardInputs) -> Mixed:
        real = self._real(x, inputs.documents)  # (B, T) or None
        routing, kept, state = self._route(x, real, inputs)
        if kept is not None:
            chosen = torch.where(kept, routing.chosen, self.spec.count)
        else:
            chosen = routing.chosen
        pairs = token_pairs(chosen, routing.weights)
        if routing.tokens is not None:
            pairs = Assignments(routing.tokens, pairs.experts, pairs.weights)
        losses = self._observe(routing, real, pairs, x)
        y = self.experts(x.flatten(0, 1), pairs).view(x.shape)
        return Mixed(y if self.shared is None else y + self.shared(x, inputs), losses, state)

    @staticmethod
    def _real(x: Tensor, documents: Tensor | None) -> Tensor | None:
        """Mask (B, T) of the tokens of x (B, T, D) that are no padding; None: all."""
        return None if documents is None else (documents[:, -x.shape[1] :] >= 0).expand(x.shape[:2])

    def _route(
        self, x: Tensor, real: Tensor | None, inputs: ForwardInputs
    ) -> tuple[Routing, Tensor | None, dict[tuple[int, str], Tensor]]:
        """The choices for x (B, T, D), which of them hold (as `Routing.chosen`; None: all), and both as state.

        A reversible model computes x again in the backward, with other rounding: it repeats what was decided.
        """
        decided, held = ((self.layer, name) for name in DECISIONS)
        if decided in inputs.state:
            return self.router(x, real, inputs.state[decided]), inputs.state.get(held), NOTHING
        routing = self.router(x, real)
        kept = self._kept(routing, real, x)
        if not inputs.recomputed:
            return routing, kept, NOTHING
        return routing, kept, {decided: routing.decision, **({} if kept is None else {held: kept})}

    def _kept(self, routing: Routing, real: Tensor | None, x: Tensor) -> Tensor | None:
        """Of the choices those of real tokens, that the router accepts, within the capacity."""
        kept = routing.accepted
        if real is not None:
            mine = real.flatten() if routing.tokens is None else real.flatten()[routing.tokens]
            mine = mine[:, None].expand_as(routing.chosen)
            kept = mine if kept is None else kept & mine
        if self.training and self.spec.capacity is not None:
            chosen = routing.chosen.view(*x.shape[:2], -1)
            probabilities = routing.probabilities.gather(1, routing.chosen).view(chosen.shape)
            within = self.spec.capacity.keep(chosen, probabilities, real, self.spec.count).flatten(0, 1)
            kept = within if kept is None else kept & within
        return kept

    def _observe(self, routing: Routing, real: Tensor | None, pairs: Assignments, x: Tensor) -> dict[str, Tensor]:
        """The weighted losses by name, in training; keeps what the statistics are computed from."""
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if real is None else real
        routed, losses = Routed(routing, real, self._seen), {}
        if self.training:
            for balance in self.spec.balance:
                if (loss := balance.loss(routed)) is not None:
                    losses[balance.name] = losses.get(balance.name, 0) + balance.weight / self.layers * loss
            if routing.tokens is None:
                self._counts = routed.counts()[0].detach()
        detached = Routing(*(None if one is None else one.detach() for one in routing))
        self._latest = Routed(detached, real, None), pairs.experts
        return losses

    @property
    @torch.no_grad()
    def statistics(self) -> Statistics | None:
        """Of the latest forward, computed when they are read; None before any."""
        if self._latest is None:
            return None
        (routing, real, _), experts = self._latest
        routed, probabilities = self._latest[0], routing.probabilities
        got = probabilities.new_zeros(self.spec.count + 1)  # the last one: dropped
        got = got.scatter_add(0, experts, torch.ones_like(experts, dtype=got.dtype))[:-1]  # (E,)
        entropy = routed.mean(torch.special.entr(probabilities).sum(-1))
        load = got / got.sum().clamp(min=1)
        if routing.tokens is not None:
            taken = torch.zeros_like(real.flatten()).index_put(
                (routing.tokens,), experts < self.spec.count, accumulate=True
            )
            share = self.spec.count * (load * routed.mean(probabilities)).sum()
            return Statistics(load, 1 - routed.mean(taken.to(probabilities.dtype)), entropy, share)
        pairs = (real.sum() * routing.chosen.shape[1]).clamp(min=1)
        return Statistics(load, 1 - got.sum() / pairs, entropy, Auxiliary().loss(routed))

    def advance(self) -> None:
        """Add what the latest forward in training counted to what the step has counted so far.

        Called when the next forward begins: until then a recomputation of activations replaces the latest counts by the
        same ones. A forward whose backward runs only behind another forward is counted in the place of that one.
        """
        if self._counts is not None:
            self._seen = self._counts if self._seen is None else self._seen + self._counts
            self._counts = None

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the balancing bias, and count from 0; to be called after each optimizer step."""
        self.advance()
        counts, self._seen = self._seen, None
        if counts is None or self.router.bias is None:
            return
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        self.router.bias += self.spec.rate * (counts.mean() - counts).sign()

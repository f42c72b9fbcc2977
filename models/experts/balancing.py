"""Load balancing of experts: auxiliary losses, and the loss-free bias.

    auxiliary             E sum_e f_e P_e: 1 at an even load, E where one expert gets everything
    importance_and_load   CV(importance)^2 + CV(load)^2, the squared coefficients of variation over the experts
    z_loss                mean of logsumexp(logits)^2
    bias                  b_e moves by a fixed step towards an even load, after each optimizer step

Any number of them act together. Each loss is averaged over the layers that have experts; padding counts in none. They
are those of one micro-batch on one device; `over: step` counts f over all of a step's micro-batches so far.

Where an activation is computed again in the backward nothing is counted twice: what a forward counted replaces what was
there, and is added up only when the next forward begins.

B batch, T tokens of a row, N = B T tokens, E experts, k experts of a token, R rows of pairs (N, or B).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.errors import UserError, did_you_mean
from models.experts.router import Routing
from models.registry import Registry

BALANCES = Registry("balance", example="{kind: auxiliary, weight: 0.01}")
PER = ("batch", "sequence")
CHOICES = ("all", "first")
OVER = ("micro_batch", "step")


class Routed(NamedTuple):
    """Quantities that a balancing loss is computed from.

    Attributes:
        routing: of a micro-batch, before anything was dropped.
        real: (B, T) bool, which tokens are no padding.
        seen: (E,) how often each expert was chosen by earlier micro-batches of the step; None: there were none.
    """

    routing: Routing
    real: Tensor
    seen: Tensor | None

    def mean(self, values: Tensor) -> Tensor:
        """The mean of values (N, ...) over the tokens but padding."""
        real = self.real.flatten().to(values.dtype)  # (N,)
        return torch.tensordot(real, values, dims=1) / real.sum().clamp(min=1)

    def counts(self, groups: int = 1, choices: str = "all") -> Tensor:
        """Number of times that each expert was chosen in each of so many equal groups of tokens: (G, E)."""
        chosen, probabilities = self.routing.chosen, self.routing.probabilities
        chosen = chosen[:, :1] if choices == "first" else chosen
        real = self.real.flatten()[:, None].expand_as(chosen).to(probabilities.dtype)
        zeros = probabilities.new_zeros(groups, probabilities.shape[1])
        return zeros.scatter_add(1, chosen.reshape(groups, -1), real.reshape(groups, -1))


class Balance:
    """A way to balance the load of the experts.

    Attributes:
        name, weight: of the loss, where it is one.
        needs: `counts`, of what tokens choose; `load`, a router with an estimate of it; or `logits`, which all have.
    """

    name: str
    weight: float
    needs: str

    def loss(self, routed: Routed) -> Tensor | None:
        """The scalar, unweighted; None where it is no training loss."""
        return None


def _check_weight(weight: float) -> None:
    if not 0 <= weight < math.inf:
        raise UserError(f"the weight of a balance must be at least 0, got {weight}")


def _check_word(key: str, word: str, words: tuple[str, ...]) -> None:
    if word not in words:
        raise UserError(f"{key} of a balance is {' or '.join(words)}, not {word!r}{did_you_mean(word, words)}")


@BALANCES.register("auxiliary")
@dataclass(frozen=True)
class Auxiliary(Balance):
    """E sum_e f_e P_e (Switch Transformer, arXiv 2101.03961, eqs. 4 to 6).

    f_e is the share of the choices that went to expert e, before anything is dropped, and is not differentiated; P_e is
    the mean of its probability. GShard's loss is this over the first choices, divided by E^2; DeepSeek-V3's is this per
    sequence (arXiv 2412.19437, eqs. 17 to 20).

    Args:
        weight: of the loss.
        per: over what f and P are taken: all of a micro-`batch`, or each `sequence` (a row, whatever it holds), whose
            losses are averaged.
        choices: which choices f counts: `all`, or the `first` of each token.
        over: of f, `micro_batch`, or `step`: all of the step's micro-batches on this device so far, after global-batch
            balancing (arXiv 2501.11873); it needs `per: batch` and all choices.
    """

    name = "balance"
    needs = "counts"

    weight: float = 0.01
    per: str = "batch"
    choices: str = "all"
    over: str = "micro_batch"

    def __post_init__(self) -> None:
        _check_weight(self.weight)
        _check_word("per", self.per, PER)
        _check_word("choices", self.choices, CHOICES)
        _check_word("over", self.over, OVER)
        if self.over == "step" and (self.per, self.choices) != ("batch", "all"):
            raise UserError("a balance over a step is counted per batch and over all choices; leave the others out")

    def loss(self, routed: Routed) -> Tensor:
        groups = len(routed.real) if self.per == "sequence" else 1
        probabilities = routed.routing.probabilities
        counts = routed.counts(groups, self.choices)  # (G, E)
        if self.over == "step" and routed.seen is not None:
            counts = counts + routed.seen
        share = counts / counts.sum(1, keepdim=True).clamp(min=1)
        real = routed.real.reshape(groups, -1, 1).to(probabilities.dtype)  # (G, L, 1)
        tokens = real.sum(1)  # (G, 1)
        mean = (probabilities.view(groups, -1, counts.shape[1]) * real).sum(1) / tokens.clamp(min=1)  # (G, E)
        each = counts.shape[1] * (share * mean).sum(1)  # (G,)
        return each.sum() / (tokens > 0).sum().clamp(min=1)


@BALANCES.register("importance_and_load")
@dataclass(frozen=True)
class ImportanceAndLoad(Balance):
    """CV(importance)^2 + CV(load)^2 (arXiv 1701.06538, eqs. 6 to 11): router `noisy_top_k` alone estimates a load.

    Importance is the sum of an expert's weights, load that of the probabilities that it is chosen. CV is the standard
    deviation over the experts (of all of them, so divided by E) over the mean.

    Args:
        weight: of the loss.
    """

    name = "importance_and_load"
    needs = "load"

    weight: float = 0.1

    def __post_init__(self) -> None:
        _check_weight(self.weight)

    def loss(self, routed: Routed) -> Tensor:
        routing = routed.routing
        weights = torch.zeros_like(routing.probabilities).scatter(1, routing.chosen, routing.weights)  # (N, E)
        return _squared_variation(routed.mean(weights)) + _squared_variation(routed.mean(routing.load))


def _squared_variation(values: Tensor) -> Tensor:
    """The squared coefficient of variation of values (E,)."""
    return values.var(correction=0) / (values.mean().square() + torch.finfo(values.dtype).tiny)


@BALANCES.register("z_loss")
@dataclass(frozen=True)
class ZLoss(Balance):
    """mean logsumexp(logits)^2, which keeps the router's logits small (ST-MoE, arXiv 2202.08906, eq. 5).

    Args:
        weight: of the loss.
    """

    name = "router_z"
    needs = "logits"

    weight: float = 0.001

    def __post_init__(self) -> None:
        _check_weight(self.weight)

    def loss(self, routed: Routed) -> Tensor:
        return routed.mean(routed.routing.logits.logsumexp(-1).square())


@BALANCES.register("bias")
@dataclass(frozen=True)
class Bias(Balance):
    """b_e += rate sign(mean load - load_e) after each optimizer step (loss-free balancing, arXiv 2408.15664).

    b is added to the scores where experts are chosen, and to no weight. The load is that of all micro-batches since the
    last step, on all devices.

    Args:
        rate: of a step.
    """

    needs = "counts"

    rate: float = 0.001

    def __post_init__(self) -> None:
        if not 0 < self.rate < math.inf:
            raise UserError(f"the rate of a balancing bias must be above 0, got {self.rate}")

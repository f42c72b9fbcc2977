"""Criteria of structured pruning: scores of neurons, query heads, key/value groups and experts.

D model width, F neurons, G key/value groups, R query heads of a group, W head width. Head r of group g is head g R + r.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compress.calibration.experts import ExpertCounts, has_experts
from compress.calibration.sequential import Batch
from compress.calibration.statistics import Moments, Statistic, StatisticType
from models.attention.full import FullAttention
from models.errors import UserError
from models.feedforward import DenseFeedForward
from models.registry import Registry

IMPORTANCES = Registry("structured criterion")


def networks(block: nn.Module) -> dict[str, DenseFeedForward]:
    """The feed-forwards whose neurons are cut alike, by their names in the block: its one, or its experts'."""
    if has_experts(block):
        return {f"feedforward.experts.{i}": expert for i, expert in enumerate(block.feedforward.experts)}
    return {"feedforward": block.feedforward} if isinstance(block.feedforward, DenseFeedForward) else {}


class Importance:
    """Base class of the registered criteria, each a frozen dataclass of its options; by default it needs no data.

    The units of one block with the smallest scores are removed.
    """

    kind: ClassVar[str]

    def prepare(self, model: nn.Module, batches: Sequence[Batch] | None) -> "Importance":
        """The criterion that scores this model: itself, or one that has looked at the whole model first."""
        return self

    def neuron_statistic(self) -> StatisticType | None:
        """Statistic of the input of `down`, the hidden activation."""

    def head_statistic(self, attention: FullAttention) -> StatisticType | None:
        """Statistic of the input of `o`, the outputs of the heads."""

    def neurons(
        self, block: int, feedforward: DenseFeedForward, statistic: Statistic | None, expert: int | None = None
    ) -> Tensor:
        """Scores (F,); of the neurons of a block's `expert`, where it has some."""
        raise NotImplementedError

    def experts(self, block: int, experts: nn.ModuleList, load: ExpertCounts | None) -> Tensor:
        """Scores (E,) of removing one expert alone; `load` where `neuron_statistic` asks for data."""
        raise NotImplementedError

    def heads(self, block: int, attention: FullAttention, statistic: Statistic | None) -> Tensor:
        """Scores (G, R) of removing one query head alone."""
        raise NotImplementedError

    def groups(self, block: int, attention: FullAttention, statistic: Statistic | None) -> Tensor:
        """Scores (G,) of removing a key/value group with its query heads."""
        raise NotImplementedError


class GroupMoments:
    """Mean of each input channel of `o`, and second moments of the channels of one group with each other.

    Args:
        width: G * R * W input channels.
        groups: G.
    """

    def __init__(self, width: int, device: torch.device, groups: int) -> None:
        self.tokens, self.groups = 0, groups
        self.first = torch.zeros(width, dtype=torch.float64, device=device)
        self.second = torch.zeros(groups, width // groups, width // groups, device=device)

    def update(self, x: Tensor) -> None:
        x = x.float()  # (N, G * R * W)
        by_group = x.unflatten(1, (self.groups, -1)).transpose(0, 1)  # (G, N, R * W)
        self.second += by_group.mT @ by_group
        self.first += x.double().sum(0)
        self.tokens += x.shape[0]

    def finite(self) -> bool:
        return bool(self.first.isfinite().all()) and bool(self.second.isfinite().all())

    def mean(self) -> Tensor:
        """E[x] (G * R * W,) fp32."""
        return (self.first / max(1, self.tokens)).float()

    def moments(self, centred: bool) -> Tensor:
        """E[x x'] of each group (G, R * W, R * W), or its covariance."""
        second = self.second / max(1, self.tokens)
        if not centred:
            return second
        mean = self.mean().unflatten(0, (self.groups, -1))  # (G, R * W)
        return second - mean[:, :, None] * mean[:, None, :]


@IMPORTANCES.register("magnitude")
@dataclass(frozen=True)
class WeightNorm(Importance):
    """L2 norm of all weights that go with a unit: rows that write it and columns that read it. Needs no data."""

    def neurons(
        self, block: int, feedforward: DenseFeedForward, statistic: Statistic | None, expert: int | None = None
    ) -> Tensor:
        return neuron_sums(feedforward, [m.weight.float().square() for m in _maps(feedforward)]).sqrt()

    def experts(self, block: int, experts: nn.ModuleList, load: ExpertCounts | None) -> Tensor:
        return torch.stack([self.neurons(block, expert, None).square().sum().sqrt() for expert in experts])

    def heads(self, block: int, attention: FullAttention, statistic: Statistic | None) -> Tensor:
        query, _ = head_sums(attention, [m.weight.float().square() for m in _projections(attention)])
        return query.sqrt()

    def groups(self, block: int, attention: FullAttention, statistic: Statistic | None) -> Tensor:
        query, shared = head_sums(attention, [m.weight.float().square() for m in _projections(attention)])
        return (query.sum(1) + shared).sqrt()


@dataclass(frozen=True)
class _Activation(Importance):
    """Mean squared error at the sub-layer's output that the removal of one unit alone leaves.

    Neuron j with hidden activation a_j (the product where gated) writes a_j * down[:, j]: E[a_j^2] |down_j|^2.
    A head or group with outputs x and columns O of `o`: tr(O E[x x'] O').
    """

    def neuron_statistic(self) -> StatisticType:
        return Moments

    def head_statistic(self, attention: FullAttention) -> StatisticType:
        return partial(GroupMoments, groups=attention.kv_heads)

    def neurons(
        self, block: int, feedforward: DenseFeedForward, statistic: Moments | None, expert: int | None = None
    ) -> Tensor:
        if statistic is None:  # an expert that no token reached
            return torch.zeros(feedforward.down.in_features, device=feedforward.down.weight.device)
        second = statistic.variance()
        if not self.centred:
            second = second + statistic.mean().square()
        return second * feedforward.down.weight.float().square().sum(0)  # (F,)

    def experts(self, block: int, experts: nn.ModuleList, load: ExpertCounts) -> Tensor:
        """The router's weights of an expert, summed over the tokens."""
        return load.mass.float()

    def heads(self, block: int, attention: FullAttention, statistic: GroupMoments) -> Tensor:
        moments = statistic.moments(self.centred)  # (G, R * W, R * W)
        shape = (-1, attention.head_width)
        blocks = moments.unflatten(2, shape).unflatten(1, shape)  # (G, R, W, R, W)
        own = torch.diagonal(blocks, dim1=1, dim2=3).movedim(-1, 1)  # (G, R, W, W)
        columns = _columns(attention).unflatten(2, shape)  # (D, G, R, W)
        return torch.einsum("dgrv,grvw,dgrw->gr", columns, own, columns)

    def groups(self, block: int, attention: FullAttention, statistic: GroupMoments) -> Tensor:
        columns = _columns(attention)  # (D, G, R * W)
        return torch.einsum("dgv,gvw,dgw->g", columns, statistic.moments(self.centred), columns)


@IMPORTANCES.register("variance")
@dataclass(frozen=True)
class Variance(_Activation):
    """The error that is left when a bias takes over the mean of what was removed: variance in place of second moment.

    It is 0 for a unit whose activation never changes. The criterion to use with bias compensation.
    """

    centred = True


@IMPORTANCES.register("norm")
@dataclass(frozen=True)
class Norm(_Activation):
    """The error that is left without compensation: mean squared activations, weighted by the columns that read them."""

    centred = False


@IMPORTANCES.register("taylor")
@dataclass(frozen=True)
class Taylor(Importance):
    """First-order change of the loss: |sum of gradient * weight| over a unit's weights, averaged over the batches.

    (Molchanov et al., arXiv 1906.10771, eq. 8, with the sum inside.) Takes one backward pass of the whole model per
    batch before the first block; its scores are those of the dense model.
    """

    def prepare(self, model: nn.Module, batches: Sequence[Batch] | None) -> "TaylorScores":
        if not batches or "targets" not in batches[0]:
            raise UserError(
                "criterion 'taylor' takes gradients of the loss: give it text (data, samples, sequence_length)"
            )
        return TaylorScores(model, batches)


class TaylorScores(Importance):
    """The criterion `Taylor` after it has seen the model; scores by block."""

    kind = "taylor"

    def __init__(self, model: nn.Module, batches: Sequence[Batch]) -> None:
        self._neurons: dict[tuple[int, int | None], Tensor] = {}  # (block, expert or None)
        self._experts: dict[int, Tensor] = {}
        self._heads: dict[int, Tensor] = {}
        self._groups: dict[int, Tensor] = {}
        weights = [m.weight for block in model.blocks for m in block.modules() if isinstance(m, nn.Linear)]
        asked = [weight.requires_grad for weight in weights]
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            for batch in batches:
                loss = model(batch["tokens"], targets=batch["targets"], documents=batch.get("documents")).loss
                gradients = torch.autograd.grad(loss, weights, materialize_grads=True)  # experts may have no token
                products = {
                    id(w): (w * g).detach().float() / len(batches) for w, g in zip(weights, gradients, strict=True)
                }
                self._add(model, products)
        for weight, was in zip(weights, asked, strict=True):
            weight.requires_grad_(was)

    def _add(self, model: nn.Module, products: dict[int, Tensor]) -> None:
        for index, block in enumerate(model.blocks):
            whole = []
            for name, network in networks(block).items():
                sums = neuron_sums(network, [products[id(m.weight)] for m in _maps(network)])
                expert = int(name.rpartition(".")[2]) if "." in name else None
                _accumulate(self._neurons, (index, expert), sums.abs())
                whole.append(sums.sum().abs())
            if has_experts(block):
                _accumulate(self._experts, index, torch.stack(whole))
            if isinstance(block.attention, FullAttention):
                maps = [products[id(m.weight)] for m in _projections(block.attention)]
                query, shared = head_sums(block.attention, maps)
                _accumulate(self._heads, index, query.abs())
                _accumulate(self._groups, index, (query.sum(1) + shared).abs())

    def neurons(
        self, block: int, feedforward: DenseFeedForward, statistic: Statistic | None, expert: int | None = None
    ) -> Tensor:
        return self._neurons[block, expert]

    def experts(self, block: int, experts: nn.ModuleList, load: ExpertCounts | None) -> Tensor:
        return self._experts[block]

    def heads(self, block: int, attention: FullAttention, statistic: Statistic | None) -> Tensor:
        return self._heads[block]

    def groups(self, block: int, attention: FullAttention, statistic: Statistic | None) -> Tensor:
        return self._groups[block]


def _accumulate(scores: dict[Any, Tensor], index: Any, value: Tensor) -> None:
    scores[index] = scores[index] + value if index in scores else value


def _maps(feedforward: DenseFeedForward) -> list[nn.Linear]:
    """`down`, then the maps that write the hidden activation."""
    return [feedforward.down, *feedforward.writers()]


def neuron_sums(feedforward: DenseFeedForward, values: Sequence[Tensor]) -> Tensor:
    """Sum per neuron (F,) of values shaped as the weights of `_maps`: columns of the first, rows of the others."""
    return values[0].sum(0) + sum(value.sum(1) for value in values[1:])


def _projections(attention: FullAttention) -> list[nn.Linear]:
    return [attention.q, attention.k, attention.v, attention.o]


def head_sums(attention: FullAttention, values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Sums of values shaped as q, k, v, o: a query head's q rows and o columns (G, R), a group's k and v rows (G,)."""
    q, k, v, o = values
    groups, heads = attention.kv_heads, attention.heads
    query = q.sum(1).unflatten(0, (heads, -1)).sum(1) + o.sum(0).unflatten(0, (heads, -1)).sum(1)  # (G * R,)
    shared = (k.sum(1) + v.sum(1)).unflatten(0, (groups, -1)).sum(1)  # (G,)
    return query.unflatten(0, (groups, -1)), shared


def _columns(attention: FullAttention) -> Tensor:
    """Columns of `o` by group (D, G, R * W) fp32."""
    return attention.o.weight.float().unflatten(1, (attention.kv_heads, -1))

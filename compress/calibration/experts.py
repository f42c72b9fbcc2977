"""Calibration of experts: each on tokens of its own, with further ones where the router gave it too few.

While the calibration text passes a mixture of experts, `ExpertCounts` counts the tokens that every expert was given,
and what they counted. An expert that was given fewer than a minimum takes further tokens of its layer, those to which
the router gives it the highest probability: no matrix is fitted to a handful of rows, and the records say so. The
minimum is, where none is asked for, one token for each input channel of its widest matrix: with fewer the Hessian of
GPTQ has no full rank.

N tokens, E experts, D model width.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from compress.calibration.records import LayerRecord
from models.experts import Assignments, MixtureOfExperts, Router, SeparateExperts
from models.experts.layout import separate, stack
from models.weight_formats import described


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """A compression of `model` within which every expert is a module of its own.

    Behind it they are stacked again if all were before, unless a matrix of one of them is stored packed.
    """
    before = [module for module in model.modules() if isinstance(module, MixtureOfExperts)]
    stacked = bool(before) and all(mixture.layout == "stacked" for mixture in before)
    separate(model)
    try:
        yield
    finally:
        if stacked and not any(".feedforward.experts." in name for name in described(model)):
            stack(model)


def router_maps(model: nn.Module) -> set[str]:
    """The names of the linear layers of routers inside a module: they choose the experts, and stay as they are."""
    return {
        f"{path}.{name}"
        for path, router in model.named_modules()
        if isinstance(router, Router)
        for name, module in router.named_modules()
        if isinstance(module, nn.Linear)
    }


def has_experts(block: nn.Module) -> bool:
    """Whether the block has experts, each of them a module."""
    return isinstance(block.feedforward, MixtureOfExperts) and isinstance(block.feedforward.experts, SeparateExperts)


class ExpertCounts:
    """The tokens of one mixture with separate experts while calibration text passes.

    Args:
        name: of the mixture in the model.
        mixture: the module.
        minimum: tokens that every expert is to see; None for one for each input channel of its widest matrix.

    Attributes:
        tokens: (E,) int64, how many tokens the router gave each expert; padding is none.
        mass: (E,) fp64, the sum of what their outputs counted.
        added: (E,) int64, how many further tokens an expert was calibrated on.
    """

    def __init__(self, name: str, mixture: nn.Module, minimum: int | None) -> None:
        self.name, self.mixture, self.experts = name, mixture, mixture.experts
        count, device = len(self.experts), next(mixture.parameters()).device
        self.minimum = _widest(mixture.experts) if minimum is None else minimum
        self.tokens = torch.zeros(count, dtype=torch.int64, device=device)
        self.mass = torch.zeros(count, dtype=torch.float64, device=device)
        self.added = torch.zeros(count, dtype=torch.int64, device=device)
        self._open: list[Tensor] = []  # (N, E) of each batch: probabilities where the expert could take the token

    @contextmanager
    def counting(self, real: Callable[[int], Tensor | None]) -> Iterator[None]:
        """Count what passes, and keep padding from the experts; `real(N)` marks the tokens (N,) that are none."""
        seen: list[Tensor] = []  # the probabilities of the batch at hand

        def keep(_, args, routing):
            seen[:] = [routing.probabilities.float()]  # (N, E)

        def take(_, args):
            x, pairs = args  # x (N, D)
            mask = real(len(x))
            if mask is not None:
                dropped = torch.full_like(pairs.experts, len(self.experts))
                pairs = pairs._replace(experts=torch.where(mask[pairs.tokens], pairs.experts, dropped))
            self._count(pairs, seen[0], mask)
            return x, pairs

        handles = [self.mixture.router.register_forward_hook(keep), self.experts.register_forward_pre_hook(take)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _count(self, pairs: Assignments, probabilities: Tensor, real: Tensor | None) -> None:
        count = len(self.experts)
        tokens = torch.bincount(pairs.experts, minlength=count + 1)
        mass = torch.bincount(pairs.experts, pairs.weights.double(), minlength=count + 1)
        self.tokens += tokens[:count]
        self.mass += mass[:count]
        free = torch.nn.functional.pad(probabilities, (0, 1))  # (N, E + 1): a column for dropped pairs
        free[pairs.tokens, pairs.experts] = -1.0
        if real is not None:
            free[~real] = -1.0
        self._open.append(free[:, :count])

    def further(self, run: Callable[[Callable[[int], None]], None]) -> dict[int, Tensor]:
        """Expert that was given too few -> inputs (n, D) of the tokens that it takes beside them.

        Args:
            run: `run(begin)` passes every batch through the block again, and calls `begin(number)` before each.
        """
        places, batch = self._wanting(), [0]
        found: dict[int, list[Tensor]] = {expert: [] for expert in places}

        def begin(number: int) -> None:
            batch[0] = number

        def take(_, args):
            x, pairs = args  # x (N, D)
            for expert, rows in places.items():
                found[expert].append(x[rows[batch[0]]])
            return x, pairs._replace(experts=torch.full_like(pairs.experts, len(self.experts)))  # nothing more to do

        if places:
            handle = self.experts.register_forward_pre_hook(take)
            try:
                run(begin)
            finally:
                handle.remove()
        return {expert: torch.cat(inputs) for expert, inputs in found.items()}

    def _wanting(self) -> dict[int, list[Tensor]]:
        """Expert that was given too few -> the rows of each batch that it takes as well, the most probable ones."""
        found = {}
        for expert in (self.tokens < self.minimum).nonzero().flatten().tolist():
            scores = torch.cat([batch[:, expert] for batch in self._open])
            want = min(self.minimum - int(self.tokens[expert]), int((scores >= 0).sum()))
            if want > 0:
                rows = torch.zeros_like(scores, dtype=torch.bool)
                rows[scores.topk(want).indices] = True
                found[expert] = [part.nonzero().flatten() for part in rows.split([len(b) for b in self._open])]
                self.added[expert] = want
        self._open = []
        return found

    def noted(self, records: list[LayerRecord]) -> list[LayerRecord]:
        """The records, those of experts with the tokens that they were calibrated on, and how they came by them."""
        return [self._noted(record) for record in records]

    def _noted(self, record: LayerRecord) -> LayerRecord:
        prefix = f"{self.name}.experts."
        if record.skipped or not record.name.startswith(prefix):
            return record
        expert = int(record.name.removeprefix(prefix).split(".")[0])
        own, added = int(self.tokens[expert]), int(self.added[expert])
        note = f"the router gave it {own} calibration tokens" if own < max(1, self.minimum) else ""
        if added:
            note += f", fewer than {self.minimum}: {added} more of its layer, by router probability, were taken"
        achieved = {**record.achieved, "tokens": own + added}
        return replace(record, achieved=achieved, note="; ".join(filter(None, (record.note, note))))


def load_of(block: nn.Module, prefix: str, names: Iterable[str], minimum: int | None) -> ExpertCounts | None:
    """The load of a block called `prefix`, or None where no linear layer of `names` is one of its separate experts'."""
    name = f"{prefix}.feedforward"
    if not has_experts(block) or not any(one.startswith(f"{name}.experts.") for one in names):
        return None
    return ExpertCounts(name, block.feedforward, minimum)


def _widest(experts: nn.Module) -> int:
    return max(module.in_features for module in experts.modules() if isinstance(module, nn.Linear))

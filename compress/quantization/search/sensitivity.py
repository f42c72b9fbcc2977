"""Per-layer sensitivity: KL to the original model when one layer alone is quantized, at each bit width.

    KL(p || q_lb) = sum_v p(v) log (p(v) / q_lb(v)),   mean over the tokens of a held-out text

where p is what the model says of the next token and q_lb what it says with layer l alone at b bits, rounded in the
cheap form of its method: to the nearest point of its grid, or of its table with all weights counting alike. Nothing is
fitted to the text. The maps of one kind in all the experts of a layer count as one: at thousands of matrices one
by one is out of reach.

Only the blocks from the layer's own on are run again. What has been measured is kept layer by layer.

B batch, T tokens of a row, D model width, V vocabulary, N tokens.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.calibration.experts import apart
from compress.calibration.sequential import Activations, Batch, steps_of
from compress.calibration.store import Store
from compress.quantization.methods.rtn import checked_weight
from compress.quantization.quantizer import Quantizer
from models.errors import UserError
from models.projection import kl_divergence, log_probabilities

_EXPERT = re.compile(r"(\.experts\.)\d+\.")


@dataclass(frozen=True)
class Unit:
    """A unit of bit allocation: a linear layer, or the layers of one kind in all the experts of a block.

    Attributes:
        name: of the map, or a pattern that matches those of the experts: `blocks.1.feedforward.experts.*.up`.
        members: their names.
        shapes: of each member's weight (N, K).
        methods: bits -> the method that would quantize it.
    """

    name: str
    members: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    methods: Mapping[int, Quantizer]

    @property
    def weights(self) -> int:
        """Number of its weights."""
        return sum(rows * width for rows, width in self.shapes)

    def bytes(self) -> dict[int, int]:
        """Bits -> the bytes that its weights take on disk, with scales, zeros, tables and padding."""
        return {
            bits: sum(method.stored_form(nn.Linear, shape).stored_bytes() for shape in self.shapes)
            for bits, method in self.methods.items()
        }


def units_of(model: nn.Module, methods: Callable[[str], Mapping[int, Quantizer] | None]) -> list[Unit]:
    """The units of a model whose experts are apart, in its order.

    Args:
        methods: name of a linear layer in a block -> bits -> the method for it; None where its bits are settled.

    Raises:
        UserError: experts whose maps are one unit are not treated alike.
    """
    grouped: dict[str, list[str]] = {}
    for name in (name for step in steps_of(model)[:-1] for name in step.linears):
        grouped.setdefault(_EXPERT.sub(r"\1*.", name), []).append(name)
    units = []
    for pattern, members in grouped.items():
        chosen = methods(members[0])
        if other := next((name for name in members if methods(name) != chosen), None):
            raise UserError(
                f"{pattern} counts as one layer where bits are chosen, and skip or layers tells {other} from the rest; "
                "name all of its experts or none"
            )
        if chosen is not None:
            shapes = tuple(tuple(model.get_submodule(name).weight.shape) for name in members)
            units.append(Unit(pattern, tuple(members), shapes, chosen))
    return units


@torch.no_grad()
def measure(
    model: nn.Module,
    units: Sequence[Unit],
    batches: Sequence[Batch],
    *,
    store: Store | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[dict[int, float]]:
    """The divergence of each unit at each of its bits, in nats per token.

    Args:
        model: a `Transformer`; left in evaluation mode, its weights as they were.
        units: as `units_of` gave them.
        batches: tokens of a text that nothing else is fitted to.
        store: where finished units are kept; of an earlier run of the same settings none is measured again.
        progress: called with (units done, units in all, name of the latest).
    """
    model.eval()
    found: list[dict[int, float] | None] = [_kept(store, index, unit) for index, unit in enumerate(units)]
    with apart(model):
        device = next(model.parameters()).device
        activations = Activations(model, batches, device, None)
        whole = [
            _finished(model, 0, x, context) for x, context in zip(activations.inputs, activations.contexts, strict=True)
        ]
        for block in range(len(model.blocks)):
            for index, unit in enumerate(units):
                if not unit.name.startswith(f"blocks.{block}."):
                    continue
                if found[index] is None:
                    found[index] = _unit(model, unit, block, activations, whole)
                    _keep(store, index, unit, found[index])
                if progress is not None:
                    progress(index + 1, len(units), unit.name)
            if any(entry is None for entry in found):
                activations.run(partial(model.run, blocks=slice(block, block + 1)), keep=True, begin=lambda i: None)
    return found


def _unit(model: nn.Module, unit: Unit, block: int, activations: Activations, whole: list[Tensor]) -> dict[int, float]:
    costs = {}
    for bits, method in unit.methods.items():
        total, tokens = 0.0, 0
        with _replaced(model, unit, method):
            for i, (x, context) in enumerate(zip(activations.inputs, activations.contexts, strict=True)):
                hidden = _finished(model, block, x, context)  # (B, T, D)
                valid = activations.valid[i]
                pair = [h.flatten(0, 1) if valid is None else h[valid] for h in (whole[i], hidden)]  # (N, D) each
                total += divergence(model, *pair)
                tokens += len(pair[0])
        costs[bits] = total / tokens
    return costs


@contextmanager
def _replaced(model: nn.Module, unit: Unit, method: Quantizer) -> Iterator[None]:
    """The unit's weights rounded, for as long as this lasts."""
    modules = [model.get_submodule(name) for name in unit.members]
    before = [module.weight.data for module in modules]
    try:
        for name, module in zip(unit.members, modules, strict=True):
            module.weight.data = method.nearest(checked_weight(name, module)).to(module.weight.dtype)
        yield
    finally:
        for module, weight in zip(modules, before, strict=True):
            module.weight.data = weight


def _finished(model: nn.Module, first: int, x: Tensor, context: Any) -> Tensor:
    """Input of the head (B, T, D) for hidden states that enter block `first`."""
    return model.read(model.run(x, context, blocks=slice(first, None)).x, context.documents)


def divergence(model: nn.Module, whole: Tensor, hidden: Tensor) -> float:
    """KL of the next-token distribution in nats, summed over the tokens; hidden states (N, D) of both."""
    total = 0.0
    for _, (p, q) in log_probabilities((model.project, model.project), (whole, hidden), model.config.outputs):
        total += float(kl_divergence(p, q).double().sum())
    return max(0.0, total)  # rounding can leave an equal pair a little below


def _kept(store: Store | None, index: int, unit: Unit) -> dict[int, float] | None:
    entry = None if store is None else store.load(f"unit-{index}")
    if entry is None or entry[1]["name"] != unit.name:
        return None
    return {int(bits): cost for bits, cost in entry[1]["costs"].items()}


def _keep(store: Store | None, index: int, unit: Unit, costs: dict[int, float]) -> None:
    if store is not None:
        store.save(f"unit-{index}", {}, {"name": unit.name, "costs": costs})

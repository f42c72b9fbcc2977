"""Bits by layer under a budget: what each layer loses alone, the plan that follows, and the uniform plan beside it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from app.data.packing import TokenBlocks
from app.evaluation import formatting
from app.evaluation.quality import evaluate_qualities, paired
from compress.calibration.experts import apart
from compress.calibration.sequential import Batch, steps_of
from compress.calibration.store import FolderStore
from compress.quantization.affine import IntFormat
from compress.quantization.formats.lookup_table import LookupFormat
from compress.quantization.plan import QuantizationPlan
from compress.quantization.quantizer import METHODS
from compress.quantization.search.allocation import allocate, file_bytes, read_bytes
from compress.quantization.search.sensitivity import Unit, measure, units_of
from models.errors import UserError
from models.transformer import Transformer
from recipes.commands.options import Quantize

CHOICES = (2, 3, 4, 8)
SAMPLES = 32


@dataclass(frozen=True)
class Budget:
    """Requested bit allocation.

    Attributes:
        unit: `bits` a weight on average of the layers whose bits are chosen, `bytes` of the whole file; None where
            layers are measured and none is chosen.
        asked: that many at most.
        samples: blocks of text to measure on.
    """

    unit: str | None
    asked: float
    samples: int

    def title(self) -> str:
        """In a few words: "at most 3.2 bits a weight"."""
        return f"at most {self.shown(self.asked)}"

    def shown(self, value: float) -> str:
        """A value of the budget's unit, in words."""
        return f"{value:.4g} bits a weight" if self.unit == "bits" else formatting.size(value)


def read_budget(chosen: Quantize, method: Any) -> Budget | None:
    """The budget that the options name, or None.

    Raises:
        UserError: two budgets, bits beside one, a method without a choice of bits, a number that means nothing.
    """
    given = [name for name in ("bits", "budget_bits", "budget_bytes") if getattr(chosen, name) is not None]
    if given in ([], ["bits"]) and chosen.sensitivity_samples is None:
        return None
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} each say how many bits a weight takes; keep one of them")
    if not _countable(method):
        able = ", ".join(kind for kind in METHODS if _countable(METHODS[kind]()))
        what = given[0] if given else "sensitivity_samples"
        raise UserError(f"{what} chooses among bits that method {method.kind} does not have; choose one of {able}")
    samples = SAMPLES if chosen.sensitivity_samples is None else chosen.sensitivity_samples
    if chosen.budget_bits is not None:
        if not 0 < chosen.budget_bits < math.inf:
            raise UserError(f"budget_bits is {chosen.budget_bits:g}; it must be above 0 and finite")
        return Budget("bits", chosen.budget_bits, samples)
    if chosen.budget_bytes is not None:
        return Budget("bytes", read_bytes(chosen.budget_bytes), samples)
    return Budget(None, 0, samples)


def _countable(method: Any) -> bool:
    return "bits" in method.grid and isinstance(method.format, IntFormat | LookupFormat)


@dataclass
class Mixed:
    """Layers, what each costs at each of its bits, and which were chosen.

    Attributes:
        base: the plan that says what is not chosen here.
        fixed: bytes of the weights file beside the units.
        costs: KL of each unit, by bits; there from `solve` on.
        bits: of each unit.
    """

    budget: Budget
    base: QuantizationPlan
    units: list[Unit]
    fixed: int
    sizes: list[dict[int, int]]
    costs: list[dict[int, float]] = field(default_factory=list)
    bits: list[int] = field(default_factory=list)
    tokens: int = 0

    def solve(
        self,
        model: Transformer,
        batches: Sequence[Batch],
        store: FolderStore,
        progress: Callable[[int, int, str], None],
    ) -> None:
        """Measure every unit, and choose."""
        self.tokens = sum(batch["tokens"].numel() for batch in batches)
        self.costs = measure(model, self.units, batches, store=store, progress=progress)
        if self.budget.unit is None:
            self.bits = self.at(self.base.method.format.bits)
        else:
            self.bits = allocate(self.costs, self.sizes, self.room())

    def room(self) -> int:
        """The bytes that the budget leaves to the units."""
        if self.budget.unit == "bytes":
            return int(self.budget.asked) - self.fixed
        return math.floor(self.budget.asked * sum(unit.weights for unit in self.units) / 8 + 1e-6)

    def in_units(self, stored: int) -> float:
        """Bytes of the units as the budget counts them."""
        if self.budget.unit == "bytes":
            return stored + self.fixed
        return 8 * stored / sum(unit.weights for unit in self.units)

    def at(self, bits: int) -> list[int]:
        """These bits for every unit, or the next below that its method has."""
        return [max([b for b in size if b <= bits], default=min(size)) for size in self.sizes]

    def stored(self, bits: Sequence[int]) -> int:
        """The bytes of the units at these bits."""
        return sum(size[b] for size, b in zip(self.sizes, bits, strict=True))

    @property
    def uniform(self) -> int | None:
        """The least bits of all units alike that take no fewer bytes; None where none do, or the plan is that one."""
        if self.budget.unit is None:
            return None
        enough = [b for b in CHOICES if self.stored(self.at(b)) >= self.stored(self.bits)]
        return None if not enough or self.at(enough[0]) == self.bits else enough[0]

    def plan(self, uniform: int | None = None) -> QuantizationPlan:
        """The plan with the bits that were chosen, or those of a uniform one."""
        bits = self.bits if uniform is None else self.at(uniform)
        chosen = {unit.name: unit.methods[b] for unit, b in zip(self.units, bits, strict=True)}
        others = {pattern: method for pattern, method in self.base.overrides.items() if pattern not in chosen}
        return replace(self.base, overrides=others | chosen)  # the last that matches counts

    def figures(
        self, model: Transformer, figures: Mapping[str, Any], uniform: Transformer | None, held_out: TokenBlocks
    ) -> dict[str, Any]:
        """Entry of report.json.

        Args:
            model: the result, loaded back.
            figures: of the pair that the report is about.
            uniform: the model at uniform bits, where one is compared.
            held_out: text.
        """
        layers = [
            {
                "name": unit.name,
                "maps": len(unit.members),
                "weights": unit.weights,
                "bits": bits,
                "kl": kl,
                "bytes": size,
            }
            for unit, bits, kl, size in zip(self.units, self.bits, self.costs, self.sizes, strict=True)
        ]
        found: dict[str, Any] = {"layers": layers, "text": "validation split", "tokens": self.tokens}
        if self.budget.unit is None:
            return found
        stored = stored_bytes(model, self.units)
        achieved = figures["after"]["size"]["stored_bytes"] if self.budget.unit == "bytes" else self.in_units(stored)
        found["budget"] = {
            "unit": self.budget.unit,
            "asked": self.budget.asked,
            "achieved": achieved,
            "smallest": self.in_units(self.stored(self.at(min(CHOICES)))),
            "largest": self.in_units(self.stored(self.at(max(CHOICES)))),
        }
        if uniform is not None:
            (now, plain), _ = evaluate_qualities([model, uniform], held_out)
            difference = paired(plain, now)
            found["uniform"] = {
                "bits": self.uniform,
                "stored_bytes": stored_bytes(uniform, self.units),
                "mixed_bytes": stored,
                "perplexity": plain.figures()["perplexity"],
                "difference": difference.value,
                "interval": [difference.low, difference.high],
            }
        return found


def mix(
    model: Transformer,
    plan: QuantizationPlan,
    budget: Budget,
    at_bits: Callable[[str, QuantizationPlan], Mapping[int, Any] | None],
) -> Mixed:
    """The layers of a model whose bits a budget settles, before anything is measured.

    Args:
        at_bits: name of a layer, plan -> bits -> method, or None.

    Raises:
        UserError: a budget that no plan can keep, or no layer to choose for.
    """
    with apart(model):
        plan.check_patterns(model)
        units = units_of(model, lambda name: at_bits(name, plan))
        if not units:
            raise UserError("no layer is left whose bits a budget could choose: skip and layers settle all of them")
        sizes = [unit.bytes() for unit in units]
        fixed = _fixed(model, plan, units) if budget.unit == "bytes" else 0
    mixed = Mixed(budget, plan, units, fixed, sizes)
    least, most = (mixed.stored(mixed.at(edge(CHOICES))) for edge in (min, max))
    if budget.unit is not None and mixed.room() < least:
        low, high = (budget.shown(mixed.in_units(stored)) for stored in (least, most))
        raise UserError(
            f"budget_{budget.unit} is {budget.shown(budget.asked)}; the least that this model takes is {low}, the most "
            f"{high}"
        )
    return mixed


def _fixed(model: Transformer, plan: QuantizationPlan, units: Sequence[Unit]) -> int:
    """Bytes of the weights file that are not the units' own, at most: its header grows with the numbers in it."""
    packed = {}
    for step in steps_of(model):
        for name, module in step.linears.items():
            method = plan.choose(name)[0]
            if method is not None:
                packed[name] = method.stored_form(type(module), tuple(module.weight.shape))
    for unit in units:
        largest = unit.methods[max(unit.methods)]
        packed |= {
            name: largest.stored_form(type(model.get_submodule(name)), shape)
            for name, shape in zip(unit.members, unit.shapes, strict=True)
        }
    own = sum(packed[name].stored_bytes() for unit in units for name in unit.members)
    return file_bytes(model, packed) - own


def stored_bytes(model: Transformer, units: Sequence[Unit]) -> int:
    """Bytes of the units in a model that was quantized."""
    return sum(model.get_submodule(name).stored_bytes() for unit in units for name in unit.members)

"""`espalier quantize`: the weights in fewer bits by a method of compress.quantization, one block at a time."""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

from app.evaluation.sensitivity import sentences
from app.loading import Loaded, Source, load_model
from compress.calibration.records import LayerRecord
from compress.calibration.store import FolderStore
from compress.quantization import Rtn
from compress.quantization.plan import QuantizationPlan, quantize_model
from compress.quantization.quantizer import GRID, Quantizer, grid_of, own_options, read_method, title_of, with_grid
from models import checkpoint
from models.errors import UserError
from models.registry import Names
from models.transformer import Transformer
from recipes.command_line import check_keys
from recipes.commands import options
from recipes.commands.bit_allocation import CHOICES, Mixed, mix, read_budget
from recipes.commands.stage import Stage
from recipes.commands.stage_data import Text
from recipes.commands.terminal import Bars, by_layer

FULL = 16  # bits that stand for "leave it as it is"


class Quantize(Stage[options.Quantize]):
    """Quantization by one of the methods of compress.quantization."""

    verb = "quantize"

    def __init__(self, chosen: options.Quantize) -> None:
        given = {name: getattr(chosen, name) for name in GRID if getattr(chosen, name) is not None}
        self.method = with_grid(read_method(chosen.method, "method"), given)
        self.made = [self.method]
        self.budget = read_budget(chosen, self.method)
        self.mixed: Mixed | None = None  # which layer was given how many bits, where layers were measured
        self.uniform: Transformer | None = None  # what the plan is held against
        spec, grid = {"kind": self.method.kind, **own_options(self.method)}, grid_of(self.method)
        if self.budget is not None and self.budget.unit is not None:
            grid |= {"bits": None}
        super().__init__(replace(chosen, method=spec, **grid))

    def title(self) -> str:
        title = title_of(self.method)
        if self.budget is None or self.budget.unit is None:
            return title
        return title.replace(f"{self.method.format.bits} bits", self.budget.title(), 1)

    def check(self) -> None:
        self.overrides()
        self.end(self.options.embedding_bits, "embedding_bits")
        self.end(self.options.head_bits, "head_bits")

    def parents(self) -> dict[str, Loaded]:
        loaded = load_model(self.options.model, self.device, self.dtype)
        if loaded.model.head is None and self.options.head_bits != FULL:
            raise UserError(
                f"head_bits is {self.options.head_bits}, but the head of {loaded.source.path} is its embedding; "
                "choose embedding_bits, which holds for both"
            )
        return {"model": loaded}

    def overrides(self) -> dict[str, Quantizer | None]:
        """Layers with a method or a grid of their own, and layers to leave as they are."""
        found = {pattern: self.override(pattern, values) for pattern, values in self.options.layers.items()}
        return found | dict.fromkeys(Names().parse(self.options.skip, "skip"))

    def override(self, pattern: str, values: dict[str, Any]) -> Quantizer | None:
        """The method for layers that match `pattern`: what it does not say is as in the rest of the model."""
        where = f"layers, {pattern}"
        check_keys(values, {*GRID, "method"}, where)
        if values.get("bits") == FULL:
            if len(values) > 1:
                raise UserError(f"{where}: {FULL} bits leave a layer as it is; say nothing else about it")
            return None
        method, grid = self.method, {name: value for name, value in values.items() if name != "method"}
        if "method" in values:
            method = self.like_the_rest(read_method(values["method"], f"{where}, method"), where)
        return self.shared(with_grid(method, grid, where))

    def like_the_rest(self, method: Any, where: str) -> Any:
        """Another method with as much of the grid of the blocks' as it can take."""
        rest = {name: value for name, value in grid_of(self.method).items() if name in method.grid}
        if rest.get("bits") not in method.bits:
            rest.pop("bits", None)
        return with_grid(method, rest, where)

    def end(self, bits: int, where: str) -> Quantizer | None:
        """The method for embedding or head: the blocks' where it can do them, otherwise rounding.

        Rounding to 8 bits takes one scale a row, as the kernels want it.
        """
        if bits == FULL:
            return None
        if bits in self.method.embedding_bits:
            return self.shared(with_grid(self.method, {"bits": bits} if "bits" in self.method.grid else {}, where))
        grid = {"bits": bits, **({"group_size": "channel", "symmetric": True} if bits == 8 else {})}
        return self.shared(with_grid(self.like_the_rest(Rtn(), where), grid, where))

    def shared(self, method: Any) -> Any:
        """The method of these very numbers that was made before: layers share what an instance works out once."""
        if method not in self.made:
            self.made.append(method)
        return self.made[self.made.index(method)]

    def compress(
        self, parents: dict[str, Loaded], text: Text, state: Path, bars: Bars
    ) -> tuple[Transformer, Sequence[LayerRecord]]:
        chosen, model = self.options, parents["model"].model
        plan = self.plan()
        if self.budget is not None:
            self.mixed = mix(model, plan, self.budget, self.at_bits)
            batches = text.calibration(self.budget.samples, self.device, split="validation")
            store = FolderStore(state / "sensitivity")
            self.mixed.solve(model, batches, store, partial(bars, "trying each layer alone"))
            plan = self.mixed.plan()
        records = self.quantize(model, plan, text, state, bars, "quantizing")
        if self.mixed is not None and self.mixed.uniform is not None:
            self.uniform = load_model(chosen.model, self.device, self.dtype).model
            uniform = self.mixed.plan(self.mixed.uniform)
            phase = f"quantizing at {self.mixed.uniform} bits, to compare"
            self.quantize(self.uniform, uniform, text, state / "uniform", bars, phase)
        return model, records

    def plan(self) -> QuantizationPlan:
        """The method of every layer, as the options have it."""
        ends = {
            f"{end}": self.end(getattr(self.options, f"{end}_bits"), f"{end}_bits") for end in ("embedding", "head")
        }
        return QuantizationPlan(self.method, self.overrides(), **ends)

    def at_bits(self, name: str, plan: QuantizationPlan) -> dict[int, Any] | None:
        """The methods between which a budget chooses for a layer, by their bits; None where its bits are settled."""
        method, own = plan.choose(name)[0], self.options.layers
        pattern = next((one for one in reversed(plan.overrides) if fnmatchcase(name, one)), None)
        if method is None or "bits" not in method.grid or "bits" in own.get(pattern, {}):
            return None
        return {bits: self.shared(with_grid(method, {"bits": bits})) for bits in CHOICES if bits in method.bits}

    def quantize(
        self, model: Transformer, plan: QuantizationPlan, text: Text, state: Path, bars: Bars, phase: str
    ) -> list[LayerRecord]:
        """Quantize a model in place by a plan; finished blocks are kept in `state`."""
        methods = [plan.method, *plan.overrides.values(), plan.embedding, plan.head]
        calibrates = any(method is not None and method.calibrates for method in methods)
        return quantize_model(
            model,
            plan.method,
            text.calibration(self.options.samples, self.device) if calibrates else None,
            overrides=plan.overrides,
            embedding=plan.embedding,
            head=plan.head,
            store=FolderStore(state),
            progress=by_layer(bars, phase, model),
            minimum_tokens=self.options.minimum_tokens,
            studying=partial(bars, f"taking gradients, before {phase}"),
        )

    def _measure(self, target: Path, sources: dict[str, Source], text: Text) -> dict[str, Any]:
        """Beside the pair: what was measured of single layers, and the plan against the uniform one."""
        figures = super()._measure(target, sources, text)
        if self.mixed is None:
            return figures
        found = self.mixed.figures(
            checkpoint.load(target, self.device, self.dtype), figures, self.uniform, text.held_out
        )
        self.notes += sentences(found)
        return figures | {"sensitivity": found}


def main(chosen: options.Quantize) -> None:
    """Run `espalier quantize`."""
    Quantize(chosen).run()

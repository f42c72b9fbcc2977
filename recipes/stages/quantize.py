"""`espalier quantize`: the weights in fewer bits by a method of compress.quantization, one block at a time."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.loading import Loaded, load_model
from compress.calibration import Method
from compress.quantization import Rtn
from compress.quantization.methods import GRID, grid_of, own_options, read_method, title_of, with_grid
from compress.quantization.plan import quantize_model
from compress.records import LayerRecord
from compress.store import FolderStore
from models.errors import UserError
from models.transformer import Transformer
from recipes.stages import options
from recipes.stages.parser import check_keys
from recipes.stages.stage import Stage
from recipes.stages.terminal import Bars, by_layer
from recipes.stages.text import Text

FULL = 16  # bits that stand for "leave it as it is"


class Quantize(Stage[options.Quantize]):
    """Quantization by one of the methods of compress.quantization."""

    verb = "quantize"

    def __init__(self, chosen: options.Quantize) -> None:
        given = {name: getattr(chosen, name) for name in GRID if getattr(chosen, name) is not None}
        self.method = with_grid(read_method(chosen.method, "method"), given)
        self.made = [self.method]
        spec = {"kind": self.method.kind, **own_options(self.method)}
        super().__init__(replace(chosen, method=spec, **grid_of(self.method)))

    def title(self) -> str:
        return title_of(self.method)

    def check(self) -> None:
        options.check_least(self.options, minimum_tokens=0)
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

    def overrides(self) -> dict[str, Method | None]:
        """Layers with a method or a grid of their own, and layers to leave as they are."""
        found = {pattern: self.override(pattern, values) for pattern, values in self.options.layers.items()}
        return found | dict.fromkeys(options.names(self.options.skip))

    def override(self, pattern: str, values: dict[str, Any]) -> Method | None:
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

    def end(self, bits: int, where: str) -> Method | None:
        """The method for embedding or head: the blocks' where it can do them, otherwise rounding.

        Rounding to 8 bits takes one scale a row, as the kernels want it.
        """
        if bits == FULL:
            return None
        if bits in self.method.ends:
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
        overrides = self.overrides()
        embedding, head = self.end(chosen.embedding_bits, "embedding_bits"), self.end(chosen.head_bits, "head_bits")
        methods = [self.method, *overrides.values(), embedding, head]
        calibrates = any(method is not None and method.calibrates for method in methods)
        records = quantize_model(
            model,
            self.method,
            text.calibration(chosen.samples, self.device) if calibrates else None,
            overrides=overrides,
            embedding=embedding,
            head=head,
            store=FolderStore(state),
            progress=by_layer(bars, "quantizing", model),
            minimum_tokens=chosen.minimum_tokens,
        )
        return model, records


def main(chosen: options.Quantize) -> None:
    """Run `espalier quantize`."""
    Quantize(chosen).run()

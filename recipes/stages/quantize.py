"""`espalier quantize`: round-to-nearest or GPTQ, one block at a time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app.loading import Loaded, load_model
from compress.calibration import LayerMethod
from compress.quantization.gptq import Gptq
from compress.quantization.grid import IntFormat, MseClip
from compress.quantization.plan import quantize_model
from compress.quantization.rtn import Rtn
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
FORMAT_KEYS = {"bits", "group_size", "symmetric"}
METHODS = {"rtn": {}, "gptq": {"act_order": True, "damping": 0.01}}  # the options that each method alone has


class Quantize(Stage[options.Quantize]):
    """Quantization by one of the methods of compress.quantization."""

    verb = "quantize"

    def __init__(self, chosen: options.Quantize) -> None:
        super().__init__(options.settle(chosen, "method", METHODS))

    def title(self) -> str:
        chosen = self.options
        size = chosen.group_size
        groups = {"channel": "a scale a row", "tensor": "one scale a matrix"}.get(size, f"groups of {size}")
        return f"{chosen.method.upper()}, {chosen.bits} bits, {groups}"

    def check(self) -> None:
        self.overrides()
        self.method({})
        self.end(self.options.embedding_bits)
        self.end(self.options.head_bits)

    def parents(self) -> dict[str, Loaded]:
        loaded = load_model(self.options.model, self.device, self.dtype)
        if loaded.model.head is None and self.options.head_bits != FULL:
            raise UserError(
                f"head_bits is {self.options.head_bits}, but the head of {loaded.source.path} is its embedding; "
                "choose embedding_bits, which holds for both"
            )
        return {"model": loaded}

    def format(self, values: dict[str, Any]) -> IntFormat:
        """The grid that the options ask for, with `values` in place of some of them."""
        chosen = self.options
        return IntFormat(
            bits=values.get("bits", chosen.bits),
            group_size=values.get("group_size", chosen.group_size),
            symmetric=values.get("symmetric", chosen.symmetric),
        )

    def method(self, values: dict[str, Any]) -> LayerMethod:
        """The method for the linear layers of the blocks."""
        chosen, clip = self.options, MseClip() if self.options.clip == "mse" else None
        if chosen.method == "rtn":
            return Rtn(self.format(values), clip)
        return Gptq(self.format(values), clip, act_order=chosen.act_order, damping=chosen.damping)

    def end(self, bits: int) -> LayerMethod | None:
        """The method for embedding or head: rounding, with one scale a row at 8 bits, as the kernels want it."""
        if bits == FULL:
            return None
        return Rtn(self.format({"bits": bits, **({"group_size": "channel", "symmetric": True} if bits == 8 else {})}))

    def overrides(self) -> dict[str, LayerMethod | None]:
        """Layers with a grid of their own, and layers to leave as they are."""
        found: dict[str, LayerMethod | None] = {}
        for pattern, values in self.options.layers.items():
            check_keys(values, FORMAT_KEYS, f"layers, {pattern}")
            found[pattern] = None if values.get("bits") == FULL else self.method(values)
        return found | dict.fromkeys(options.names(self.options.skip))

    def compress(
        self, parents: dict[str, Loaded], text: Text, state: Path, bars: Bars
    ) -> tuple[Transformer, Sequence[LayerRecord]]:
        chosen, model = self.options, parents["model"].model
        batches = text.calibration(chosen.samples, self.device) if chosen.method == "gptq" else None
        records = quantize_model(
            model,
            self.method({}),
            batches,
            overrides=self.overrides(),
            embedding=self.end(chosen.embedding_bits),
            head=self.end(chosen.head_bits),
            store=FolderStore(state),
            progress=by_layer(bars, "quantizing", model),
        )
        return model, records


def main(chosen: options.Quantize) -> None:
    """Run `espalier quantize`."""
    Quantize(chosen).run()

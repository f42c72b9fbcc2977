"""Quantization methods by name: one file a method, each registered here and chosen in YAML as `{kind: gptq, ...}`.

To add a method, write a frozen dataclass of its options that is a `Quantizer` and overrides what differs from the
defaults (`compress` for each linear layer by itself, `compress_block` for a block, `prepare` for the whole model), put
`@METHODS.register("name")` above it and its module into `compress/quantization/__init__.py`: recipes can name it then.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from compress.calibration.sequential import Batch, LayerMethod
from compress.quantization.formats.packed import Packed
from models.errors import UserError
from models.registry import Registry, dump_dataclass

METHODS = Registry("method", example="{kind: gptq, act_order: false}")
GRID = ("bits", "group_size", "symmetric")


class Quantizer(LayerMethod):
    """Base class of the registered methods, each a frozen dataclass of its options.

    Attributes:
        format: a frozen dataclass, `IntFormat` or another that has the names in `grid`; they are filled in from the
            options that stand beside the method and not in it, and what its default says holds where they are not
            given. None: `grid` is empty. Every other field is an option of the method itself.
        calibrates: whether it looks at calibration text.
        grid: which of `bits`, `group_size` and `symmetric` mean something to it; the others are refused when given.
        bits: the bits of a weight that it can be asked for; empty where it has no such number.
        embedding_bits: the bits at which it does the token embedding and the head itself, with what `grid` takes; at
            other bits, and for a method that leaves this empty, the two are rounded to nearest. A head reads hidden
            states, an embedding token ids: of a tied one the method sees the `nn.Embedding`.
        joint: whether the layers of a block are handed over at once whatever their numbers, each with its own
            instance in `BlockStep.methods`; otherwise every instance gets the layers of its own numbers alone.
        shares: what the weights of a group have in common.
    """

    kind: ClassVar[str]
    format: Any = None
    calibrates: ClassVar[bool] = False
    grid: ClassVar[tuple[str, ...]] = ()
    bits: ClassVar[tuple[int, ...]] = ()
    embedding_bits: ClassVar[tuple[int, ...]] = ()
    joint: ClassVar[bool] = False
    shares: ClassVar[str] = "scale"

    def prepare(
        self,
        model: nn.Module,
        batches: Sequence[Batch] | None,
        *,
        like: Self | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """See `Method.prepare`.

        Args:
            like: an instance of the class that was prepared for this model and text: what it has computed serves all.
            progress: called with (done, in all) where that takes long.
        """

    def stored_form(self, kind: type[nn.Module], shape: tuple[int, int]) -> Packed:
        """The packed layer, on the meta device, in which a weight (N, K) of this shape is stored: its true bytes.

        Args:
            kind: `nn.Linear` or `nn.Embedding`.

        Raises:
            UserError: it is not known before the method has run.
        """
        raise UserError(f"how many bytes method {self.kind} takes is not known before it has run")

    def nearest(self, weight: Tensor) -> Tensor:
        """The weight (N, K) fp32 in the cheap form of the method, of which `stored_form` is known: no data."""
        raise NotImplementedError


def read_method(value: Any, where: str) -> Quantizer:
    """The method that `NAME` or `{kind: NAME, ...}` stands for: its own options, and those of `GRID` that it has.

    Raises:
        UserError: an unknown name or option, with its place.
    """
    if not isinstance(value, Mapping):
        return METHODS.parse(value, where)
    grid = {name: number for name, number in value.items() if name in GRID}
    own = {name: number for name, number in value.items() if name not in GRID}
    if "format" in own:
        raise UserError(f"{where}: unknown key 'format'; give {', '.join(GRID)} themselves")
    return with_grid(METHODS.parse(own, where), grid, where)


def with_grid(method: Quantizer, values: Mapping[str, Any], where: str = "") -> Quantizer:
    """The method with `values` of `bits`, `group_size` and `symmetric` in its format.

    A group size of -1 is what other tools call `channel`.

    Raises:
        UserError: one that the method does not have, or bits that it cannot give; `where` says who asked, or nothing.
    """
    place = f"{where}: " if where else ""
    for name in values:
        if name not in method.grid:
            able = ", ".join(kind for kind in METHODS if name in METHODS[kind].grid)
            raise UserError(
                f"{place}{name} means nothing to method {method.kind}; leave it out, or choose one that it does: {able}"
            )
    bits = values.get("bits")
    if bits is not None and (type(bits) is not int or bits not in method.bits):
        raise UserError(f"{place}bits of method {method.kind} must be {_either(method.bits)}, not {bits!r}")
    if not values:
        return method
    if values.get("group_size") == -1:
        values = {**values, "group_size": "channel"}
    try:
        return dataclasses.replace(method, format=dataclasses.replace(method.format, **values))
    except UserError as error:
        raise UserError(f"{place}{error}") from None


def grid_of(method: Quantizer) -> dict[str, Any]:
    """The values of `bits`, `group_size` and `symmetric` that the method has."""
    return {name: getattr(method.format, name) for name in method.grid}


def own_options(method: Quantizer) -> dict[str, Any]:
    """The options of the method itself, as plain JSON values."""
    names = {field.name for field in dataclasses.fields(method) if field.init} - {"format"}
    return {name: value for name, value in dump_dataclass(method).items() if name in names}


def requested(method: Quantizer) -> dict[str, Any]:
    """The options of a method, its format included, as JSON values: the records' `requested`."""
    form = dataclasses.asdict(method.format) if method.format is not None else {}
    return {"method": method.kind, **form, **{name: _short(value) for name, value in own_options(method).items()}}


def title_of(method: Quantizer) -> str:
    """The method in a few words: "GPTQ, 4 bits, groups of 64, act_order false"."""
    words, grid = [method.kind.upper()], grid_of(method)
    if "bits" in grid:
        words.append(f"{grid['bits']} bits")
    if "group_size" in grid:
        size = grid["group_size"]
        whole = {"channel": f"a {method.shares} a row", "tensor": f"one {method.shares} a matrix"}
        words.append(whole.get(size, f"groups of {size}"))
    usual = own_options(type(method)())
    for name, value in own_options(method).items():
        if value != usual[name]:
            shown = _short(value)
            words.append(f"{name} {str(shown).lower() if shown in (None, True, False) else shown}")
    return ", ".join(words)


def _short(value: Any) -> Any:
    """An option as a table shows it: a nested spec by its name and numbers."""
    if isinstance(value, dict) and "kind" in value:
        numbers = ", ".join(f"{name} {number}" for name, number in value.items() if name != "kind")
        return f"{value['kind']} ({numbers})" if numbers else value["kind"]
    return value


def _either(values: tuple[int, ...]) -> str:
    """ "2, 3 or 4"."""
    *first, last = map(str, values)
    return " or ".join(filter(None, (", ".join(first), last)))

"""Early exits: a token may leave a deep model at an intermediate layer, where the shared head is already sure of it.

Training adds the losses of the exits to that of the last layer (deep supervision: Be Your Own Teacher, arXiv
1905.08094; LayerSkip, arXiv 2404.16710, section 4.1), so that one head reads every exit. How a model is decoded with
them is in models/early_exit_decoding.py.

B prompts, T new tokens, D model width.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from models.errors import UserError
from models.registry import dump_dataclass, read_dataclass
from models.specs import AFTER, NormSpec


@dataclass(frozen=True)
class Exits:
    """Early exits: the layers after which a model can stop.

    Args:
        layers: there is an exit after so many layers, each number at least 1 and below the depth.
        weight: what all exits together weigh in the training loss, beside the 1 of the last layer. They share it in
            proportion to the layers before them, as later exits can be asked for more.
    """

    layers: list | tuple
    weight: float = 0.3

    def __post_init__(self) -> None:
        numbers = tuple(self.layers)
        if not numbers or any(type(number) is not int or number < 1 for number in numbers):
            raise UserError(f"layers must name at least one exit, each after 1 layer or more, got {list(numbers)}")
        if list(numbers) != sorted(set(numbers)):
            raise UserError(f"layers must rise from exit to exit, got {list(numbers)}")
        if not 0 < self.weight < float("inf"):
            raise UserError(f"weight must be positive, got {self.weight}")
        object.__setattr__(self, "layers", numbers)

    def check(self, layers: Sequence[Any]) -> None:
        """Raise UserError where an exit is not before the end of the layers, or a later layer needs what they found."""
        last, depth = self.layers[-1], len(layers)
        if last >= depth:
            raise UserError(f"exits.layers: an exit after layer {last} is none in a model of {depth} layers")
        for layer in layers:
            if layer.attention is not None and layer.attention.carries:
                raise UserError(
                    f"exits let tokens wait before a layer, and attention {layer.attention.kind!r} hands what it found "
                    "about them from layer to layer (carry); leave one out"
                )


class _Format:
    """Reads and writes `Exits` as the object that stands in a config."""

    @staticmethod
    def parse(value: Any, where: str) -> Exits:
        if isinstance(value, Exits):
            return value
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: expected exits such as {{layers: [2, 4], weight: 0.3}}, got {value!r}")
        return read_dataclass(Exits, value, where)

    @staticmethod
    def dump(spec: Exits) -> dict[str, Any]:
        return {**dump_dataclass(spec), "layers": list(spec.layers)}


EXITS = _Format()


class ExitNorms(nn.Module):
    """Norms between a block and the shared head, one an exit, where the residual stream needs one."""

    def __init__(self, exits: Exits, norm: NormSpec, width: int) -> None:
        super().__init__()
        self.layers, self.weight = exits.layers, exits.weight
        after = norm.position in AFTER  # the stream is normalised already
        self.norms = nn.ModuleList(nn.Identity() if after else norm.build(width) for _ in self.layers)

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the blocks that an exit follows."""
        return tuple(f"blocks.{layer - 1}" for layer in self.layers)

    def forward(self, number: int, x: Tensor) -> Tensor:
        """Hidden states (..., D) for the head at exit `number` (from 0), of its block's output x (..., D)."""
        return self.norms[number](x)

    def loss(self, streams: Mapping[str, Tensor], nll: Callable[[Tensor], Tensor]) -> Tensor:
        """The weighted mean over the exits of `nll`, from the outputs (B, T, D) of the blocks by their names.

        nll: hidden states (B, T, D) that the head reads -> mean negative log-likelihood.
        """
        total = sum(self.layers)
        taps = enumerate(zip(self.layers, self.taps, strict=True))
        return self.weight * sum(layer / total * nll(self(number, streams[tap])) for number, (layer, tap) in taps)

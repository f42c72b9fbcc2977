"""Early exits: a token may leave a deep model at an intermediate layer, where the shared head is already sure of it.

Training adds the losses of the exits to that of the last layer (deep supervision: Be Your Own Teacher, arXiv
1905.08094; LayerSkip, arXiv 2404.16710, section 4.1), so that one head reads every exit. When decoding, a token is
emitted at the first exit whose likeliest token is likely enough (CALM, arXiv 2207.07061). Tokens behind it still have
to see it in the deeper layers: its hidden state waits there, and goes through them in one chunk together with the first
later token that gets so deep (FREE, arXiv 2310.05424, synchronized parallel decoding). So the keys and values of every
layer are those of the whole model; none is approximated or copied.

B prompts, T new tokens, P new and waiting ones, S tokens so far, D model width, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.errors import UserError
from models.norms import AFTER
from models.registry import dump_dataclass, read_dataclass

if TYPE_CHECKING:
    from models.cache import ModelCache
    from models.config import LayerConfig, ModelConfig
    from models.transformer import Transformer


@dataclass(frozen=True)
class Exits:
    """Where a model can be left early.

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

    def check(self, layers: Sequence["LayerConfig"]) -> None:
        """Raise UserError where an exit is not before the end of the layers, or a later layer needs what they found."""
        last, depth = self.layers[-1], len(layers)
        if last >= depth:
            raise UserError(f"exits.layers: an exit after layer {last} is none in a model of {depth} layers")
        for layer in layers:
            if getattr(layer.attention, "leaves_notes", False):
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
    """What stands between a block and the shared head at each exit: a norm of its own, where the stream needs one."""

    def __init__(self, config: "ModelConfig") -> None:
        super().__init__()
        self.layers, self.weight = config.exits.layers, config.exits.weight
        after = config.norm.position in AFTER  # the stream is normalised already
        self.norms = nn.ModuleList(nn.Identity() if after else config.norm.build(config.width) for _ in self.layers)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Numbers of the blocks, from 0, that an exit follows."""
        return tuple(layer - 1 for layer in self.layers)

    def forward(self, number: int, x: Tensor) -> Tensor:
        """What the head reads at exit `number` (from 0) of its block's output x (..., D): (..., D)."""
        return self.norms[number](x)

    def loss(self, model: "Transformer", states: Mapping[int, Tensor], targets: Tensor) -> Tensor:
        """The weighted mean NLL of targets (B, T) over the exits, given the outputs (B, T, D) of their blocks."""
        total = sum(self.layers)
        losses = [
            layer / total * model.loss(self(number, states[layer - 1]), targets)[0]
            for number, layer in enumerate(self.layers)
        ]
        return self.weight * sum(losses)


def check_confidence(model: "Transformer", confidence: float) -> None:
    """Raise UserError where a model cannot be left early, or never or always would be by mistake."""
    if model.config.exits is None:
        raise UserError(
            "exit_confidence is for a model with early exits, and this one has none: "
            "train it with architecture.exits, e.g. {layers: [2, 4]}"
        )
    if not confidence > 0:
        raise UserError(f"exit_confidence must be above 0 (it is a probability; above 1 never exits), got {confidence}")


class EarlyExit:
    """Decodes with a model and its cache, running of every step only as many layers as it takes to be sure.

    Attributes:
        layers_used: after how many layers each step was emitted, so far.
    """

    def __init__(self, model: "Transformer", cache: "ModelCache", confidence: float) -> None:
        check_confidence(model, confidence)
        self.model, self.cache, self.confidence = model, cache, confidence
        self.ends = (*model.config.exits.layers, len(model.blocks))
        self.positions: Tensor | None = None  # (B or 1, S)
        self.waiting: list[list[Tensor]] = [[] for _ in self.ends]  # (B, T, D) each, before every segment of layers
        self.layers_used: list[int] = []

    def step(self, tokens: Tensor, documents: Tensor | None = None, going: Tensor | None = None) -> Tensor:
        """Feed the next tokens (B, T), and return the logits (B, V) after the last of them from where they left.

        Args:
            tokens: int64.
            documents: (B, T) as for `Transformer.embed`.
            going: (B,) bool, the prompts that have to be sure; by default all.
        """
        model, cache = self.model, self.cache
        positions = model.default_positions(tokens, documents, cache)  # (B or 1, T)
        x, context = model.embed(tokens, documents=documents, positions=positions, cache=cache)
        if self.positions is not None:
            shape = (max(len(positions), len(self.positions)), -1)
            positions = torch.cat([self.positions.expand(shape), positions.expand(shape)], dim=1)
        self.positions = positions  # (B or 1, S)
        begin = 0
        for number, end in enumerate(self.ends):
            if self.waiting[number]:
                x = torch.cat([*self.waiting[number], x], dim=1)  # (B, P, D)
                self.waiting[number] = []
                past = cache.length - x.shape[1]
                context = model.context(x, self.positions[:, past:], cache.documents, past, cached=True)
            for block, layer in zip(model.blocks[begin:end], cache.layers[begin:end], strict=True):
                x = block(x, context, layer)  # (B, P, D)
            if end == len(model.blocks):
                break
            logits = model.project(model.exits(number, x[:, -1]))  # (B, V)
            if self._sure(logits, going):
                self.waiting[number + 1].append(x)
                self.layers_used.append(end)
                return logits
            begin = end
        self.layers_used.append(end)
        return model.project(model.finish(x[:, -1]))

    def _sure(self, logits: Tensor, going: Tensor | None) -> bool:
        sure = logits.float().softmax(-1).amax(-1) >= self.confidence  # (B,)
        return bool((sure if going is None else sure | ~going).all())

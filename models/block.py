"""A block: sub-layers around the residual stream, in the order that the layer's config gives.

    attention_first     x = x + A(N(x)); x = x + F(N(x))
    feedforward_first   x = x + F(N(x)); x = x + A(N(x))
    parallel            x = x + A(N(x)) + F(N(x))          one norm each

written for norm position `pre`; the other positions move the norm (models/norms.py). In a reversible model (two streams
in place of one) the branches A(N(x)), F(N(x)) and, in a parallel block, their sum are the same (models/reversible.py).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.attention.protocol import NOTHING, ForwardInputs, Mixed, mixed_of, summed
from models.cache import LayerCache
from models.config import ORDERS, LayerConfig, ModelConfig
from models.mixture_of_depths import ShortenedCache
from models.norms import draw_deepnorm, residual_gain
from models.specs import AFTER, LayerContext


class Block(nn.Module):
    """One layer of the Transformer: x (B, T, D) -> (B, T, D); of a reversible one (B, T, 2D) -> (B, T, 2D).

    Attributes:
        sublayers: names of those that the layer has, in their order; the norm of `NAME` is `NAME_norm`.
    """

    def __init__(self, layer: LayerConfig, model: ModelConfig, place: LayerContext) -> None:
        super().__init__()
        self.place, self.order, self.norm_position = place, layer.order, model.norm.position
        self.reversible = model.residual == "reversible"
        self.gain = residual_gain(self.norm_position, place.branches)
        self.attention = self.feedforward = None
        if layer.attention is not None:
            self.attention_norm = model.norm.build(model.width)
            self.attention = self._drawn(lambda: layer.attention.build(place), ("v", "o"))
            if self.norm_position == "sandwich":
                self.attention_out_norm = model.norm.build(model.width)
        if layer.feedforward is not None:
            self.feedforward_norm = model.norm.build(model.width)
            self.feedforward = self._drawn(lambda: self._feedforward(layer, model), None)
            if self.norm_position == "sandwich":
                self.feedforward_out_norm = model.norm.build(model.width)
        self.sublayers = tuple(name for name in ORDERS[layer.order] if getattr(self, name) is not None)
        self.dropout = nn.Dropout(model.dropout)
        self.depth = None if layer.depth is None else layer.depth.build(place, layer.attention is not None)

    def _feedforward(self, layer: LayerConfig, model: ModelConfig) -> nn.Module:
        feedforwards = [other.feedforward for other in model.layers if other.feedforward is not None]
        alike = sum(other.kind == layer.feedforward.kind for other in feedforwards)
        return layer.feedforward.build(model.width, self.place.branches, layer=self.place.layer, layers=alike)

    def _drawn(self, build: Callable[[], nn.Module], small: tuple[str, ...] | None) -> nn.Module:
        """The sub-layer with the weights that it starts from; in deepnorm the maps `small` (all: None) are smaller."""
        if self.norm_position != "deepnorm":
            return build()
        with torch.device("meta"):  # nothing is drawn twice
            module = build()
        return draw_deepnorm(module, small, self.place.branches)

    def forward(self, x: Tensor, inputs: ForwardInputs, cache: LayerCache | None = None) -> Mixed:
        """The layer on x, with the losses and the state that its mechanisms return."""
        if self.depth is None:
            return self.run(x, inputs, cache)
        return self.depth(x, inputs, cache, self.run)

    def run(self, x: Tensor, inputs: ForwardInputs, cache: LayerCache | None = None) -> Mixed:
        """The layer on all tokens of x, or on those that take part."""
        if self.reversible:
            a, b = x.chunk(2, dim=-1)  # (B, T, D) each
            losses, state = NOTHING, NOTHING
            for branch in self.branches():
                y, more, left = branch(b, inputs, cache)
                a, b = b, a + y
                losses, state = summed(losses, more), {**state, **left}
            return Mixed(torch.cat([a, b], dim=-1), losses, state)  # (B, T, 2D)
        start, losses, state = x, NOTHING, NOTHING
        for name in self.sublayers:
            y, more, left = self._branch(name, start if self.order == "parallel" else x, inputs, cache)
            if self.norm_position in AFTER:
                x = getattr(self, f"{name}_norm")(self.gain * x + y)
            else:
                x = x + y
            losses, state = summed(losses, more), {**state, **left} if left else state
        return Mixed(x, losses, state)

    def branches(self) -> list[Callable[[Tensor, ForwardInputs, LayerCache | None], Mixed]]:
        """The branches of a reversible block in their order, each from (B, T, D) to (B, T, D).

        They compute in the dtype of the weights: the streams that they read and add to may be wider.
        """

        def run(*names: str) -> Callable[[Tensor, ForwardInputs, LayerCache | None], Mixed]:
            def branch(x: Tensor, inputs: ForwardInputs, cache: LayerCache | None = None) -> Mixed:
                x = x.to(getattr(self, f"{names[0]}_norm").weight.dtype)
                parts = [self._branch(name, x, inputs, cache) for name in names]
                losses, state = NOTHING, NOTHING
                for part in parts:
                    losses, state = summed(losses, part.losses), {**state, **part.state}
                return Mixed(sum((part.y for part in parts[1:]), parts[0].y), losses, state)

            return branch

        return [run(*self.sublayers)] if self.order == "parallel" else [run(name) for name in self.sublayers]

    def _branch(self, name: str, x: Tensor, inputs: ForwardInputs, cache: LayerCache | None) -> Mixed:
        """One sub-layer, normalised as `pre` and `sandwich` want it: (B, T, D) -> (B, T, D)."""
        module = getattr(self, name)
        x = x if self.norm_position in AFTER else getattr(self, f"{name}_norm")(x)
        result = module(x, inputs, cache) if name == "attention" else module(x, inputs)
        y, losses, state = mixed_of(result)
        y = getattr(self, f"{name}_out_norm")(y) if self.norm_position == "sandwich" else y
        return Mixed(self.dropout(y), losses, state)

    def advance(self) -> None:
        """Let the mechanisms take over what the latest forward in training counted; called before the next one."""
        for module in (self.depth, self.feedforward):
            if module is not None:
                module.advance()

    def after_step(self) -> None:
        """Let the mechanisms follow that move once an optimizer step without a gradient."""
        if self.feedforward is not None:
            self.feedforward.after_step()

    def new_cache(self, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> LayerCache | None:
        """An empty cache for `capacity` tokens in each of `batch` rows, or None for a layer without attention."""
        if self.attention is None:
            return None
        cache = self.attention.new_cache(batch, capacity, device, dtype)
        return cache if self.depth is None else ShortenedCache(cache)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As `nn.Module.compile`; where shapes depend on the data, only what runs on the tokens that are chosen."""
        if self.depth is not None and self.depth.spec.data_dependent:
            self.run = torch.compile(self.run, *args, **kwargs)
        else:
            super().compile(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        state.pop("run", None)  # compiled code belongs to this very module: a copy would run it with these weights
        return state

"""A block: an attention and a feed-forward sub-layer (or one of them) around the residual stream.

    attention_first     x = x + A(N(x)); x = x + F(N(x))
    feedforward_first   x = x + F(N(x)); x = x + A(N(x))
    parallel            x = x + A(N(x)) + F(N(x))          one norm each

written for norm position `pre`; the other positions move the norm (models/norms.py). In a reversible model (two streams
in place of one) the branches A(N(x)), F(N(x)) and, in a parallel block, their sum are the same (models/reversible.py).
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.attention import Context, Place
from models.cache import LayerCache
from models.depth import ShortenedCache
from models.norms import AFTER, draw_deepnorm, residual_gain

if TYPE_CHECKING:
    from models.config import LayerConfig, ModelConfig

ORDERS = ("attention_first", "feedforward_first", "parallel")


class Block(nn.Module):
    """One layer of the Transformer: x (B, T, D) -> (B, T, D); of a reversible one (B, T, 2D) -> (B, T, 2D)."""

    def __init__(self, layer: "LayerConfig", model: "ModelConfig", place: Place) -> None:
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
        self.dropout = nn.Dropout(model.dropout)
        self.depth = None if layer.depth is None else layer.depth.build(place, layer.attention is not None)

    def _feedforward(self, layer: "LayerConfig", model: "ModelConfig") -> nn.Module:
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

    def forward(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        if self.depth is None:
            return self.run(x, context, cache)
        return self.depth(x, context, cache, self.run)

    def run(self, x: Tensor, context: Context, cache: LayerCache | None = None) -> Tensor:
        """The layer on all tokens of x, or on those that take part."""
        if self.reversible:
            a, b = x.chunk(2, dim=-1)  # (B, T, D) each
            for branch in self.branches(context, cache):
                a, b = b, a + branch(b)
            return torch.cat([a, b], dim=-1)  # (B, T, 2D)
        if self.order == "parallel":
            return x + self._attend(x, context, cache) + self._feed(x, context)
        if self.order == "feedforward_first":
            return self._attention_step(self._feedforward_step(x, context), context, cache)
        return self._feedforward_step(self._attention_step(x, context, cache), context)

    def branches(self, context: Context, cache: LayerCache | None = None) -> list[Callable[[Tensor], Tensor]]:
        """The branches of a reversible block in their order, each from (B, T, D) to (B, T, D).

        They compute in the dtype of the weights: the streams that they read and add to may be wider.
        """

        def attend(x: Tensor) -> Tensor:
            return self._attend(x.to(self.attention_norm.weight.dtype), context, cache)

        def feed(x: Tensor) -> Tensor:
            return self._feed(x.to(self.feedforward_norm.weight.dtype), context)

        if self.order == "parallel":
            return [lambda x: attend(x) + feed(x)]
        present = ([attend] if self.attention is not None else []) + ([feed] if self.feedforward is not None else [])
        return present[::-1] if self.order == "feedforward_first" else present

    def _attend(self, x: Tensor, context: Context, cache: LayerCache | None) -> Tensor:
        """The attention branch, normalised as `pre` and `sandwich` want it: (B, T, D) -> (B, T, D)."""
        y = self.attention(x if self.norm_position in AFTER else self.attention_norm(x), context, cache)
        return self.dropout(self.attention_out_norm(y) if self.norm_position == "sandwich" else y)

    def _feed(self, x: Tensor, context: Context) -> Tensor:
        """The feed-forward branch, normalised likewise: (B, T, D) -> (B, T, D)."""
        y = self.feedforward(x if self.norm_position in AFTER else self.feedforward_norm(x), context)
        return self.dropout(self.feedforward_out_norm(y) if self.norm_position == "sandwich" else y)

    def _attention_step(self, x: Tensor, context: Context, cache: LayerCache | None) -> Tensor:
        if self.attention is None:
            return x
        y = self._attend(x, context, cache)
        return self.attention_norm(self.gain * x + y) if self.norm_position in AFTER else x + y

    def _feedforward_step(self, x: Tensor, context: Context) -> Tensor:
        if self.feedforward is None:
            return x
        y = self._feed(x, context)
        return self.feedforward_norm(self.gain * x + y) if self.norm_position in AFTER else x + y

    @torch.enable_grad()
    def take_losses(self) -> dict[str, Tensor]:
        """The training losses that the mechanisms have left since they were last taken, summed by name."""
        found: dict[str, Tensor] = {}
        for part in (self.attention, self.feedforward):
            if self.training and getattr(part, "auxiliary", None):
                for name, loss in part.auxiliary.items():
                    found[name] = found[name] + loss if name in found else loss
                part.auxiliary = {}
        return found

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

"""A block: sub-layers around the residual stream, in the order that the layer's config gives.

    attention_first     x = x + A(N(x)); x = x + F(N(x))
    feedforward_first   x = x + F(N(x)); x = x + A(N(x))
    parallel            x = x + A(N(x)) + F(N(x))          one norm each

written for norm position `pre`; the other positions move the norm (models/norms.py). In a reversible model (two streams
in place of one) the branches A(N(x)), F(N(x)) and, in a parallel block, their sum are the same (models/reversible.py).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.attention.protocol import NOTHING, ForwardInputs, Mixed, mixed_of, summed
from models.cache import BlockCache, ContiguousCache, PagedCache, Rows
from models.config import SUBLAYERS, LayerConfig, ModelConfig
from models.mixture_of_depths import DEPTH, ChosenTokens
from models.norms import draw_deepnorm, residual_gain
from models.specs import AFTER, LayerContext, SubLayerSpec


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
        self.sublayers = tuple(layer.sublayers)
        kinds = [(name, spec.kind) for other in model.layers for name, spec in other.sublayers.items()]
        for name in SUBLAYERS:
            if name not in layer.sublayers:
                setattr(self, name, None)
                continue
            spec = layer.sublayers[name]
            first = place.layer == 0 and name == self.sublayers[0]
            bare = first and not model.first_norm
            self.add_module(f"{name}_norm", nn.Identity() if bare else model.norm.build(model.width))
            self.add_module(name, self._drawn(spec, kinds.count((name, spec.kind))))
            if self.norm_position == "sandwich":
                self.add_module(f"{name}_out_norm", model.norm.build(model.width))
        self.dropout = nn.Dropout(model.dropout)
        self.depth = None if layer.depth is None else layer.depth.build(place, layer.attention is not None)

    def _drawn(self, spec: SubLayerSpec, alike: int) -> nn.Module:
        """The sub-layer with the weights that it starts from; in deepnorm those of `spec.written` are smaller."""
        if self.norm_position != "deepnorm":
            return spec.build_at(self.place, alike)
        with torch.device("meta"):  # nothing is drawn twice
            module = spec.build_at(self.place, alike)
        return draw_deepnorm(module, spec.written, self.place.branches)

    def forward(self, x: Tensor, inputs: ForwardInputs, cache: BlockCache | None = None) -> Mixed:
        """The layer on x, with the losses and the state that its mechanisms return."""
        if self.depth is None:
            return self.run(x, inputs, cache)
        return self.depth(x, inputs, cache, self.run)

    def run(self, x: Tensor, inputs: ForwardInputs, cache: BlockCache | None = None) -> Mixed:
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

    def branches(self) -> list[Callable[[Tensor, ForwardInputs, BlockCache | None], Mixed]]:
        """The branches of a reversible block in their order, each from (B, T, D) to (B, T, D)."""
        together = [self.sublayers] if self.order == "parallel" else [(name,) for name in self.sublayers]
        return [partial(self._sum, names) for names in together]

    def _sum(self, names: tuple[str, ...], x: Tensor, inputs: ForwardInputs, cache: BlockCache | None = None) -> Mixed:
        """The sum of sub-layers, in the dtype of the weights: the streams that are read and added to may be wider."""
        x = x.to(getattr(self, f"{names[0]}_norm").weight.dtype)
        parts = [self._branch(name, x, inputs, cache) for name in names]
        losses, state = NOTHING, NOTHING
        for part in parts:
            losses, state = summed(losses, part.losses), {**state, **part.state}
        return Mixed(sum((part.y for part in parts[1:]), parts[0].y), losses, state)

    def _branch(self, name: str, x: Tensor, inputs: ForwardInputs, cache: BlockCache | None) -> Mixed:
        """One sub-layer, normalised as `pre` and `sandwich` want it: (B, T, D) -> (B, T, D)."""
        module = getattr(self, name)
        x = x if self.norm_position in AFTER else getattr(self, f"{name}_norm")(x)
        own = None if cache is None else cache.get(name)
        y, losses, state = mixed_of(module(x, inputs) if own is None else module(x, inputs, own))
        y = getattr(self, f"{name}_out_norm")(y) if self.norm_position == "sandwich" else y
        return Mixed(self.dropout(y), losses, state)

    def advance(self) -> None:
        """Let the mechanisms take over what the latest forward in training counted; called before the next one."""
        for module in (self.depth, *self._modules_in_order()):
            if module is not None:
                module.advance()

    def after_step(self) -> None:
        """Let the mechanisms follow that move once an optimizer step without a gradient."""
        for module in self._modules_in_order():
            module.after_step()

    def new_cache(
        self, rows: Rows, capacity: int, device: torch.device, dtype: torch.dtype, pages: int | None = None
    ) -> BlockCache:
        """An empty cache for `capacity` tokens in each of the rows; the rest as of `Backbone.new_cache`."""
        caches = {} if self.depth is None else {DEPTH: ChosenTokens()}
        for name in self.sublayers:
            make = partial(getattr(self, name).new_cache, len(rows.starts), capacity, dtype=dtype)
            if pages is not None and type(plain := make(device=torch.device("meta"))) is ContiguousCache:
                caches[name] = PagedCache.like(plain, pages, device)
            elif (cache := make(device=device)) is not None:
                caches[name] = cache
        for cache in caches.values() if self.depth is None else ():  # else places are not counted by the rows' tokens
            cache.rows = rows
        return caches

    def _modules_in_order(self) -> list[nn.Module]:
        return [getattr(self, name) for name in self.sublayers]

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

"""The backbone: token embeddings, position encodings and the one loop over the blocks.

`Backbone.run` is the only place that goes over the blocks: training, generation, early exit, calibration, distillation,
sensitivity and evaluation call it.

B batch, T new tokens, S visible tokens, D model width.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from models.attention.kernels.banded import Band
from models.attention.kernels.flex import block_masks
from models.attention.protocol import ForwardInputs, Mixed, count_documents, document_mask, summed
from models.attention.segments import document_starts
from models.block import Block
from models.cache import ModelCache, Rows
from models.config import SQRT_WIDTH, LayerConfig, ModelConfig
from models.cpu.short_attention import training_bias
from models.errors import UserError
from models.reversible import merge, run_reversible, split
from models.specs import AFTER, LayerContext

INPUT = ":input"  # a tap of what a module reads, behind its name


class Hidden(NamedTuple):
    """Result of a run over blocks.

    Attributes:
        x: (B, T, D) the residual stream behind the last of the blocks; of a reversible model (B, T, 2D).
        inputs: what the next blocks need to know about the tokens.
        losses: name -> training loss of the mechanisms, weighted and summed over the blocks; empty in evaluation.
        taps: name -> what was asked for.
    """

    x: Tensor
    inputs: ForwardInputs
    losses: dict[str, Tensor]
    taps: dict[str, Tensor]


class Backbone(nn.Module):
    """Embedding, positions and blocks of any `ModelConfig`; a model adds what is read from the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = config.input.build(config.width, config.vocab_size)
        self.segments = config.input.build_segments(config.width)
        self.embedding_norm = config.input.build_norm(config.width)
        self.embedding_scale = config.width**0.5 if config.embedding_scale == SQRT_WIDTH else config.embedding_scale
        self.positions = nn.ModuleList()
        self.shared = nn.ModuleList()
        self._position_index: dict[object, int] = {}
        self._shared_index: dict[object, int] = {}
        if config.position.acts == "input":
            self._position(config.position, heads=0, head_width=0)
        self.dropout = nn.Dropout(config.dropout)
        self.reversible = config.residual == "reversible"
        self.recompute: Callable[..., Mixed] | None = None  # runs a block in training (app/activation_checkpointing.py)
        places = [self._place(i, layer) for i, layer in enumerate(config.layers)]  # all positions before any block
        self.blocks = nn.ModuleList(
            Block(layer, config, place) for layer, place in zip(config.layers, places, strict=True)
        )
        self.norm = nn.Identity() if config.norm.position in AFTER else config.norm.build(config.width)

    def _place(self, number: int, layer: LayerConfig) -> LayerContext:
        positional, config = 0, self.config
        if layer.attention is not None and layer.attention.position_types:
            spec = layer.attention.position or config.position
            positional = self._position(spec, layer.attention.heads, layer.attention.head_width, number)
        bidirectional = config.direction == "bidirectional"
        branches = config.residual_branches()
        layers = sum(layer.attention is not None for layer in config.layers)
        shared = self._share(layer)
        return LayerContext(config.width, branches, positional, number, config.context, bidirectional, layers, shared)

    def _share(self, layer: LayerConfig) -> int:
        """Index of the weights that this layer has in common with those which name the same."""
        spec = None if layer.attention is None else layer.attention.shared(self.config.context)
        if spec is None:
            return 0
        if spec not in self._shared_index:
            self._shared_index[spec] = len(self.shared)
            self.shared.append(spec.build())
        return self._shared_index[spec]

    def _position(self, spec, heads: int, head_width: int, layer: int = 0) -> int:
        """Index of the module for this spec, shared by the layers that agree on it unless each has its own."""
        key = (spec, 0 if spec.acts == "input" else head_width, heads if spec.per_head else 0)
        key += (layer,) if spec.per_layer else ()
        if spec.acts == "input" and self.positions:
            return 0
        if key not in self._position_index:
            self._position_index[key] = len(self.positions)
            width, context, bidirectional = self.config.width, self.config.context, self.config.direction != "causal"
            built = spec.build(
                width=width, heads=heads, head_width=head_width, context=context, bidirectional=bidirectional
            )
            self.positions.append(built)
        return self._position_index[key]

    def run(
        self,
        x: Tensor,
        inputs: ForwardInputs,
        *,
        cache: ModelCache | None = None,
        blocks: slice = slice(None),
        taps: Collection[str] = (),
    ) -> Hidden:
        """Run blocks on the residual stream.

        Args:
            x: (B, T, D), as `embed` or an earlier run gave it; of a reversible model (B, T, 2D).
            inputs: that came with it.
            cache: keys and values of the tokens before these; the new ones are appended.
            blocks: which of them.
            taps: names of modules whose outputs are returned, such as `blocks.3` (B, T, D) or `blocks.3.attention.q`;
                `NAME:input` is what the module reads. Nothing else is kept.
        """
        numbers, found, losses = range(len(self.blocks))[blocks], {}, {}
        if self.reversible and torch.is_grad_enabled() and cache is None and not taps:
            x, losses = run_reversible(self.blocks[blocks], x, inputs)  # (B, T, 2D)
            return Hidden(x, inputs, losses, found)
        again = self.recompute is not None and self.training and torch.is_grad_enabled()
        run = self.recompute if again else _call
        streams = {f"blocks.{number}" for number in numbers}
        with self._watching(set(taps) - streams, found):
            for number in numbers:
                own = None if cache is None else cache.blocks[number]
                x, more, left = run(self.blocks[number], x, inputs, own)  # (B, T, D)
                if left:
                    inputs = inputs._replace(state={**inputs.state, **left})
                losses = summed(losses, more)
                if (name := f"blocks.{number}") in taps:
                    found[name] = self.stream(x)
        return Hidden(x, inputs, losses, found)

    @contextmanager
    def _watching(self, names: Collection[str], found: dict[str, Tensor]) -> Iterator[None]:
        """Put what the modules of these names give, or read, into `found`."""

        def watch(name: str):
            module = self.get_submodule(name.removesuffix(INPUT))
            if name.endswith(INPUT):
                return module.register_forward_pre_hook(lambda _, given: found.update({name: given[0]}))
            return module.register_forward_hook(lambda _, given, made: found.update({name: made}))

        handles = [watch(name) for name in names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def finish(self, x: Tensor) -> Tensor:
        """Final hidden states (..., D), which the head reads, of the last block's output (..., D)."""
        return self.norm(self.stream(x))

    def stream(self, x: Tensor) -> Tensor:
        """The residual stream (..., D) of a block's output: of a reversible one (..., 2D) the mean of its two."""
        return merge(x).to(self.norm.weight.dtype) if self.reversible else x

    def embed(
        self,
        tokens: Tensor,
        *,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        cache: ModelCache | None = None,
    ) -> tuple[Tensor, ForwardInputs]:
        """Embed tokens (B, T) as (B, T, D) and gather what every block needs to know about them.

        A reversible model's blocks pass (B, T, 2D) on; `stream` and `finish` make (B, T, D) of it.
        """
        for block in self.blocks if self.training else ():
            block.advance()
        new = tokens.shape[1]
        past = 0 if cache is None else cache.length
        if self.config.position.bounded and past + new > self.config.context:
            raise UserError(
                f"{past + new} tokens are more than this model's context of {self.config.context}, "
                f"and {self.config.position.kind} positions end there"
            )
        if positions is None:
            positions = self.default_positions(tokens, documents, cache)  # (B or 1, T)
        seen = documents
        if cache is not None:
            seen = cache.documents(new, documents)  # (B, S)
            cache.advance(positions, None if documents is None and cache.given is None else seen)
        x = self.embedding(tokens)  # (B, T, D)
        x = x if self.embedding_scale == 1 else x * self.embedding_scale
        context = self.context(x, positions, seen, past, cached=cache is not None)
        if context.positional and context.positional[0].added is not None:
            x = x + context.positional[0].added.to(x.dtype)
        if self.segments is not None:
            x = x + self.segments(tokens, documents)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        x = self.dropout(x)
        return (split(x) if self.reversible else x), context

    def context(
        self, x: Tensor, positions: Tensor, documents: Tensor | None, past: int, *, cached: bool
    ) -> ForwardInputs:
        """`ForwardInputs` for the last T of S tokens.

        Args:
            x: (B, T, D), embedded.
            positions: (B or 1, T) of the T tokens.
            documents: (B, S) of all tokens so far, or None when all are of one document.
            past: S - T.
            cached: whether keys and values are kept.
        """
        tables = tuple(position(positions) for position in self.positions)
        mask, causal, bias = None, False, None
        if any(layer.attention is not None and layer.attention.needs_mask for layer in self.config.layers):
            mask, causal = self._mask(x, documents, past)
            bias = None if cached else training_bias(x, mask, causal)
        if documents is not None:
            self._check_documents(documents)
        shared = tuple(weights() for weights in self.shared)
        masks = {} if cached else self._block_masks(x, documents)
        return ForwardInputs(tables, mask, causal, bias, documents, past, shared=shared, block_masks=masks)

    def _block_masks(self, x: Tensor, documents: Tensor | None) -> Mapping[Band | None, BlockMask]:
        """The patterns (models/attention/kernels/flex.py) of the layers that take kernel flex, for x (B, T, D)."""
        bands = [band for block in self.blocks if block.attention is not None for band in block.attention.flex_bands()]
        return block_masks(bands, self.config.direction == "causal", documents, x.shape[1], x.device)

    def _check_documents(self, documents: Tensor) -> None:
        """Refuse rows of more documents (B, S) than an attention of the model can keep apart."""
        limits = [layer.attention.max_documents for layer in self.config.layers if layer.attention is not None]
        most = min((limit for limit in limits if limit is not None), default=None)
        if most is not None and documents.device.type != "meta" and (found := count_documents(documents)) > most:
            raise UserError(
                f"a row holds {found} documents, and this model's attention keeps {most} apart: give it documents: "
                f"{found}, or the data cross_documents: true"
            )

    @staticmethod
    def default_positions(tokens: Tensor, documents: Tensor | None, cache: ModelCache | None) -> Tensor:
        """Positions (B or 1, T) of the next tokens (B, T): how far each is from the first of its document."""
        steps = torch.arange(tokens.shape[1], device=tokens.device)[None]  # (1, T)
        if cache is not None and cache.length:
            return cache.next_position + steps  # (B, T)
        documents = documents if cache is None else cache.documents(tokens.shape[1], documents)
        return steps - document_starts(documents, tokens.shape[1], tokens.device)

    def _mask(self, x: Tensor, documents: Tensor | None, past: int) -> tuple[Tensor | None, bool]:
        """The attention mask (B or 1, 1, T, S), or None with whether plain causality holds."""
        causal = self.config.direction == "causal"
        if documents is not None:
            return document_mask(documents[:, past:], documents, causal), False
        new = x.shape[1]
        if past == 0 or new == 1:
            return None, causal and past == 0
        row = torch.zeros(1, past + new, dtype=torch.int64, device=x.device)
        return document_mask(row[:, past:], row, causal), False

    def new_cache(
        self, batch: int, capacity: int, dtype: torch.dtype | None = None, *, pages: int | None = None
    ) -> ModelCache:
        """An empty cache for `capacity` tokens in each of `batch` rows; by default in the dtype of the weights.

        Args:
            batch: rows.
            capacity: tokens of a row.
            dtype: of keys and values.
            pages: tokens of a page, for layers that keep every key and value in pages (models/cache/paged.py); by
                default all their room is taken at once.

        Raises:
            UserError: the model is bidirectional: every new token would change all earlier ones; or an empty page.
        """
        if self.config.direction != "causal":
            raise UserError("a bidirectional model cannot generate: what it makes of a token depends on later ones")
        reference = next(self.parameters())
        dtype, device = dtype or reference.dtype, reference.device
        rows = Rows(batch)
        blocks = [block.new_cache(rows, capacity, device, dtype, pages) for block in self.blocks]
        return ModelCache(blocks, rows, capacity, device)

    def after_step(self) -> None:
        """Let the mechanisms follow that move once an optimizer step without a gradient (loss-free balancing)."""
        for block in self.blocks:
            block.after_step()


def _call(block: Block, *arguments: Any) -> Mixed:
    return block(*arguments)

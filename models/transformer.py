"""The Transformer: embeddings -> blocks -> norm -> head, single-device pure PyTorch.

B batch, T new tokens, S visible tokens, D model width, V vocabulary.
"""

import re
from collections.abc import Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from models.attention import Context, Place
from models.attention.blocks import Band
from models.attention.documents import document_starts
from models.attention.flex import block_masks
from models.attention.protocol import count_documents, document_mask
from models.attention.standard import training_bias
from models.block import Block
from models.cache import ContiguousCache, ModelCache, PagedCache
from models.config import SQRT_WIDTH, LayerConfig, ModelConfig
from models.errors import UserError
from models.exits import ExitNorms
from models.linear import Embedding, Linear, itemsize
from models.losses import IGNORED, SoftmaxError, linear_cross_entropy
from models.memory import check_memory
from models.norms import AFTER
from models.reversible import merge, run_reversible, split


class Output(NamedTuple):
    """What a forward gives.

    Attributes:
        logits: (B, T, V), or None when targets were given.
        loss: mean negative log-likelihood of the targets in nats, or None without targets.
        z_loss: mean squared log-partition, unweighted, or None when it was not asked for.
        states: block index -> that block's output (B, T, D), for the blocks asked for.
        auxiliary: name -> training losses of the mechanisms, weighted and summed over the layers; empty in evaluation.
    """

    logits: Tensor | None
    loss: Tensor | None
    z_loss: Tensor | None
    states: dict[int, Tensor]
    auxiliary: dict[str, Tensor]


class Transformer(nn.Module):
    """A language model or an encoder of any `ModelConfig`; also builds under `torch.device("meta")`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if torch.get_default_device().type != "meta":
            check_memory(outline(config).state_dict().values())
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width, std=0.02)
        self.embedding_scale = config.width**0.5 if config.embedding_scale == SQRT_WIDTH else config.embedding_scale
        self.positions = nn.ModuleList()
        self.shared = nn.ModuleList()
        self._position_index: dict[object, int] = {}
        self._shared_index: dict[object, int] = {}
        if config.position.acts == "input":
            self._position(config.position, heads=0, head_width=0)
        self.dropout = nn.Dropout(config.dropout)
        self.reversible = config.residual == "reversible"
        places = [self._place(i, layer) for i, layer in enumerate(config.layers)]  # all positions before any block
        self.blocks = nn.ModuleList(
            Block(layer, config, place) for layer, place in zip(config.layers, places, strict=True)
        )
        self.norm = nn.Identity() if config.norm.position in AFTER else config.norm.build(config.width)
        self.exits = None if config.exits is None else ExitNorms(config)
        self.compiled_softmax_error: SoftmaxError | None = None
        self.head = None
        if config.head == "untied":
            self.head = Linear(config.width, config.vocab_size, bias=False, std=0.02)

    def _place(self, number: int, layer: LayerConfig) -> Place:
        positional, config = 0, self.config
        if layer.attention is not None and layer.attention.takes:
            spec = layer.attention.position or config.position
            positional = self._position(spec, layer.attention.heads, layer.attention.head_width, number)
        bidirectional = config.direction == "bidirectional"
        branches = config.residual_branches()
        layers = sum(layer.attention is not None for layer in config.layers)
        shared = self._share(layer)
        return Place(config.width, branches, positional, number, config.context, bidirectional, layers, shared)

    def _share(self, layer: LayerConfig) -> int:
        """Index of the weights that this layer has in common with those which name the same."""
        spec = layer.attention.shared(self.config.context) if hasattr(layer.attention, "shared") else None
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

    def forward(
        self,
        tokens: Tensor,
        *,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        cache: ModelCache | None = None,
        keep: Collection[int] = (),
        z_loss: bool = False,
    ) -> Output:
        """Run the model.

        Args:
            tokens: (B, T) int64.
            targets: (B, T) int64, -100 where there is none; then the loss is returned in place of the logits.
            documents: (B, T) number of each token's document: attention never crosses a change; -1 is padding. With a
                cache, they begin with its first tokens, or a UserError is raised.
            positions: (B or 1, T) int64; by default the index of the token in its document.
            cache: keys and values of the tokens before these; the new ones are appended.
            keep: blocks whose outputs are returned.
            z_loss: whether to compute the z-loss (arXiv 2204.02311) beside the loss.
        """
        x, context = self.embed(tokens, documents=documents, positions=positions, cache=cache)
        teaches = self.exits is not None and targets is not None and self.training
        states, taught = {}, self.exits.blocks if teaches else ()
        if self.reversible and torch.is_grad_enabled() and cache is None and not keep:
            x, auxiliary = run_reversible(self.blocks, x, context)  # (B, T, 2D)
        else:
            for i, block in enumerate(self.blocks):
                x = block(x, context) if cache is None else block(x, context, cache.layers[i])  # (B, T, D)
                if i in keep or i in taught:
                    states[i] = self.stream(x)
            auxiliary = self.take_losses()
        hidden = self.finish(x)  # (B, T, D)
        if targets is None:
            return Output(self.project(hidden), None, None, states, auxiliary)
        loss, z_term = self.loss(hidden, targets, z_loss=z_loss)
        if teaches:
            auxiliary["exits"] = self.exits.loss(self, states, targets)
            states = {i: x for i, x in states.items() if i in keep}
        return Output(None, loss, z_term, states, auxiliary)

    def finish(self, x: Tensor) -> Tensor:
        """What the head reads, (..., D), of the last block's output (..., D)."""
        return self.norm(self.stream(x))

    def stream(self, x: Tensor) -> Tensor:
        """The residual stream (..., D) of a block's output: of a reversible one (..., 2D) the mean of its two."""
        return merge(x).to(self.norm.weight.dtype) if self.reversible else x

    def take_losses(self) -> dict[str, Tensor]:
        """The training losses that the blocks have left since they were last taken, summed by name."""
        found: dict[str, Tensor] = {}
        for block in self.blocks:
            for name, value in block.take_losses().items():
                found[name] = found[name] + value if name in found else value
        return found

    def embed(
        self,
        tokens: Tensor,
        *,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        cache: ModelCache | None = None,
    ) -> tuple[Tensor, Context]:
        """Embed tokens (B, T) as (B, T, D) and gather what every block needs to know about them.

        A reversible model's blocks pass (B, T, 2D) on; `stream` and `finish` make (B, T, D) of it.
        """
        for block in self.blocks if self.training else ():
            for part in (block.depth, block.feedforward):
                if hasattr(part, "advance"):
                    part.advance()
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
            if past and cache.documents is None and documents is not None:
                raise UserError(
                    f"documents are given behind {past} cached tokens without any: give them from the first token on"
                )
            if past and cache.documents is not None:
                latest = cache.documents[:, -1:].expand(-1, new)  # (B, T)
                documents = latest if documents is None else documents
                seen = torch.cat([cache.documents, documents], dim=1)  # (B, S)
            cache.advance(positions, seen)
        x = self.embedding(tokens)  # (B, T, D)
        x = x if self.embedding_scale == 1 else x * self.embedding_scale
        context = self.context(x, positions, seen, past, cached=cache is not None)
        if context.positional and context.positional[0].added is not None:
            x = x + context.positional[0].added.to(x.dtype)
        x = self.dropout(x)
        return (split(x) if self.reversible else x), context

    def context(self, x: Tensor, positions: Tensor, documents: Tensor | None, past: int, *, cached: bool) -> Context:
        """What every block needs to know about the last T of S tokens.

        Args:
            x: (B, T, D), embedded.
            positions: (B or 1, T) of the T tokens.
            documents: (B, S) of all tokens so far, or None when all are of one document.
            past: S - T.
            cached: whether keys and values are kept.
        """
        tables = tuple(position(positions) for position in self.positions)
        mask, causal, bias = None, False, None
        if any(layer.attention is not None and layer.attention.sees_all for layer in self.config.layers):
            mask, causal = self._mask(x, documents, past)
            bias = None if cached else training_bias(x, mask, causal)
        leaves_notes = any(getattr(layer.attention, "leaves_notes", False) for layer in self.config.layers)
        if documents is not None:
            self._check_documents(documents)
        shared = tuple(weights() for weights in self.shared)
        masks = {} if cached else self._block_masks(x, documents)
        return Context(tables, mask, causal, bias, documents, past, {} if leaves_notes else None, shared, masks)

    def _block_masks(self, x: Tensor, documents: Tensor | None) -> dict[Band | None, BlockMask]:
        """The patterns (models/attention/flex.py) of the layers that take kernel flex, for x (B, T, D)."""
        layers = [block.attention for block in self.blocks if getattr(block.attention, "kernel", None) == "flex"]
        bands = [getattr(attention, "band", None) for attention in layers]
        return block_masks(bands, self.config.direction == "causal", documents, x.shape[1], x.device)

    def _check_documents(self, documents: Tensor) -> None:
        """Refuse rows of more documents (B, S) than an attention of the model can keep apart."""
        limits = [getattr(layer.attention, "most_documents", None) for layer in self.config.layers]
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

    def project(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D) that have passed the final norm."""
        return self.embedding.project(hidden) if self.head is None else self.head(hidden)

    def loss(self, hidden: Tensor, targets: Tensor, *, z_loss: bool = False) -> tuple[Tensor, Tensor | None]:
        """Mean NLL in nats of targets (B, T) given hidden (B, T, D), and the mean z-term when asked for."""
        output = self.embedding if self.head is None else self.head
        if isinstance(output, nn.Linear | nn.Embedding):
            flat = hidden.flatten(0, 1), output.weight, targets.flatten()
            return linear_cross_entropy(*flat, z_loss=z_loss, compiled=self.compiled_softmax_error)
        logits = self.project(hidden).flatten(0, 1).float()  # (B * T, V)
        nll = F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED)
        if not z_loss:
            return nll, None
        return nll, logits[targets.flatten() != IGNORED].logsumexp(-1).square().mean()

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
        layers = []
        for block in self.blocks:
            plain = None if pages is None else block.new_cache(batch, capacity, torch.device("meta"), dtype)
            if type(plain) is ContiguousCache:
                layers.append(PagedCache.like(plain, pages, device))
            else:
                layers.append(block.new_cache(batch, capacity, device, dtype))
        return ModelCache(layers, batch, capacity, device)

    def count_parameters(self) -> dict[str, int]:
        """Weights of the dense architecture: `total`, those `active` for one token, and those of the `embedding`.

        Of experts those are active that a token chooses (models/experts); a layer that a token passes by
        (models/depth.py) counts as if it took part.
        """
        with torch.device("meta"):
            dense = Transformer(self.config) if self.config.compression else self
            total = sum(parameter.numel() for parameter in dense.parameters())
        idle = 0
        for layer, block in zip(self.config.layers, dense.blocks, strict=True):
            if hasattr(layer.feedforward, "active_parameters"):
                own = sum(parameter.numel() for parameter in block.feedforward.parameters())
                idle += own - layer.feedforward.active_parameters(self.config.width)
        return {"total": total, "active": total - idle, "embedding": self.config.vocab_size * self.config.width}

    def flops_per_token(self, length: int) -> int:
        """FLOPs of the forward for one token that sees `length` tokens (PaLM's count, arXiv 2204.02311, app. B)."""
        flops = 2 * self.config.width * self.config.vocab_size
        for layer in self.config.layers:
            if layer.attention is not None:
                seen = round(layer.share * length)
                flops += layer.share * layer.attention.flops_per_token(self.config.width, seen)
                flops += layer.share * self._position_flops(layer.attention, seen)
            if layer.feedforward is not None:
                flops += layer.share * layer.feedforward.flops_per_token(self.config.width)
            if layer.depth is not None:
                flops += layer.depth.flops_per_token(self.config.width)
        return round(flops)

    def _position_flops(self, attention, length: int) -> int:
        """FLOPs of what a position encoding adds to the scores of one token that sees `length` tokens."""
        if not attention.takes:
            return 0
        spec = attention.position or self.config.position
        return spec.flops_per_token(self.config.width, attention.heads, attention.head_width, length)

    def training_flops_per_token(self, length: int) -> int:
        """FLOPs of forward and backward for one token, early exits included; recomputation is not counted."""
        heads = 0 if self.config.exits is None else len(self.config.exits.layers)
        return 3 * (self.flops_per_token(length) + heads * 2 * self.config.width * self.config.vocab_size)

    def cache_bytes(self, tokens: int, dtype: torch.dtype | None = None) -> int:
        """Bytes that the cache of a sequence of so many tokens holds, over all layers."""
        attentions = [layer.attention for layer in self.config.layers if layer.attention is not None]
        singles = sum(a.cache_singles(tokens) for a in attentions if hasattr(a, "cache_singles"))
        return itemsize(dtype) * sum(a.cache_elements(tokens) for a in attentions) + singles * itemsize(torch.float32)


def outline(config: ModelConfig) -> Transformer:
    """The model on the meta device: shapes without memory. Raises UserError for sizes that overflow."""
    try:
        with torch.device("meta"):
            return Transformer(config)
    except (RuntimeError, TypeError) as error:  # torch says that a size, or the bytes of a tensor, are no 64-bit number
        if not re.search("overflow|unpack", str(error)):
            raise
        raise UserError("a model of these sizes takes more bytes than 64 bits can count; make it smaller") from None

"""The Transformer: a backbone and the head that its config names, single-device pure PyTorch.

B batch, T new tokens, D model width, V vocabulary.
"""

import re
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.backbone import Backbone, Hidden
from models.cache import ModelCache
from models.config import ModelConfig
from models.early_exit import ExitNorms
from models.errors import UserError
from models.linear import itemsize
from models.memory import check_memory
from models.projection import SoftmaxError, linear_cross_entropy, projected_cross_entropy


class Output(NamedTuple):
    """Output of a forward.

    Attributes:
        logits: (B, T, V), or None when targets were given.
        loss: mean negative log-likelihood of the targets in nats, or None without targets.
        z_loss: mean squared log-partition, unweighted, or None when it was not asked for.
        taps: name -> what was asked for (`Backbone.run`).
        losses: name -> training losses of the mechanisms, weighted and summed over the layers; empty in evaluation.
    """

    logits: Tensor | None
    loss: Tensor | None
    z_loss: Tensor | None
    taps: dict[str, Tensor]
    losses: dict[str, Tensor]


class Transformer(Backbone):
    """A language model or an encoder of any `ModelConfig`; also builds under `torch.device("meta")`."""

    def __init__(self, config: ModelConfig) -> None:
        if torch.get_default_device().type != "meta":
            check_memory(outline(config).state_dict().values())
        super().__init__(config)
        self.exits = None if config.exits is None else ExitNorms(config.exits, config.norm, config.width)
        self.compiled_softmax_error: SoftmaxError | None = None
        self.head_transform = None if config.head.transform is None else config.head.transform.build(config.width)
        self.head = config.head.build(config.width, config.vocab_size)
        self.head_bias = config.head.build_bias(config.vocab_size)

    def forward(
        self,
        tokens: Tensor,
        *,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        cache: ModelCache | None = None,
        taps: Collection[str] = (),
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
            taps: what else is returned, see `Backbone.run`.
            z_loss: whether to compute the z-loss (arXiv 2204.02311) beside the loss.
        """
        x, inputs = self.embed(tokens, documents=documents, positions=positions, cache=cache)
        teaches = self.exits is not None and targets is not None and self.training
        run = self.run(x, inputs, cache=cache, taps={*taps, *(self.exits.taps if teaches else ())})
        hidden = self.read(run.x, documents)  # (B, T, D)
        if targets is None:
            return Output(self.project(hidden), None, None, run.taps, run.losses)
        loss, z_term = self.loss(hidden, targets, z_loss=z_loss)
        losses, found = run.losses, run.taps
        if teaches:
            losses = {
                **losses,
                "exits": self.exits.loss(found, lambda stream: self._exit_loss(stream, targets, documents)),
            }
            found = {name: tap for name, tap in found.items() if name in taps}
        return Output(None, loss, z_term, found, losses)

    def _exit_loss(self, stream: Tensor, targets: Tensor, documents: Tensor | None) -> Tensor:
        """Mean NLL of targets (B, T) given what an exit makes of a block's output (B, T, D)."""
        return self.loss(self.transform(self.config.head.read(stream, documents)), targets)[0]

    def read(self, x: Tensor, documents: Tensor | None = None) -> Tensor:
        """What the head projects (B, T, D), of the last block's output (B, T, D)."""
        return self.transform(self.config.head.read(self.finish(x), documents))

    def transform(self, hidden: Tensor) -> Tensor:
        """The transform of the head, where it has one: (..., D) -> (..., D)."""
        return hidden if self.head_transform is None else self.head_transform(hidden)

    def hidden(self, tokens: Tensor, *, documents: Tensor | None = None, taps: Collection[str] = ()) -> Hidden:
        """`embed`, `run` and `read`: `x` (B, T, D) is what the head projects."""
        hidden = self.run(*self.embed(tokens, documents=documents), taps=taps)
        return hidden._replace(x=self.read(hidden.x, documents))

    @property
    def output_matrix(self) -> Tensor | None:
        """The output projection (V, D); None: it is no plain matrix, but packed or with a bias."""
        output = self.embedding if self.head is None else self.head
        biased = self.head_bias is not None or (isinstance(output, nn.Linear) and output.bias is not None)
        return output.weight if isinstance(output, nn.Embedding | nn.Linear) and not biased else None

    def project(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of what the head reads (..., D)."""
        logits = self.embedding.project(hidden) if self.head is None else self.head(hidden)
        return logits if self.head_bias is None else self.head_bias(logits)

    def loss(self, hidden: Tensor, targets: Tensor, *, z_loss: bool = False) -> tuple[Tensor, Tensor | None]:
        """Mean NLL in nats of targets (B, T) given hidden (B, T, D), and the mean z-term when asked for."""
        matrix, flat, wanted = self.output_matrix, hidden.flatten(0, 1), targets.flatten()
        if matrix is not None:
            return linear_cross_entropy(flat, matrix, wanted, z_loss=z_loss, compiled=self.compiled_softmax_error)
        return projected_cross_entropy(self.project, flat, wanted, self.config.outputs, z_loss=z_loss)

    def count_parameters(self) -> dict[str, int]:
        """Weights of the dense architecture: `total`, those `active` for one token, and those of the `embedding`.

        Of experts those are active that a token chooses (models/experts); a layer that a token passes by
        (models/mixture_of_depths.py) counts as if it took part.
        """
        dense = outline(self.config) if self.config.compression else self
        total = sum(parameter.numel() for parameter in dense.parameters())
        feedforwards = [layer.feedforward for layer in self.config.layers if layer.feedforward is not None]
        idle = sum(feedforward.idle_parameters(self.config.width) for feedforward in feedforwards)
        return {"total": total, "active": total - idle, "embedding": self.config.vocab_size * self.config.width}

    def flops_per_token(self, length: int) -> int:
        """FLOPs of the forward for one token that sees `length` tokens (PaLM's count, arXiv 2204.02311, app. B)."""
        flops = self.config.head.flops_per_token(self.config.width, self.config.vocab_size)
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
        if not attention.position_types:
            return 0
        spec = attention.position or self.config.position
        return spec.flops_per_token(self.config.width, attention.heads, attention.head_width, length)

    def training_flops_per_token(self, length: int) -> int:
        """FLOPs of forward and backward for one token, early exits included; recomputation is not counted."""
        heads = 0 if self.config.exits is None else len(self.config.exits.layers)
        return 3 * (self.flops_per_token(length) + heads * 2 * self.config.width * self.config.outputs)

    def cache_bytes(self, tokens: int, dtype: torch.dtype | None = None) -> int:
        """Bytes that the cache of a sequence of so many tokens holds, over all layers."""
        attentions = [layer.attention for layer in self.config.layers if layer.attention is not None]
        singles = sum(a.cache_singles(tokens) for a in attentions)
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

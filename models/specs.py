"""Base classes of what a config names: one spec a mechanism, with a default for every ability that it need not have.

A spec is a frozen dataclass of the few numbers of one mechanism. It inherits from the base class of its axis, registers
itself there by name, and `build` makes the module. `models/catalog.py` imports every mechanism of the package.
"""

from typing import Any, ClassVar, NamedTuple, Self

from torch import Tensor, nn

from models.errors import UserError, did_you_mean
from models.registry import Registry

ATTENTIONS = Registry("attention", example="{kind: full, heads: 4}")
FEEDFORWARDS = Registry("feedforward", example="{kind: swiglu, width: 688}")
POSITIONS = Registry("position")
NORMS = Registry("norm")
DEPTHS = Registry("depth")
INPUTS = Registry("input")
HEADS = Registry("head")

NORM_POSITIONS = ("pre", "post", "sandwich", "deepnorm")
AFTER = ("post", "deepnorm")  # the positions that normalise the stream itself, behind each sub-layer


class LayerContext(NamedTuple):
    """Layer context: the place in a model where a mechanism is built.

    Attributes:
        width: D.
        branches: sub-layers of the model that write into the residual stream.
        positional: which of `ForwardInputs.positional` is this layer's.
        layer: number of the layer, from 0.
        context: tokens of the longest training sequence.
        bidirectional: whether a token also sees those behind it.
        layers: of the model that have an attention.
        shared: which of `ForwardInputs.shared` is this layer's.
    """

    width: int
    branches: int = 2
    positional: int = 0
    layer: int = 0
    context: int = 1024
    bidirectional: bool = False
    layers: int = 1
    shared: int = 0


class SubLayerSpec:
    """A sub-layer of a block in a config.

    Attributes:
        written: names of the linear layers that norm position `deepnorm` draws smaller; None: all of them.
    """

    kind: ClassVar[str]
    written: ClassVar[tuple[str, ...] | None] = None

    def build_at(self, place: "LayerContext", alike: int) -> nn.Module:
        """The module, a `SubLayer`; `alike`: how many sub-layers of its kind the model has."""
        raise NotImplementedError


class AttentionSpec(SubLayerSpec):
    """An attention in a config.

    Attributes:
        needs_mask: whether it needs the mask of all pairs (`ForwardInputs.mask`).
        directions: of `causal` and `bidirectional`, what it can be; where it is one, `directions_because` says why.
        position_types: how the position encodings act that it works with (models/positions/__init__.py), beside those
            that act on the embeddings or not at all; empty: it ignores them. `position_types_because` says what narrows
            them.
        heads_prunable: whether any of its heads can be taken away; where not, `heads_because` says why.
        carries: whether a layer hands what it found about the tokens to those above, beside the residual stream.
        max_documents: how many documents a row may hold; None: any number.
        heads, head_width: those that its position encoding gets.
        position: its own position encoding; None: the model's.
    """

    written = ("v", "o")
    needs_mask: bool = False
    directions: tuple[str, ...] = ("causal", "bidirectional")
    directions_because: str = ""
    position_types: tuple[str, ...] = ()
    position_types_because: str = ""
    heads_prunable: bool = False
    heads_because: str = ""
    max_documents: int | None = None
    position: Any = None
    heads: int
    head_width: int

    @property
    def carries(self) -> bool:
        return False

    def resolve(self, width: int, layer: int = 0) -> Self:
        """The same with everything spelled out that follows from the model's width and the number of the layer."""
        return self

    def check(self, direction: str) -> None:
        """Raise UserError where its numbers are none of that direction."""

    def shared(self, context: int) -> Any:
        """A spec of weights that all layers which name the same one have in common, or None."""
        return None

    def build(self, place: LayerContext) -> nn.Module:
        """The module, an `Attention`."""
        raise NotImplementedError

    def build_at(self, place: LayerContext, alike: int) -> nn.Module:
        return self.build(place)

    def flops_per_token(self, width: int, length: int) -> int:
        """Forward FLOPs of one token that sees `length` tokens."""
        raise NotImplementedError

    def cache_elements(self, tokens: int) -> int:
        """Numbers that the cache holds for a sequence of so many tokens."""
        raise NotImplementedError

    def cache_singles(self, tokens: int) -> int:
        """Numbers that the cache holds in fp32 whatever the dtype, beside `cache_elements`."""
        return 0


class FeedForwardSpec(SubLayerSpec):
    """A feed-forward in a config."""

    def check(self, direction: str, context: int) -> None:
        """Raise UserError where it cannot be in a model of that direction and so many tokens."""

    def build(self, width: int, branches: int, *, layer: int = 0, layers: int = 1) -> nn.Module:
        """The module, a `FeedForward`.

        Args:
            width: D.
            branches: sub-layers of the model that write into the residual stream.
            layer: number of the layer.
            layers: of the model that have a feed-forward of this kind.
        """
        raise NotImplementedError

    def build_at(self, place: LayerContext, alike: int) -> nn.Module:
        return self.build(place.width, place.branches, layer=place.layer, layers=alike)

    def flops_per_token(self, width: int) -> int:
        """Forward FLOPs of one token."""
        raise NotImplementedError

    def idle_parameters(self, width: int) -> int:
        """Parameters that one token does not pass."""
        return 0


class PositionSpec:
    """A position encoding in a config.

    Attributes:
        acts: where it acts (models/positions/__init__.py).
        per_head: whether each query head has numbers of its own.
        per_layer: whether each layer has a module of its own.
        bounded: whether positions end at the context length.
    """

    kind: ClassVar[str]
    acts: ClassVar[str]
    per_head = False
    per_layer = False
    bounded = False

    def check(self, *, width: int, head_width: int, bidirectional: bool) -> None:
        """Raise UserError for a model width, a head width (0 on the embeddings) or a direction that will not do."""

    def flops_per_token(self, width: int, heads: int, head_width: int, length: int) -> int:
        """Forward FLOPs of the products with one query that sees `length` tokens, in one layer."""
        return 0


class NormSpec:
    """A normalisation in a config: what is computed, and at which of `NORM_POSITIONS` of a block it stands."""

    kind: ClassVar[str]
    eps: float
    position: str

    def __post_init__(self) -> None:
        if self.position not in NORM_POSITIONS:
            raise UserError(f"unknown norm position {self.position!r}{did_you_mean(self.position, NORM_POSITIONS)}")
        if self.eps <= 0:
            raise UserError(f"eps must be positive, got {self.eps}")

    def build(self, width: int) -> nn.Module:
        raise NotImplementedError


class InputSpec:
    """What becomes the residual stream, in a config."""

    kind: ClassVar[str]

    def check(self, direction: str, vocab_size: int) -> None:
        """Raise UserError where it cannot be in a model of that direction and vocabulary."""

    def build(self, width: int, vocab_size: int) -> nn.Module:
        """The module `embedding` of the model, from a batch of inputs (B, T, ...) to (B, T, D)."""
        raise NotImplementedError

    def build_segments(self, width: int) -> nn.Module | None:
        """The module `segments`, from inputs and documents (B, T) to what is added to the embeddings; default: none."""
        return None

    def build_norm(self, width: int) -> nn.Module | None:
        """The module `embedding_norm`, of the embeddings after all that is added to them; default: none."""
        return None


class HeadSpec:
    """What is read from the residual stream, in a config.

    Attributes:
        tied: whether the model's embedding is its head, and it has no other.
        transform: what the hidden states pass before the output projection (models/heads/transform.py), or None.
    """

    kind: ClassVar[str]
    tied: ClassVar[bool] = False
    transform: Any = None

    def build(self, width: int, vocab_size: int) -> nn.Module | None:
        """The module `head` of the model, from what is read (..., D) to the outputs; None where it is tied."""
        raise NotImplementedError

    def build_bias(self, vocab_size: int) -> nn.Module | None:
        """The module `head_bias`, which adds to the logits of a tied head; default: none."""
        return None

    def read(self, hidden: Tensor, documents: Tensor | None) -> Tensor:
        """What a prediction at each token is made from, of the last hidden states: (B, T, D) -> (B, T, D).

        Default: the token's own. A pooled head reads the same of every token of a document.

        documents: (B or 1, T), -1 for padding; None: all tokens of a row are of one.
        """
        return hidden

    def outputs(self, vocab_size: int) -> int:
        """Logits of one prediction."""
        return vocab_size

    def flops_per_token(self, width: int, vocab_size: int) -> int:
        """Forward FLOPs of one token."""
        return 2 * width * (self.outputs(vocab_size) + (0 if self.transform is None else width))


class DepthSpec:
    """Base spec of mixture of depths: the tokens that take part in a layer.

    Attributes:
        capacity: share of the tokens that take part, on average.
        data_dependent: whether shapes inside the layer are known only at run time; torch.compile gets what is inside.
    """

    kind: ClassVar[str]
    capacity: float
    data_dependent = False

    def check(self, layer: Any, position: Any) -> None:
        """Raise UserError where a `LayerConfig` cannot run on a part of the tokens; `position` is its attention's."""

    def build(self, place: LayerContext, attends: bool) -> nn.Module:
        """The module that chooses; `attends`: whether the layer has an attention."""
        raise NotImplementedError

    def flops_per_token(self, width: int) -> int:
        """Forward FLOPs of the choice."""
        raise NotImplementedError

"""Recursive chunking: softmax attention over the own chunk and, ever coarser, over summaries of everything before.

B batch, X new nodes of a level, m summaries of a node, D width.

A chunk of tokens becomes m summaries; as many summaries as a chunk has tokens become m again, and so on up, as in
recursive summarisation (arXiv 2109.10862). That a token sees near tokens one by one and far ones pooled, in O(log T)
levels, is H-Transformer-1D's hierarchy (arXiv 2107.11906, section 4), here with other poolings, in one softmax, and so
that a decoder sees only what is complete (models/attention/multilevel.py).
"""

from dataclasses import dataclass

from torch import Tensor, nn

from models.attention.multilevel import Level, Nodes, Tree
from models.attention.summary_attention import Summarising, SummaryAttention
from models.cache import Entries
from models.errors import UserError
from models.linear import Embedding
from models.positions import Positional
from models.specs import ATTENTIONS, LayerContext


@ATTENTIONS.register("recursive")
@dataclass(frozen=True, kw_only=True)
class Recursive(Summarising):
    """Attention over the own chunk and a hierarchy of summaries; all other options are those of `full`.

    Chunks begin with every document. A token of T sees at most chunk tokens and, of each of log(T / chunk) / log(chunk
    / m) levels, chunk - m summaries; a cache keeps as many. Only the last of a given number of levels grows with T.

    Args:
        chunk: tokens of a chunk, and summaries of a group.
        pooling: what makes summaries, those of all levels: `mean`, `query` (any number of them), `han`.
        input_width: as in `Summarising`.
        levels: of summaries; those of the last one all stay in sight. Nothing: as many as a sequence fills.
        level_embedding: whether the summaries of each level get a learned vector before the key and value maps.
    """

    position_types = ("rotation",)

    chunk: int
    levels: int | None = None
    level_embedding: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk < 2:
            raise UserError(f"chunk must be at least 2 tokens, got {self.chunk}")
        if self.levels is not None and self.levels < 1:
            raise UserError(f"levels must be at least 1, got {self.levels}")
        if self.chunk % self.pooling.summaries or self.chunk == self.pooling.summaries:
            raise UserError(
                f"chunk must be a multiple of the summaries that a chunk becomes, and more than these, "
                f"got {self.chunk} and {self.pooling.summaries}"
            )

    @property
    def tree(self) -> Tree:
        return Tree(self.chunk, self.pooling.summaries, self.levels)

    def build(self, place: LayerContext) -> nn.Module:
        return RecursiveAttention(self, place)


class RecursiveAttention(SummaryAttention):
    """The module of `Recursive`."""

    def __init__(self, spec: Recursive, place: LayerContext) -> None:
        super().__init__(spec, place)
        self.level_embedding = None
        if spec.level_embedding:
            filled = len(self.tree.levels(place.context)) - 1
            self.level_embedding = Embedding(max(1, filled), place.width, std=0.02)

    def relate(
        self, vectors: Tensor, number: int, level: Level, nodes: Nodes, positional: Positional, kept: Entries | None
    ) -> tuple[Tensor, Tensor]:
        inner = vectors.flatten(2)  # (B, X, m * D)
        inner = inner if level.fanout is not None else inner[..., :0]  # nothing is made of the last level
        if self.level_embedding is None:
            return inner, vectors
        known = min(number, self.level_embedding.num_embeddings) - 1  # beyond the context the last one serves
        return inner, vectors + self.level_embedding.weight[known]

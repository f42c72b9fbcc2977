"""Classification head: logits of classes from one vector for each document, pooled from its tokens.

B batch, T tokens, D model width, C classes.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from models.attention.segments import document_ends, document_starts
from models.errors import UserError
from models.heads.transform import HeadTransform
from models.linear import Linear
from models.registry import Single
from models.specs import HEADS, HeadSpec


@HEADS.register("classifier")
@dataclass(frozen=True)
class Classifier(HeadSpec):
    """Sequence classification: a linear layer on the pooled hidden states of a document.

    Args:
        classes: C, at least 2.
        pool: the `mean` of the document's tokens (Sentence-BERT, arXiv 1908.10084), its `first` (BERT, arXiv
            1810.04805), or its `last` (GPT, Radford et al. 2018), the only one of a decoder that has seen all of it.
        transform: a layer between pooling and classes (models/heads/transform.py), or nothing. BERT's pooler is
            `{activation: tanh}` behind pool `first`.
    """

    classes: int
    pool: Literal["mean", "first", "last"] = "mean"
    transform: Any = field(default=None, metadata={"registry": Single(HeadTransform)})

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise UserError(f"classes is {self.classes}; a classifier needs at least 2")

    def build(self, width: int, vocab_size: int) -> nn.Module:
        return Linear(width, self.classes, bias=True, std=0.02)

    def read(self, hidden: Tensor, documents: Tensor | None) -> Tensor:
        """The pooled vector of each token's document: (B, T, D) -> (B, T, D)."""
        tokens, device = hidden.shape[1], hidden.device
        begins = document_starts(documents, tokens, device).expand(hidden.shape[:2])  # (B, T)
        if self.pool == "mean":
            same = (begins[:, :, None] == begins[:, None, :]).to(hidden.dtype)  # (B, T, T)
            return (same / same.sum(-1, keepdim=True)) @ hidden
        ends = document_ends(documents, tokens, device).expand(hidden.shape[:2]) - 1  # (B, T)
        place = begins if self.pool == "first" else ends
        return hidden.gather(1, place[..., None].expand_as(hidden))

    def outputs(self, vocab_size: int) -> int:
        return self.classes

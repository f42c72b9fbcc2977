"""Rows of an evaluation: sums over the predicted tokens of each (block, document) pair, the clusters of the intervals.

B rows in a batch, T tokens in a block, S segments.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from app.evaluation.intervals import Interval, cluster_mean
from models.projection import IGNORED

FEWEST_DOCUMENTS = 20  # with fewer documents than this, blocks are the clusters


@dataclass(frozen=True)
class Segments:
    """The (block, document) pairs that hold a predicted token, S of them: the smallest unit kept in memory."""

    block: np.ndarray  # (S,) int64
    document: np.ndarray  # (S,) int64; -1 where the split does not keep documents apart
    tokens: np.ndarray  # (S,) int64

    @property
    def by_document(self) -> bool:
        """Whether documents, rather than blocks, are the clusters of the intervals."""
        return bool((self.document >= 0).all()) and len(np.unique(self.document)) >= FEWEST_DOCUMENTS

    def clusters(self) -> np.ndarray:
        """Cluster number of each segment, (S,)."""
        return np.unique(self.document if self.by_document else self.block, return_inverse=True)[1]

    def mean(self, sums: np.ndarray) -> Interval:
        """Mean per token of a quantity whose sums over the segments are `sums` (S,), with its interval."""
        cluster = self.clusters()
        return cluster_mean(np.bincount(cluster, sums), np.bincount(cluster, self.tokens))

    def describe(self) -> str:
        """Method of the intervals, in words."""
        unit = "document" if self.by_document else "block"
        count = len(np.unique(self.clusters()))
        return f"95% t interval, linearised ratio estimator, {count} {unit}s as clusters"


@dataclass(frozen=True)
class Rows:
    """Ledger of one model on a split: sums over its segments.

    Attributes:
        sums: quantity of a metric -> (S,) float64; `nll`, the negative log-likelihood in nats, is always there.
        bytes_per_token: UTF-8 bytes of text behind a predicted token; None where a prediction stands for no text of
            its own.
    """

    segments: Segments
    sums: Mapping[str, np.ndarray]
    bytes_per_token: float | None

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return int(self.segments.tokens.sum())

    def mean(self, quantity: str) -> Interval:
        """Mean per predicted token, with its interval."""
        return self.segments.mean(self.sums[quantity])


class Ledger:
    """Collects sums per (block, document) segment while the batches go by.

    Args:
        quantities: names of what is summed.
        bidirectional: whether the context of a token is its whole document, and not only what stands before it.
    """

    def __init__(self, quantities: Iterable[str], bidirectional: bool = False) -> None:
        self.bidirectional = bidirectional
        self.block: list[np.ndarray] = []
        self.document: list[np.ndarray] = []
        self.tokens: list[np.ndarray] = []
        self.sums: dict[str, list[np.ndarray]] = {name: [] for name in quantities}
        self.context = 0
        self.context_sum = 0

    def open(self, batch: dict[str, Tensor], first_block: int) -> tuple[Tensor, Tensor]:
        """Number the segments of a batch. Returns (segment of each token (B, T) counted from 0, valid (B, T) bool)."""
        tokens, targets, documents = batch["tokens"], batch["targets"], batch.get("documents")
        rows, length = tokens.shape
        valid = targets != IGNORED  # (B, T)
        if documents is None:
            documents = torch.zeros_like(tokens)
        change = torch.ones_like(documents, dtype=torch.bool)
        change[:, 1:] = documents[:, 1:] != documents[:, :-1]
        place = torch.arange(length).expand(rows, length)
        start = torch.where(change, place, 0).cummax(1).values  # (B, T): where the token's document begins in the row
        self.context = max(self.context, length)
        document = documents if "documents" in batch else torch.full_like(tokens, -1)
        block = first_block + torch.arange(rows)[:, None].expand(rows, length)
        segment = change.flatten().cumsum(0).view(rows, length) - 1  # (B, T)
        seen = torch.bincount(segment.flatten())[segment] if self.bidirectional else place - start + 1  # (B, T)
        self.context_sum += int(seen[valid].sum())
        counts = torch.bincount(segment[valid], minlength=int(segment[-1, -1]) + 1)
        self.block.append(block[change].numpy())
        self.document.append(document[change].numpy())
        self.tokens.append(counts.numpy())
        for sums in self.sums.values():
            sums.append(np.zeros(len(counts)))
        return segment, valid

    def add(self, quantity: str, segment: Tensor, values: Tensor) -> None:
        """Add `values` (N,) to the segments (N,) that they belong to, in float64."""
        sums = self.sums[quantity][-1]
        sums += np.bincount(segment.numpy(), values.double().cpu().numpy(), minlength=len(sums))

    def close(self) -> tuple[Segments, dict[str, np.ndarray]]:
        """The segments that hold a predicted token, and their sums."""
        tokens = np.concatenate(self.tokens)
        held = tokens > 0
        segments = Segments(np.concatenate(self.block)[held], np.concatenate(self.document)[held], tokens[held])
        return segments, {name: np.concatenate(sums)[held] for name, sums in self.sums.items()}

"""Labelled rows as token sequences of one target each: the class, at the row's last token.

A row is `begin t1..tn end`, or `begin t1..tn end u1..um end` for a pair (BERT, arXiv 1810.04805, section 3.2), where
`begin` and `end` are the tokens that begin and end a document. A row that is too long loses tokens from its longest
text. Every row is a document of its own, so that intervals are over rows.

B rows, T tokens a row, M tokens and N rows in the split.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from app.data.columns import read_document
from app.data.corpus import Corpus
from app.data.packing import PADDING, Batch
from app.data.tokenizer import Tokenizer
from models.errors import UserError
from models.projection import IGNORED

MULTIPLE = 8  # of which the length of a batch is one
MOST_CLASSES = 2**14


def read_classes(corpus: Corpus, split: str, headerless: bool = False) -> tuple[str, ...]:
    """The labels of a split: in the order of their numbers where all are whole numbers, else of the alphabet.

    Raises:
        UserError: fewer than two, as many as a number to predict would have, or a header row that is read as data.
    """
    labels = [read_document(document.text)[1] for document in corpus.documents(split)]
    counts = Counter(labels)
    if len(counts) < 2:
        only = f" ('{labels[0]}')" if labels else ""
        raise UserError(f"source '{corpus.name}' holds {len(counts)} label{only} in its {split} split; it takes two")
    if headerless and counts[labels[0]] == 1 and len(labels) > len(counts):
        raise UserError(
            f"source '{corpus.name}': the label '{labels[0]}' stands in the first row alone; if that is a header row, "
            "name the columns instead of numbering them"
        )
    if len(counts) > min(MOST_CLASSES, max(2, len(labels) // 2)):
        raise UserError(
            f"source '{corpus.name}' holds {len(counts)} different labels in {len(labels)} rows; a class needs some "
            "rows, and a number cannot be predicted as a class"
        )
    whole = all(label.removeprefix("-").isdecimal() for label in counts)
    return tuple(sorted(counts, key=int if whole else None))


class LabelledBlocks(Dataset):
    """Rows of one split; row i is always the same tokens.

    Args:
        corpus: its documents are those of `RowColumns`.
        tokenizer: gives the ids.
        split: `train`, `validation`, `test` or `all`.
        classes: the labels, in the order of their numbers.
        sequence_length: tokens that a row may have at most.

    Raises:
        UserError: a label that is not among the classes, no row at all, or no room for a text.
    """

    def __init__(
        self, corpus: Corpus, tokenizer: Tokenizer, split: str, classes: Sequence[str], sequence_length: int
    ) -> None:
        self.corpus, self.split = corpus.name, split
        documents = list(corpus.documents(split))
        if not documents:
            raise UserError(f"source '{corpus.name}' has no row in its {split} split")
        rows = [read_document(document.text) for document in documents]
        numbers = {label: number for number, label in enumerate(classes)}
        for document, (_, label) in zip(documents, rows, strict=True):
            if label not in numbers:
                raise UserError(
                    f"source '{corpus.name}', {document.name}: the label '{label}' is none of the classes that are "
                    f"trained: {', '.join(classes[:20])}"
                )
        columns = [tokenizer.encode_batch(column) for column in zip(*(texts for texts, _ in rows), strict=True)]
        ids = [_row(texts, tokenizer, sequence_length) for texts in zip(*columns, strict=True)]
        lengths = np.array([len(row) for row in ids])
        self.cut = sum(sum(map(len, texts)) + len(texts) + 1 > sequence_length for texts in zip(*columns, strict=True))
        self._ids = np.concatenate([np.array(row, dtype=np.int32) for row in ids])  # (M,)
        self._starts = np.concatenate([[0], np.cumsum(lengths)])  # (N + 1,)
        self._classes = np.array([numbers[label] for _, label in rows])  # (N,)
        self._numbers = np.array([document.number for document in documents])  # (N,)
        self.sequence_length = min(sequence_length, -(-int(lengths.max()) // MULTIPLE) * MULTIPLE)
        self.tokens = len(documents)  # predictions in the split
        self.bytes_per_token = None
        self._end = tokenizer.eot
        self._rows = np.arange(len(documents))  # (len(self),)
        what = f"{corpus.sha256} {split} {tokenizer.sha256} {sequence_length} {list(classes)}"
        self.fingerprint = hashlib.sha256(what.encode("utf-8", "surrogatepass")).hexdigest()

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def highest(self) -> int:
        """The largest id of the split."""
        return int(self._ids.max())

    @property
    def counts(self) -> np.ndarray:
        """Rows of each class."""
        return np.bincount(self._classes[self._rows])

    def first(self, count: int) -> "LabelledBlocks":
        """The first `count` rows."""
        return self.choose(range(count))

    def choose(self, rows: Sequence[int]) -> "LabelledBlocks":
        """These rows, in this order."""
        chosen = object.__new__(LabelledBlocks)
        chosen.__dict__ = self.__dict__ | {"_rows": self._rows[np.asarray(rows, dtype=np.int64)]}
        return chosen

    def __getitem__(self, index: int) -> Batch:
        """One row without the batch dimension, as long as the longest may be. Raises IndexError past the end."""
        if not -1 <= index < len(self):
            raise IndexError(index)
        return {name: tensor[0] for name, tensor in self._batch([index], self.sequence_length).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self.batch(indices)

    def batch(self, indices: Sequence[int]) -> Batch:
        """The rows `indices` as one batch, as long as the longest of them; the index -1 gives a row of padding.

        An index past the end is a row of a later epoch: the same one again.

        Returns:
            tokens (B, T) int64; targets (B, T) int64, the class at the last token of a row and -100 elsewhere;
            documents (B, T) int32, place in the split, -1 for padding; ids (B, 2) int64, the number in the corpus
            twice, -1 for a row of padding.
        """
        return self._batch(indices, None)

    def _batch(self, indices: Sequence[int], length: int | None) -> Batch:
        given = np.asarray(indices, dtype=np.int64)  # (B,)
        real = given != PADDING
        rows = self._rows[np.where(real, given % len(self), 0)]  # (B,)
        sizes = np.where(real, self._starts[rows + 1] - self._starts[rows], 0)  # (B,)
        if length is None:
            length = max(MULTIPLE, -(-int(sizes.max()) // MULTIPLE) * MULTIPLE)
            length = min(length, self.sequence_length)
        steps = np.arange(length)[None]  # (1, T)
        held = steps < sizes[:, None]  # (B, T)
        places = np.minimum(self._starts[rows][:, None] + steps, len(self._ids) - 1)
        last = steps == sizes[:, None] - 1
        return {
            "tokens": torch.from_numpy(np.where(held, self._ids[places], self._end).astype(np.int64)),
            "targets": torch.from_numpy(np.where(last, self._classes[rows][:, None], IGNORED)),
            "documents": torch.from_numpy(np.where(held, rows[:, None], PADDING).astype(np.int32)),
            "ids": torch.from_numpy(np.where(real, self._numbers[rows], PADDING)[:, None].repeat(2, axis=1)),
        }

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Every row in order, `batch_size` at a time; the last batch may be smaller."""
        for begin in range(0, len(self), batch_size):
            yield self.batch(range(begin, min(begin + batch_size, len(self))))


def encode_row(texts: Sequence[str], tokenizer: Tokenizer, sequence_length: int) -> list[int]:
    """The ids of one row from its texts."""
    return _row(tokenizer.encode_batch(texts), tokenizer, sequence_length)


def _row(texts: Sequence[list[int]], tokenizer: Tokenizer, sequence_length: int) -> list[int]:
    """The ids of a row, of the ids of its texts: cut from the longest until it fits."""
    room = sequence_length - 1 - len(texts)
    if room < len(texts):
        raise UserError(
            f"sequence_length {sequence_length} has no room for a row of {len(texts)} texts with a token before the "
            f"first and behind each; give at least {1 + 2 * len(texts)}"
        )
    lengths = [min(len(ids), room) for ids in texts]
    while sum(lengths) > room:
        lengths[lengths.index(max(lengths))] -= 1
    row = [tokenizer.begin]
    for ids, length in zip(texts, lengths, strict=True):
        row += [*ids[:length], tokenizer.eot]
    return row

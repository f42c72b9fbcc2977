"""Labelled rows for the Trainer: `TextData` whose blocks are rows with a class (app/data/labelled.py)."""

import hashlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from app.data.columns import RowColumns, read_document
from app.data.corpus import Corpus, Document, check_split
from app.data.labelled import LabelledBlocks, read_classes
from app.data.module import TextData
from app.data.sources import open_source
from app.data.tokenizer import Tokenizer, cached_tokenizer, load_tokenizer
from models.errors import UserError

Columns = str | int | list[str | int]


def read_columns(text: Columns, label: str | int) -> RowColumns:
    """The columns as options give them: names or numbers, `a,b` or a list. Raises UserError where one comes twice."""
    texts = text.split(",") if isinstance(text, str) else text if isinstance(text, list) else [text]
    columns = RowColumns(tuple(str(one).strip() for one in texts), str(label).strip())
    if not all(columns.names) or len(set(columns.names)) < len(columns.names):
        raise UserError(f"data.text {','.join(columns.texts)} and data.label {columns.label}: give each column once")
    return columns


class LabelledData(TextData):
    """Rows of a table as batches of token sequences with a class each, in an order that can be resumed exactly.

    A batch is a dict: tokens (B, T) int64, targets (B, T) int64 with the class at each row's last token and -100
    elsewhere, documents (B, T) int32 with -1 for padding, ids (B, 2) int64. T is that of the batch's longest row.

    Args:
        source: a TSV, CSV, JSON-lines or Parquet file, a folder or glob of them, a datasets folder, or a hub name.
            Without `validation`, and where its files do not name their splits, 5 % of the rows validate and 5 % test.
        validation: another source, all of which is the validation split, and the test split too; then all of `source`
            is trained on.
        text: column with the text, or columns of a pair: names, `a,b` or a list; numbers from 1 for a CSV or TSV file
            without a header row.
        label: column with the class.
        sequence_length: tokens of a row at most (T); longer ones are cut.
        batch_size: rows in a batch over all ranks together.
        tokenizer: a folder with tokenizer.json, or that file; by default that of `model.from`, or trained on the
            training split.
        vocab_size: size of a tokenizer that is trained here.
        workers: loader processes of each rank; 0 reads in the training process, which is fast enough for most runs.
        seed: seed of the order.
        cache_dir: folder for tokenizers and indices; by default $ESPALIER_CACHE or the user's cache folder.

    Raises:
        UserError: an option is out of range, or there is no source.
    """

    def __init__(
        self,
        source: str | None = None,
        validation: str | None = None,
        text: Columns = "text",
        label: str | int = "label",
        sequence_length: int = 128,
        batch_size: int = 32,
        tokenizer: str | None = None,
        vocab_size: int = 4096,
        workers: int = 0,
        seed: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        if source is None:
            raise UserError("classify needs --data FILE, a table with a column of text and one of labels")
        super().__init__(
            source,
            sequence_length=sequence_length,
            batch_size=batch_size,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            workers=workers,
            seed=seed,
            cache_dir=cache_dir,
        )
        self.validation = validation
        self.columns = read_columns(text, label)
        self._rows: dict[str, LabelledBlocks] = {}

    @cached_property
    def corpus(self) -> Corpus:
        train = open_source(self.source, self.columns, self.cache)
        if self.validation is None:
            return train
        return TwoSources(train, open_source(self.validation, self.columns, self.cache))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer_path is not None:
            return load_tokenizer(self._tokenizer_path)
        texts = (text for document in self.corpus.documents("train") for text in read_document(document.text)[0])
        return cached_tokenizer(texts, self.corpus.sha256, self._vocab_size, self.cache / "tokenizers")

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The labels in the order of their numbers: the task's, or those of the training split."""
        given = () if self.task is None else self.task.labels
        return given or read_classes(self.corpus, "train", self.columns.numbered)

    @cached_property
    def fingerprint(self) -> str:
        what = f"{self.corpus.sha256} {self.tokenizer.sha256} {list(self.classes)}"
        return hashlib.sha256(what.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def bytes_per_token(self) -> None:
        """None: a class stands for no text of its own."""
        return None

    def blocks(self, split: str) -> LabelledBlocks:
        """The rows of a split, tokenized at the first use."""
        if split not in self._rows:
            rows = LabelledBlocks(self.corpus, self.tokenizer, split, self.classes, self.sequence_length)
            self._rows[split] = rows
            if rows.cut:
                print(
                    f"{split}: {rows.cut} of {len(rows)} rows were cut to {self.sequence_length} tokens",
                    file=sys.stderr,
                )
        return self._rows[split]

    def _check_size(self) -> None:
        if (rows := len(self.blocks("train"))) < self.batch_size:
            raise UserError(
                f"source '{self.source}' holds {rows} rows to train on, and one batch has {self.batch_size}; give more "
                "rows, or a smaller batch_size"
            )


@dataclass
class TwoSources:
    """A corpus of two sources: all of one is trained on; all of the other validates, and tests."""

    training: Corpus
    held_out: Corpus

    @property
    def name(self) -> str:
        return self.training.name

    @property
    def sha256(self) -> str:
        return hashlib.sha256(f"{self.training.sha256} {self.held_out.sha256}".encode()).hexdigest()

    @property
    def sizes(self) -> dict[str, int]:
        train, held_out = (sum(corpus.sizes.values()) for corpus in (self.training, self.held_out))
        return {"train": train, "validation": held_out, "test": held_out}

    @property
    def left_out(self) -> list[str]:
        return [*self.training.left_out, *self.held_out.left_out]

    def documents(self, split: str) -> Iterator[Document]:
        """The documents of a split (`all`: of the training and the held-out source)."""
        check_split(split)
        if split in ("train", "all"):
            yield from self.training.documents("all")
        if split != "train":
            yield from self.held_out.documents("all")

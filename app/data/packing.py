"""Documents as token ids on disk, read back in blocks of equal length with the document boundaries kept.

Layout of a split: eot t1..tn eot u1..um .. eot. The end-of-text token begins each document, is the target of the last
token of the one before, and closes the file; so each of the M = sum(n + 1) inputs has exactly one target and every
token but the first eot is predicted once. Block i is inputs [iT, iT + T) and targets [iT + 1, iT + T + 1). Where the
tokenizer begins documents with a token of its own, that one takes the place of eot in the inputs, never in the targets.

Shapes: B rows, T tokens a row, M tokens in the split, N documents in the split.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from app.data.cache import build_once, cache_root, track
from app.data.corpus import Corpus, Document, check_split
from app.data.sources import open_source
from app.data.tokenizer import Tokenizer
from models.errors import UserError
from models.io import read_json, write_json
from models.projection import IGNORED

LAYOUT = 1  # part of the fingerprint: a change of what is written makes new files
PADDING = -1  # document of a position that is no token; as an index of a row, a row of nothing but padding
_CHUNK = 1_000_000  # characters that are tokenized at once

Batch = dict[str, torch.Tensor]


def fingerprint_of(corpus: Corpus, tokenizer: Tokenizer) -> str:
    """Return the SHA-256 (hex) that names the token files of `corpus` under `tokenizer`."""
    return hashlib.sha256(f"{LAYOUT} {corpus.sha256} {tokenizer.sha256}".encode()).hexdigest()


def tokenize(corpus: Corpus, tokenizer: Tokenizer, split: str, cache: Path) -> Path:
    """Return the folder with the token ids of one split, made now if no earlier run left it in `cache`.

    The folder holds tokens.bin (M + 1 ids, uint16, or uint32 for more than 65536 tokens), starts.npy (N + 1, where
    each document begins; the last is M), numbers.npy (N, document numbers in the corpus), names.txt and meta.json.

    Raises:
        UserError: the split is empty, or the cache cannot be written.
    """
    check_split(split)
    fingerprint = fingerprint_of(corpus, tokenizer)
    place = cache / "tokens" / f"{fingerprint[:32]}-{split}"
    return build_once(place, partial(_write, corpus, tokenizer, split, fingerprint))


def _write(corpus: Corpus, tokenizer: Tokenizer, split: str, fingerprint: str, folder: Path) -> None:
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    lengths: list[int] = []
    numbers: list[int] = []
    size = 0
    total = sum(corpus.sizes.values()) if split == "all" else corpus.sizes[split]
    documents = track(
        corpus.documents(split), f"Tokenizing {corpus.name} ({split})", total, lambda document: len(document.text)
    )
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "names.txt").open("w", encoding="utf-8") as names:
        for chunk in _chunks(documents):
            encoded = tokenizer.encode_batch([document.text for document in chunk])
            for document, ids in zip(chunk, encoded, strict=True):
                tokens.write(np.array([tokenizer.eot, *ids], dtype=dtype).tobytes())
                names.write(" ".join(document.name.splitlines()) + "\n")
                lengths.append(len(ids) + 1)
                numbers.append(document.number)
                size += len(document.text.encode("utf-8"))
        tokens.write(np.array([tokenizer.eot], dtype=dtype).tobytes())
    if not lengths:
        raise UserError(
            f"corpus '{corpus.name}' has no document in its {split} split; it takes three different ones in all"
        )
    np.save(folder / "starts.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    np.save(folder / "numbers.npy", np.array(numbers, dtype=np.int64))
    meta = {"fingerprint": fingerprint, "corpus": corpus.name, "split": split, "dtype": np.dtype(dtype).name}
    if tokenizer.begin != tokenizer.eot:
        meta["begin_of_text"] = tokenizer.begin
    write_json(folder / "meta.json", meta | {"tokens": sum(lengths), "bytes": size, "end_of_text": tokenizer.eot})


def _chunks(documents: Iterator[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    characters = 0
    for document in documents:
        chunk.append(document)
        characters += len(document.text)
        if characters >= _CHUNK:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


class TokenBlocks(Dataset):
    """Blocks of `sequence_length` tokens over the memory-mapped ids of one split; block i is always the same tokens.

    Args:
        folder: what `tokenize` returned.
        sequence_length: T.
        last: what becomes of the last, shorter block: `pad` keeps it with documents -1 and targets -100 behind its
            end, so that the whole split is covered (evaluation); `drop` leaves it out (training).
        cross_documents: leave `documents` out of the batches, so that attention and positions run across documents.
        chosen: numbers of the blocks to keep, in this order; every block when None.
    """

    def __init__(
        self,
        folder: Path,
        sequence_length: int,
        last: Literal["pad", "drop"] = "pad",
        cross_documents: bool = False,
        chosen: Sequence[int] | None = None,
    ) -> None:
        if sequence_length < 1:
            raise UserError(f"sequence_length {sequence_length} is too small; it must be at least 1")
        self.folder = folder
        self.sequence_length = sequence_length
        self.cross_documents = cross_documents
        meta = read_json(folder / "meta.json")
        self.corpus: str = meta["corpus"]
        self.split: str = meta["split"]
        self.fingerprint: str = meta["fingerprint"]
        self.bytes: int = meta["bytes"]  # UTF-8 bytes of the split
        self.tokens: int = meta["tokens"]  # M: predictions in the split
        self.end_of_text: int = meta["end_of_text"]
        self.begin_of_text: int = meta.get("begin_of_text", self.end_of_text)
        self._dtype = np.dtype(meta["dtype"])
        self._starts = np.load(folder / "starts.npy")  # (N + 1,)
        self._numbers = np.load(folder / "numbers.npy")  # (N,)
        count = -(-self.tokens // sequence_length) if last == "pad" else self.tokens // sequence_length
        self._blocks = np.arange(count) if chosen is None else np.asarray(chosen, dtype=np.int64)  # (len(self),)

    def __len__(self) -> int:
        return len(self._blocks)

    def __getstate__(self) -> dict[str, Any]:
        # A memory map is pickled as a copy of the file; a worker opens its own instead.
        return {name: value for name, value in self.__dict__.items() if name != "stream"}

    @cached_property
    def stream(self) -> np.ndarray:
        """All ids of the split, memory-mapped: (M + 1,), uint16 or uint32."""
        return np.memmap(self.folder / "tokens.bin", dtype=self._dtype, mode="r")

    @property
    def highest(self) -> int:
        """The largest id of the split."""
        return int(self.stream.max())

    def first(self, count: int) -> "TokenBlocks":
        """The first `count` blocks of the split."""
        return TokenBlocks(self.folder, self.sequence_length, chosen=range(count))

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes a prediction: bits per byte is loss in nats / (ln 2 * bytes_per_token)."""
        return self.bytes / self.tokens

    def name(self, number: int) -> str:
        """Return the name of the document with this number in the corpus, as `ids` of a batch gives it."""
        place = int(np.searchsorted(self._numbers, number))
        if place == len(self._numbers) or self._numbers[place] != number:
            raise UserError(f"corpus '{self.corpus}' has no document {number} in its {self.split} split")
        return (self.folder / "names.txt").read_text(encoding="utf-8").split("\n")[place]

    def number(self, index: int) -> int:
        """Return which block of the split that at `index` is."""
        return int(self._blocks[index % len(self)])

    def __getitem__(self, index: int) -> Batch:
        """Return one row without the batch dimension. Raises IndexError past the end."""
        if not -1 <= index < len(self):
            raise IndexError(index)
        return {name: tensor[0] for name, tensor in self.batch([index]).items()}

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self.batch(indices)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Return the blocks `indices` as one batch; the index -1 gives a row of padding.

        An index past the end is a block of a later epoch: the same one again.

        Returns:
            tokens (B, T) int64; targets (B, T) int64, -100 where nothing is predicted; documents (B, T) int32, places
            in the split, -1 for padding (left out with `cross_documents`); ids (B, 2) int64, the numbers in the corpus
            of the first and the last document of each row, -1 for a row of padding.
        """
        rows = np.asarray(indices, dtype=np.int64)  # (B,)
        rows = np.where(rows == PADDING, PADDING, rows % len(self))
        length, end = self.sequence_length, self.tokens
        begins = np.where(rows == PADDING, end, self._blocks[rows] * length)  # (B,)
        places = begins[:, None] + np.arange(length + 1)  # (B, T + 1)
        window = self.stream[np.minimum(places, end)].astype(np.int64)  # (B, T + 1); past the end: end of text
        real = places[:, :-1] < end  # (B, T)
        first, last = self._documents_at(begins), self._documents_at(np.minimum(begins + length, end) - 1)  # (B,), (B,)
        ids = np.where(rows[:, None] == PADDING, PADDING, self._numbers[np.stack([first, last], axis=1)])  # (B, 2)
        tokens = window[:, :-1]  # (B, T)
        if self.begin_of_text != self.end_of_text:
            opens = self._boundaries(begins, first, last)  # (B, T)
            opens[:, 0] = self._starts[first] == begins
            tokens = np.where(opens, self.begin_of_text, tokens)
        batch = {
            "tokens": torch.from_numpy(np.ascontiguousarray(tokens)),
            "targets": torch.from_numpy(np.where(real, window[:, 1:], IGNORED)),
            "ids": torch.from_numpy(ids),
        }
        if not self.cross_documents:
            documents = first[:, None] + self._boundaries(begins, first, last).cumsum(axis=1)  # (B, T)
            batch["documents"] = torch.from_numpy(np.where(real, documents, PADDING).astype(np.int32))
        return batch

    def _documents_at(self, places: np.ndarray) -> np.ndarray:
        """Return the document at each place of the stream."""
        return np.minimum(np.searchsorted(self._starts, places, side="right") - 1, len(self._numbers) - 1)

    def _boundaries(self, begins: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        """Return (B, T) with 1 where a document begins inside a row, from (B,) begins and first and last documents."""
        counts = np.maximum(last - first, 0)  # (B,)
        rows = np.repeat(np.arange(len(begins)), counts)  # (boundaries,)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # (boundaries,)
        marks = np.zeros((len(begins), self.sequence_length), dtype=np.int64)  # (B, T)
        marks[rows, self._starts[first[rows] + 1 + within] - begins[rows]] = 1
        return marks

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield every block in order, `batch_size` at a time; the last batch may be smaller."""
        for begin in range(0, len(self), batch_size):
            yield self.batch(range(begin, min(begin + batch_size, len(self))))


def token_blocks(
    source: str | Corpus,
    tokenizer: Tokenizer,
    split: str,
    sequence_length: int,
    samples: int | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> TokenBlocks:
    """Return the blocks of one split for evaluation, or `samples` of them for calibration.

    Without `samples` the whole split is covered, the last block padded. With `samples`, that many distinct full blocks
    are drawn with `seed` and kept in the order of the text; a split that holds fewer gives all that it has.

    Args:
        source: a SOURCE (see `open_source`) or an open corpus.
        tokenizer: gives the ids.
        split: `train`, `validation`, `test`, or `all` for a text that is not split.
        sequence_length: T.
        samples: number of blocks.
        seed: seed of the draw.
        cache_dir: cache folder; `cache_root` says what the default is.

    Raises:
        UserError: the source cannot be read, the split is empty, or it holds no full block to draw.
    """
    cache = cache_root(cache_dir)
    corpus = open_source(source, cache_dir=cache) if isinstance(source, str) else source
    folder = tokenize(corpus, tokenizer, split, cache)
    if samples is None:
        return TokenBlocks(folder, sequence_length)
    if samples < 1:
        raise UserError(f"samples {samples} is too small; it must be at least 1")
    blocks = TokenBlocks(folder, sequence_length, last="drop")
    if not len(blocks):
        raise UserError(
            f"corpus '{corpus.name}' holds {blocks.tokens} tokens in its {split} split, "
            f"fewer than one block of {sequence_length}; give more text or a smaller sequence_length"
        )
    draw = np.random.Generator(np.random.PCG64(seed))
    chosen = np.sort(draw.permutation(len(blocks))[:samples])
    return TokenBlocks(folder, sequence_length, last="drop", chosen=chosen)

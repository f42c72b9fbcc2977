"""Corpus: documents with numbers and names, in three splits; the default corpus and the synthetic one.

Every document has a number (its place in the corpus, over all splits), a name that a person recognises, and a split
that depends on a hash of its name or text, so that neither the machine nor the order of the files moves a document from
training to validation.
"""

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from models.errors import UserError

SPLITS = ("train", "validation", "test")
HELD_OUT = 0.05  # share of the documents in each of validation and test, where the source brings no splits of its own

# Parts of the standard library that some distributions leave out, and what is no prose of a programmer.
EXCLUDED = {
    *("test", "tests", "encodings", "site-packages", "dist-packages", "idlelib", "tkinter", "turtle", "turtledemo"),
    *("lib2to3", "distutils", "ensurepip", "venv", "msilib", "ctypes", "curses", "sqlite3", "dbm", "_pyrepl"),
}


class Document(NamedTuple):
    """One text: its number in the corpus (from 0, over all splits), the name it goes by, and the text itself."""

    number: int
    name: str
    text: str


class Corpus(Protocol):
    """Documents in the splits `train`, `validation` and `test`.

    `sha256` covers every document's split and text in order, `sizes` is the UTF-8 bytes of each split, `name` is what a
    person reads in messages and reports, and `left_out` says in sentences what of the source is not in the corpus.
    """

    name: str

    @property
    def sha256(self) -> str: ...

    @property
    def sizes(self) -> dict[str, int]: ...

    @property
    def left_out(self) -> list[str]: ...

    def documents(self, split: str) -> Iterator[Document]: ...


def check_split(split: str) -> None:
    """Raise `UserError` unless `split` is one of the three splits or `all`."""
    if split not in (*SPLITS, "all"):
        raise UserError(f"split '{split}' does not exist; the splits are {', '.join(SPLITS)} and all")


def place_of(key: str) -> float:
    """Return a number in [0, 1) from a hash of `key`: the same key has the same place on every machine."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[-8:], "big") / 2**64


def assign_splits(places: Sequence[float], wanted: Sequence[str] = SPLITS) -> list[str]:
    """Return the split of every document from its `place_of`: 5 % in each held-out split that is `wanted`.

    A small corpus may leave a held-out split empty; then the document nearest to its share moves there, provided that
    two stay behind, so that three documents are enough for three splits.
    """
    held_out = [split for split in ("validation", "test") if split in wanted]
    splits = ["train"] * len(places)
    for number, place in enumerate(places):
        if place < HELD_OUT * len(held_out):
            splits[number] = held_out[int(place / HELD_OUT)]
    for split in held_out:
        train = [number for number, of in enumerate(splits) if of == "train"]
        if split not in splits and len(train) > 1:
            splits[min(train, key=lambda number: places[number])] = split
    return splits


@dataclass
class MemoryCorpus:
    """A corpus held in memory: what is small enough to be read once. Documents are split by a hash of their names."""

    name: str
    texts: list[Document]

    @property
    def left_out(self) -> list[str]:
        """Nothing: what makes such a corpus says itself what it holds."""
        return []

    @cached_property
    def splits(self) -> list[str]:
        """The split of every document, in the order of `texts`."""
        return assign_splits([place_of(document.name) for document in self.texts])

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over the split and the text of every document."""
        digest = Digest()
        for split, document in zip(self.splits, self.texts, strict=True):
            digest.add(split, document.text)
        return digest.hexdigest()

    @cached_property
    def sizes(self) -> dict[str, int]:
        """UTF-8 bytes of each split."""
        return {split: sum(len(d.text.encode()) for d in self.documents(split)) for split in SPLITS}

    def documents(self, split: str) -> Iterator[Document]:
        """Yield the documents of `split` (`all` yields every one) in the order of their numbers."""
        check_split(split)
        for of, document in zip(self.splits, self.texts, strict=True):
            if split in (of, "all"):
                yield document


class Digest:
    """SHA-256 over splits and texts in order; names are left out, so a corpus may move without becoming another."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, split: str, text: str) -> int:
        """Add one document and return its size in UTF-8 bytes."""
        data = text.encode("utf-8")
        self._hash.update(f"{split} {len(data)}\n".encode())
        self._hash.update(data)
        return len(data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def python_corpus() -> MemoryCorpus:
    """Return the default corpus: the running interpreter's own standard library, read in place.

    About 7.5 MB: every `.py` file of the standard library and `pydoc_data/topics.py`, sorted by path, without tests,
    encodings and the parts that distributions leave out; undecodable files are skipped; split by a hash of the path.

    Raises:
        UserError: the interpreter has no source files (a frozen or zipped standard library).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in EXCLUDED and name != "__pycache__"]
        names += [Path(folder, name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    texts = []
    for name in sorted(names):
        last = name.removesuffix(".py").rpartition("/")[2]
        if last in EXCLUDED or last.startswith("_sysconfigdata"):
            continue
        try:
            text = (root / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text:
            texts.append(Document(len(texts), name, text))
    if not texts:
        raise UserError(f"corpus 'python': {root} holds no source files of the standard library; give --data a file")
    return MemoryCorpus("python", texts)


def synthetic(seed: int = 0, documents: int = 400, words: int = 120, vocabulary: int = 64) -> MemoryCorpus:
    """Return text from a random Markov chain over words: learnable, and the same bytes for the same arguments.

    Each of `vocabulary` words is followed by one of four words with probabilities 0.55, 0.25, 0.15 and 0.05, so the
    entropy rate is 1.11 nats a word: a model that learns the chain gets far below the unigram entropy. A document
    holds between half and one and a half times `words` words, in sentences.
    """
    draw = np.random.Generator(np.random.PCG64(seed))
    syllables = [consonant + vowel for consonant in "bdfgklmnprst" for vowel in "aeiou"]
    names: list[str] = []
    while len(names) < vocabulary:
        word = "".join(draw.choice(syllables, size=draw.integers(1, 4)))
        if word not in names:
            names.append(word)
    followers = np.stack([draw.choice(vocabulary, size=4, replace=False) for _ in range(vocabulary)])  # (vocabulary, 4)
    texts = []
    for number in range(documents):
        length = int(draw.integers(words // 2, words + words // 2 + 1))
        choices = draw.choice(4, size=length, p=[0.55, 0.25, 0.15, 0.05])
        ends = draw.random(length) < 0.1
        word, pieces = int(draw.integers(vocabulary)), []
        for choice, end in zip(choices, ends, strict=True):
            pieces.append(names[word] + (".\n" if end else " "))
            word = int(followers[word, choice])
        texts.append(Document(number, f"synthetic/{seed}/{number}", "".join(pieces).rstrip() + "\n"))
    return MemoryCorpus("synthetic", texts)

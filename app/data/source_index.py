"""A corpus read from files or a data set: its documents in order, and what one pass over all of them finds out."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from app.data.cache import build_once, track
from app.data.corpus import SPLITS, Digest, Document, assign_splits, check_split, place_of
from models.errors import UserError
from models.io import read_json, write_json

_SURROGATES = re.compile("[\ud800-\udfff]")


class SourcePart(NamedTuple):
    """Part of a source: documents in order, their names and texts, and the split that they bring with them (or None).

    Texts may be empty: a corpus leaves those out and says how many they were.
    """

    split: str | None
    documents: Callable[[], Iterator[tuple[str, str]]]


@dataclass
class SourceCorpus:
    """A corpus of any size that is read again for every pass; splits and SHA-256 are worked out once and cached.

    Args:
        name: the SOURCE as it was given.
        identity: changes when a file changes (path, size or time), so that what was worked out before can be trusted.
        size: bytes to read, for the progress bar.
        load: opens the parts.
        cache: cache folder.
        unread: what of the source is no text and is not read, in words; empty where all of it is read.
    """

    name: str
    identity: str
    size: int
    load: Callable[[], list[SourcePart]]
    cache: Path
    unread: str = ""

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "parts"}  # opened again when needed

    @cached_property
    def parts(self) -> list[SourcePart]:
        """The parts of the source, opened at the first use."""
        return self.load()

    @cached_property
    def survey(self) -> Path:
        """Folder with what one pass over all documents finds: splits.npy (a place in SPLITS each) and survey.json."""
        return build_once(self.cache / "sources" / self.identity[:32], self._survey)

    def _survey(self, folder: Path) -> None:
        own: list[str | None] = []
        places: list[float] = []
        empty = 0
        rows = ((part.split, name, text) for part in self.parts for name, text in part.documents())
        for split, name, text in track(rows, f"Reading {self.name}", self.size, lambda row: len(row[2])):
            if not text:
                empty += 1
                continue
            if not text.isascii() and _SURROGATES.search(text):
                raise UserError(
                    f"source '{self.name}': document {name} holds half of a surrogate pair, which is no text"
                )
            own.append(split)
            places.append(place_of(text))
        if not own:
            raise UserError(f"source '{self.name}' holds no text")
        splits = _merge(own, places)
        digest = Digest()
        sizes = dict.fromkeys(SPLITS, 0)
        texts = track(self._texts(), f"Hashing {self.name}", self.size, lambda document: len(document[1]))
        for split, (_, text) in zip(splits, texts, strict=True):
            sizes[split] += digest.add(split, text)
        np.save(folder / "splits.npy", np.array([SPLITS.index(split) for split in splits], dtype=np.int8))
        write_json(folder / "survey.json", {"sha256": digest.hexdigest(), "sizes": sizes, "empty": empty})

    def _texts(self) -> Iterator[tuple[str, str]]:
        for part in self.parts:
            yield from (document for document in part.documents() if document[1])

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over the split and the text of every document."""
        return read_json(self.survey / "survey.json")["sha256"]

    @cached_property
    def sizes(self) -> dict[str, int]:
        """UTF-8 bytes of each split."""
        return read_json(self.survey / "survey.json")["sizes"]

    @property
    def left_out(self) -> list[str]:
        """Parts of the source that are not in the corpus, one sentence each."""
        empty = read_json(self.survey / "survey.json")["empty"]
        documents = empty + len(np.load(self.survey / "splits.npy"))
        rows = f"source '{self.name}': {empty} of {documents} documents are empty and left out"
        return ([f"source '{self.name}': {self.unread}"] if self.unread else []) + ([rows] if empty else [])

    def documents(self, split: str) -> Iterator[Document]:
        """Yield the documents of `split` (`all` yields every one) in the order of their numbers."""
        check_split(split)
        splits = np.load(self.survey / "splits.npy")
        for number, (name, text) in enumerate(self._texts()):
            if split == "all" or SPLITS[splits[number]] == split:
                yield Document(number, name, text)


def _merge(own: list[str | None], places: list[float]) -> list[str]:
    """Return a split for every document: its own where the source has splits, the rest by the hash."""
    present = set(own) - {None}
    if present and "train" not in present:  # somebody's validation or test file alone is a text like any other
        present, own = set(), [None] * len(own)
    free = [number for number, split in enumerate(own) if split in (None, "train")]
    wanted = [split for split in SPLITS if split not in present]
    assigned = dict(zip(free, assign_splits([places[number] for number in free], wanted), strict=True))
    return [assigned.get(number, split) or "train" for number, split in enumerate(own)]

"""A corpus read from files or a data set: its documents in order, and what one pass over all of them finds out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from app.data.cache import build_once, track
from app.data.corpus import SPLITS, Digest, Document, assign_splits, check_split, place_of
from models.errors import UserError
from models.files import read_json, write_json


class Part(NamedTuple):
    """Some documents of a source in order: the split that they bring with them (or None), their names and texts."""

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
    """

    name: str
    identity: str
    size: int
    load: Callable[[], list[Part]]
    cache: Path

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "parts"}  # opened again when needed

    @cached_property
    def parts(self) -> list[Part]:
        """The parts of the source, opened at the first use."""
        return self.load()

    @cached_property
    def survey(self) -> Path:
        """Folder with what one pass over all documents finds: splits.npy (a place in SPLITS each) and survey.json."""
        return build_once(self.cache / "sources" / self.identity[:32], self._survey)

    def _survey(self, folder: Path) -> None:
        own: list[str | None] = []
        places: list[float] = []
        rows = ((part.split, text) for part in self.parts for _, text in part.documents())
        for split, text in track(rows, f"Reading {self.name}", self.size, lambda row: len(row[1])):
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
        write_json(folder / "survey.json", {"sha256": digest.hexdigest(), "sizes": sizes})

    def _texts(self) -> Iterator[tuple[str, str]]:
        for part in self.parts:
            yield from part.documents()

    @cached_property
    def sha256(self) -> str:
        """SHA-256 over the split and the text of every document."""
        return read_json(self.survey / "survey.json")["sha256"]

    @cached_property
    def sizes(self) -> dict[str, int]:
        """UTF-8 bytes of each split."""
        return read_json(self.survey / "survey.json")["sizes"]

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

"""In which order a training run reads its blocks, and how every rank and worker gets its share of it.

The order is one endless stream of samples: a seeded permutation of all blocks, then another one, and so on. A run has
one position in it, the number of samples that all ranks together have consumed. Batches are cut from the stream
wherever the position stands, so no sample is dropped or repeated at the end of an epoch, and nothing but the position
is needed to continue, whatever the number of ranks, workers or accumulated batches.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from app.data.packing import PADDING, Batch


class Order:
    """The stream of block numbers for `count` blocks and a `seed`."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self._epoch = -1
        self._permutation = np.zeros(0, dtype=np.int64)

    def slice(self, begin: int, end: int) -> np.ndarray:
        """Return the samples at the places [begin, end) of the stream: (end - begin,) int64.

        A sample is the number of its block, plus `count` for every epoch before it.
        """
        pieces = []
        while begin < end:
            epoch, offset = divmod(begin, self.count)
            piece = self._of(epoch)[offset : offset + end - begin] + epoch * self.count
            pieces.append(piece)
            begin += len(piece)
        return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)

    def _of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
            self._epoch, self._permutation = epoch, draw.permutation(self.count)
        return self._permutation


class TrainingBatches(Sampler[list[int]]):
    """One rank's share of each global batch: `length` batches from wherever `position()` stands when it is iterated.

    Args:
        order: the stream.
        position: gives the samples consumed by all ranks together.
        length: batches in an epoch.
        batch_size: samples in a global batch; rank r of R takes the r-th of R equal parts.
        rank, ranks: r and R.
    """

    def __init__(
        self, order: Order, position: Callable[[], int], length: int, batch_size: int, rank: int, ranks: int
    ) -> None:
        self.order = order
        self.position = position
        self.length = length
        self.batch_size = batch_size
        self.rank = rank
        self.share = batch_size // ranks

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[int]]:
        begin = self.position() + self.rank * self.share
        for batch in range(self.length):
            at = begin + batch * self.batch_size
            yield self.order.slice(at, at + self.share).tolist()


class EvaluationBatches(Sampler[list[int]]):
    """One rank's share of all blocks in order. Every rank gets as many batches of the same shape: what is missing at
    the end is rows of padding, which count for nothing, so that no collective waits for a rank that has no batch."""

    def __init__(self, count: int, batch_size: int, rank: int, ranks: int) -> None:
        self.count = count
        self.batch_size = batch_size
        self.rank = rank
        self.ranks = ranks

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for begin in range(0, len(self) * self.batch_size, self.batch_size):
            rows = range(begin + self.rank, begin + self.batch_size, self.ranks)
            yield [row if row < self.count else PADDING for row in rows]


class Loader:
    """An iterable of batches that Lightning takes as it is.

    Lightning replaces the sampler of a `DataLoader` in multi-process runs (unless told not to), and with it the order.
    This is no `DataLoader` but holds one. It has a length, so that Lightning fetches no batch ahead of its use, and a
    random generator of its own, so that starting an epoch leaves the global one alone and a resumed run draws the same
    dropout as the uninterrupted one.
    """

    def __init__(self, blocks: Dataset, batches: Sampler[list[int]], workers: int) -> None:
        self._loader = DataLoader(
            blocks,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(0),
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        # A generator, so that workers start with the first batch: Lightning calls iter() once just to see that it can.
        yield from self._loader

    def state_dict(self) -> dict[str, int]:
        """Return nothing: `TextData` keeps the position. Without this method Lightning warns that a resumed epoch
        could not be continued."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take what `state_dict` gave."""


def _as_it_is(batch: Batch) -> Batch:
    return batch

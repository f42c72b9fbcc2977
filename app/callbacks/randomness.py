"""The state of every random generator, for a resume that is equal bit for bit. Lightning saves none of it."""

import random
from typing import Any

import numpy
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class RandomState(Callback):
    """Threads one random stream per rank through the training steps alone, and saves it.

    The state is taken after each training batch and put back before the next one. So nothing that happens between two
    batches (validation, samples, a loader's own draws) can shift it, and a run that stops after any batch and goes on
    in another process draws the same numbers. On another number of ranks rank 0 keeps its stream; the others start new
    ones that follow from it.
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None
        self._loaded: list[dict[str, Any]] | None = None

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_index: int) -> None:
        if self._loaded is not None:
            self._state = stream_of(trainer.global_rank, trainer.world_size, self._loaded)
            self._loaded = None
        if self._state is not None:
            restore(self._state)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_index: int
    ) -> None:
        self._state = capture()

    def state_dict(self) -> dict[str, Any]:
        """The streams of all ranks, plain values and tensors; every rank must call this."""
        own = portable(self._state or capture())
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return {"ranks": [own]}
        everyone: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, own)
        return {"ranks": everyone}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        own = capture()
        for stream in state_dict["ranks"]:
            restore(stream)  # tried before the first batch
        restore(own)
        self._loaded = state_dict["ranks"] or [own]


def capture() -> dict[str, Any]:
    """Return the state of Python's, NumPy's, torch's and (where it runs) CUDA's generator."""
    state = {"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore(state: dict[str, Any]) -> None:
    """Put back what `capture` or `portable` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    keys = keys.numpy() if isinstance(keys, Tensor) else keys
    numpy.random.set_state((kind, keys.astype(numpy.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def portable(state: dict[str, Any]) -> dict[str, Any]:
    """Return a captured state as tensors, lists, numbers and strings, which load with `weights_only=True`."""
    version, internal, gauss = state["python"]
    kind, keys, position, has_gauss, cached = state["numpy"]
    keys = keys if isinstance(keys, Tensor) else torch.from_numpy(keys.astype(numpy.int64))
    return {
        **state,
        "python": [version, list(internal), gauss],
        "numpy": [str(kind), keys, int(position), int(has_gauss), float(cached)],
    }


def stream_of(rank: int, world_size: int, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the stream of `rank` from the saved streams of all ranks of a run of possibly another size."""
    if rank < len(ranks) and (rank == 0 or world_size == len(ranks)):
        return ranks[rank]
    generator = torch.Generator()
    generator.set_state(ranks[0]["torch"])
    seed = int(torch.randint(2**31, (), generator=generator)) + rank
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    return capture()

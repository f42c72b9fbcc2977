"""Options of torch.compile: parts of a model, in place, so that the names in a state dict stay."""

import shutil
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from models.projection import softmax_error

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


class Compile(ABC):
    """A choice of what to compile."""

    @abstractmethod
    def apply(self, model: nn.Module) -> None:
        """Compile parts of `model` in place."""

    def evaluating(self, device: torch.device) -> AbstractContextManager:
        """The context in which a forward without gradients runs."""
        return nullcontext()


class CompileBlocks(Compile):
    """Compile each block of the Transformer, and the softmax of the loss; identical blocks share one compilation.

    A forward without gradients would be compiled a second time. On CPU that takes longer than the validation that it
    would speed up, so there evaluation runs the same blocks eagerly.

    Args:
        mode: torch.compile's mode.
        dynamic: whether shapes may vary without a new compilation; None lets torch find out.
        backend: torch.compile's backend; only `inductor` makes code of its own and needs a compiler.
    """

    def __init__(self, mode: Mode = "default", dynamic: bool | None = False, backend: str = "inductor") -> None:
        self.mode, self.dynamic, self.backend = mode, dynamic, backend

    def apply(self, model: nn.Module) -> None:
        if self.backend == "inductor" and not _has_compiler():
            rank_zero_warn("There is no C++ compiler here (g++ or clang++), so the blocks run without torch.compile.")
            return
        for block in model.blocks:
            block.compile(mode=self.mode, dynamic=self.dynamic, backend=self.backend)
        model.compiled_softmax_error = torch.compile(
            softmax_error, mode=self.mode, dynamic=self.dynamic, backend=self.backend
        )

    def evaluating(self, device: torch.device) -> AbstractContextManager:
        return torch.compiler.set_stance("force_eager") if device.type == "cpu" else nullcontext()


def _has_compiler() -> bool:
    return torch.cuda.is_available() or any(shutil.which(name) for name in ("g++", "clang++", "c++"))

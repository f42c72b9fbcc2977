"""fp32 buffers and sums that autocast does not round."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor

from models.linear import Drawn


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Products on `device` in the dtype of their factors; on the meta device, which has no autocast, nothing."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def exact(x: Tensor) -> Tensor:
    """x itself, or in fp32 where its dtype is a smaller one."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class ExactBuffers(Drawn):
    """A module with buffers that stay in at least fp32, whatever the dtype of the model: in bf16 small steps are lost.

    Attributes:
        exact_buffers: names of these buffers.
    """

    exact_buffers: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = {name: getattr(self, name) for name in self.exact_buffers}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if exact(moved) is not moved:
                setattr(self, name, buffer.to(moved.device))
        return self

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *arguments: Any) -> None:
        for (
            name
        ) in self.exact_buffers:  # those of an older file may be in bf16, and may take the place of the module's own
            if prefix + name in state:
                state[prefix + name] = exact(state[prefix + name])
        super()._load_from_state_dict(state, prefix, *arguments)

"""The bytes of a model against the memory of the machine, before any of them are allocated."""

import os
from collections.abc import Iterable

from torch import Tensor

from models.errors import UserError


def check_memory(tensors: Iterable[Tensor]) -> None:
    """Raise UserError where tensors on the meta device call for more bytes than this machine has."""
    check_bytes(sum(tensor.nbytes for tensor in tensors), "a model of these sizes")


def check_bytes(needed: int, what: str) -> None:
    """Raise UserError where `what` takes more bytes than this machine has."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise UserError(f"{what} takes {needed:,} bytes, and this machine has {there:,}; make it smaller")

"""Pruning methods, behind the protocol of `method.py`: importing the package registers them all."""

from compress.pruning import context  # noqa: F401
from compress.pruning.allocations import erk, owl  # noqa: F401
from compress.pruning.criteria import magnitude, wanda  # noqa: F401
from compress.pruning.method import METHODS, PruningMethod
from compress.pruning.solvers import sparsegpt, swaps  # noqa: F401
from compress.pruning.structured import sequential  # noqa: F401

__all__ = ["METHODS", "PruningMethod"]

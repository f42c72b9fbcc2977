"""Imports every mechanism of the package, so that the registries (models/specs.py) know it by name."""

from models import attention, depth, experts, feedforward, norms, positions

__all__ = ["attention", "depth", "experts", "feedforward", "norms", "positions"]

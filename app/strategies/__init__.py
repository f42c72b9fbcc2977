"""Strategies over devices, and the format of checkpoints on disk."""

from app.strategies.checkpoint_io import WholeCheckpoints
from app.strategies.fsdp import FSDP2

__all__ = ["FSDP2", "WholeCheckpoints"]

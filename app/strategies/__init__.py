"""How a run is spread over devices and how its checkpoints reach the disk."""

from app.strategies.checkpoint_io import WholeCheckpoints
from app.strategies.fsdp import FSDP2

__all__ = ["FSDP2", "WholeCheckpoints"]

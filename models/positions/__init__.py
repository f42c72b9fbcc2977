"""Position encodings, one a file. A spec's `level` says where it acts: on the embeddings (`input`) or in attention."""

from models.positions.learned import Learned
from models.positions.none import NoPosition
from models.positions.protocol import POSITIONS, Positional
from models.positions.rope import Rope

__all__ = ["POSITIONS", "Learned", "NoPosition", "Positional", "Rope"]

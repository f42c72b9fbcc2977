"""Position encodings, one a file. A spec's `acts` says where it acts: on the embeddings (`input`), by `rotation` of
queries and keys, on the `scores` of all queries alike, on those that the `queries` read each for itself, or `nothing`;
its other defaults are in `PositionSpec` (models/specs.py)."""

from models.positions.alibi import Alibi
from models.positions.learned import Learned
from models.positions.none import NoPosition
from models.positions.protocol import Position, Positional
from models.positions.rope import Rope
from models.positions.shaw import Shaw
from models.positions.sinusoidal import Sinusoidal
from models.positions.t5 import T5
from models.positions.transformer_xl import TransformerXl

__all__ = [
    "T5",
    "Alibi",
    "Learned",
    "NoPosition",
    "Position",
    "Positional",
    "Rope",
    "Shaw",
    "Sinusoidal",
    "TransformerXl",
]

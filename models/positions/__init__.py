"""Position encodings, one a file. A spec's `acts` says where it acts: on the embeddings (`input`), by `rotation` of
queries and keys, on the `scores`, or `nothing`; `per_head` whether each query head has numbers of its own; `bounded`
whether they end at the context length."""

from models.positions.alibi import Alibi
from models.positions.learned import Learned
from models.positions.none import NoPosition
from models.positions.protocol import POSITIONS, Positional
from models.positions.rope import Rope
from models.positions.sinusoidal import Sinusoidal
from models.positions.t5 import T5

__all__ = ["POSITIONS", "T5", "Alibi", "Learned", "NoPosition", "Positional", "Rope", "Sinusoidal"]

"""Attention mechanisms, one a file, behind the protocol of `protocol.py`."""

from models.attention.bigbird import BigBird
from models.attention.convolution import Convolution
from models.attention.fixed import Fixed
from models.attention.full import Full
from models.attention.hierarchical import Hierarchical
from models.attention.linformer import Linformer
from models.attention.longformer import Longformer
from models.attention.lsh import Lsh
from models.attention.protocol import Attention, Context
from models.attention.recursive import Recursive
from models.attention.retention import Retention
from models.attention.selective import Selective
from models.attention.single_heads import SingleHeads
from models.attention.strided import Strided
from models.attention.top_k import TopK
from models.attention.transient import Transient
from models.attention.window import Window

__all__ = [
    "Attention",
    "BigBird",
    "Context",
    "Convolution",
    "Fixed",
    "Full",
    "Hierarchical",
    "Linformer",
    "Longformer",
    "Lsh",
    "Recursive",
    "Retention",
    "Selective",
    "SingleHeads",
    "Strided",
    "TopK",
    "Transient",
    "Window",
]

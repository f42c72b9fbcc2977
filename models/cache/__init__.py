"""Key/value caches, one a file; `ModelCache` holds those of all sub-layers and what they share."""

from models.cache.anchored import Anchored, AnchoredCache
from models.cache.contiguous import ContiguousCache
from models.cache.model import ModelCache
from models.cache.paged import PagedCache
from models.cache.protocol import BlockCache, Kept, KeyValueCache, LayerCache
from models.cache.recurrent import RecurrentCache, beginnings
from models.cache.rolling import RollingCache
from models.cache.rows import PAD, Rows
from models.cache.selective import Remembered, SelectiveCache
from models.cache.summaries import Entries, SummaryCache, Tail
from models.cache.transient_global import TransientCache

__all__ = [
    "PAD",
    "Anchored",
    "AnchoredCache",
    "BlockCache",
    "ContiguousCache",
    "Entries",
    "Kept",
    "KeyValueCache",
    "LayerCache",
    "ModelCache",
    "PagedCache",
    "RecurrentCache",
    "Remembered",
    "RollingCache",
    "Rows",
    "SelectiveCache",
    "SummaryCache",
    "Tail",
    "TransientCache",
    "beginnings",
]

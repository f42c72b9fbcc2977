"""Key/value caches, one a file; `ModelCache` holds one per attention layer and what they share."""

from models.cache.contiguous import ContiguousCache
from models.cache.model import ModelCache

__all__ = ["ContiguousCache", "ModelCache"]

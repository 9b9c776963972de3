"""Which node leaves a tier next: one policy object per tier, by the name in ``CacheConfig.eviction_policy``."""

from jaxkv.cache.eviction.arc import ARC
from jaxkv.cache.eviction.base import EvictionPolicy
from jaxkv.cache.eviction.lfu import LFU
from jaxkv.cache.eviction.lru import LRU

POLICIES: dict[str, type[EvictionPolicy]] = {"lfu": LFU, "lru": LRU, "arc": ARC}

__all__ = ["ARC", "LFU", "LRU", "POLICIES", "EvictionPolicy"]

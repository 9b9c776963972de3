"""Which node leaves a tier next: one policy object per tier, by the name in ``CacheConfig.eviction_policy``."""

from jaxkv.cache.eviction.arc import ARC
from jaxkv.cache.eviction.base import Entry, EvictionPolicy, Point
from jaxkv.cache.eviction.decayed import DecayedLFU, PlainLFU
from jaxkv.cache.eviction.gdsf import GDSF
from jaxkv.cache.eviction.lfu import LFU
from jaxkv.cache.eviction.lru import LRU
from jaxkv.cache.eviction.two_queue import TwoQueue

POLICIES: dict[str, type[EvictionPolicy]] = {"lfu": LFU, "lru": LRU, "lfu-plain": PlainLFU, "lfu-decayed": DecayedLFU,
                                             "arc": ARC, "2q": TwoQueue, "gdsf": GDSF}

__all__ = ["ARC", "GDSF", "LFU", "LRU", "POLICIES", "DecayedLFU", "Entry", "EvictionPolicy", "PlainLFU", "Point",
           "TwoQueue"]

"""Least recently used: by the last hit, or the moment the last running user left."""

from __future__ import annotations

from itertools import count
from typing import final

from jaxkv.cache.eviction.base import Candidates, Entry, EvictionPolicy


@final
class LRU(EvictionPolicy):
    """Recency by a logical counter."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._order = Candidates(count(1))
        self._tick = 0

    def _use(self, entry: Entry) -> None:
        self._tick += 1
        entry.rank = self._tick

    def _enter(self, key: bytes, entry: Entry, heat: float | None) -> None:
        self._use(entry)

    def _leave(self, key: bytes, entry: Entry) -> float:
        return 0.0

    def _candidates(self, entry: Entry) -> Candidates:
        return self._order

    def rest(self, key: bytes) -> None:
        self._use(self._entries[key])

    def victim(self) -> bytes | None:
        return self._order.peek()

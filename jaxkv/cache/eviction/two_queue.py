"""2Q (Johnson and Shasha, VLDB 1994), with nodes of several pages.

New KV waits in A1in, first in first out; digests that leave it are remembered in A1out; KV that comes back from there
enters Am, least recently used. A1in may hold a quarter of the tier, A1out remembers half a tier of pages, as the paper
says. A hit in A1in moves nothing. When one list has nothing that may leave, the other gives.

Token hit rate in % at 1, 5, 10, 25, 50 % of the distinct blocks of two traces (``bench.replay``):
    chat 6.1 17.9 25.3 35.3 36.7   agent 16.8 75.3 89.8 95.3 96.2
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from jaxkv.cache.eviction.base import Candidates, Entry, EvictionPolicy
from jaxkv.cache.eviction.ghosts import Ghosts


@final
class TwoQueue(EvictionPolicy):
    """First in first out for what was used once, recency for what came back."""

    def __init__(self, capacity: int, above: EvictionPolicy | None = None) -> None:
        super().__init__(capacity, above)
        self._main = Candidates(self._serials)  # Am; A1in is _order
        self._ghosts = Ghosts()
        self._probation = 0  # pages of A1in
        self._tick = 0

    def _stamp(self, entry: Entry) -> None:
        self._tick += 1
        entry.rank = self._tick

    def _enter(self, key: bytes, entry: Entry, digests: Sequence[bytes]) -> None:
        entry.seen = key in self._ghosts
        if entry.seen:
            self._ghosts.pop(key)
        self._arrive(key, entry)

    def _arrive(self, key: bytes, entry: Entry) -> None:
        self._stamp(entry)
        self._probation += 0 if entry.seen else entry.pages

    def _use(self, entry: Entry) -> None:
        if entry.seen:
            self._stamp(entry)

    def rest(self, key: bytes) -> None:
        """A path is released from its end on, and so it is to leave; in A1in its first release counts."""
        entry = self._entries[key]
        if entry.seen or not entry.level:
            entry.level = 1.0
            self._stamp(entry)

    def _leave(self, key: bytes, entry: Entry) -> None:
        if entry.seen:
            return
        self._probation -= entry.pages
        if key in self._ghosts:  # a split may have made a node of a remembered digest
            self._ghosts.pop(key)
        self._ghosts.put(key, entry.pages)
        while self._ghosts.pages > self.capacity // 2 and len(self._ghosts):
            self._ghosts.pop_oldest()

    def extend(self, key: bytes, digests: Sequence[bytes]) -> None:
        super().extend(key, digests)
        self._probation += 0 if self._entries[key].seen else len(digests)

    def _list(self, entry: Entry) -> Candidates:
        return self._main if entry.seen else self._order

    def _next(self) -> tuple[bytes, Entry] | None:
        first, second = self._order, self._main
        if 4 * self._probation <= self.capacity:
            first, second = second, first
        return first.peek() or second.peek()

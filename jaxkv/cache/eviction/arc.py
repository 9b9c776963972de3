"""Adaptive replacement cache (Megiddo and Modha, FAST 2003), with nodes of several pages.

T1 holds nodes used once, T2 those used again, each by recency; B1 and B2 remember the digests that left them. A node
that comes back through B1 says T1 was too small, through B2 that T2 was: the target share of T1 moves by its pages.
Ghosts are bounded as in the paper, in pages: |T1| + |B1| <= c and |T1| + |T2| + |B1| + |B2| <= 2c. Unlike the paper,
the store asks for room when it wants to, and pinned nodes cannot leave: then the other list gives.

Token hit rate in % at 1, 5, 10, 25, 50 % of the distinct blocks of two traces (``bench.replay``):
    chat 6.4 20.7 28.7 33.9 36.5   agent 17.8 76.0 90.2 95.1 96.1
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from jaxkv.cache.eviction.base import Candidates, Entry, EvictionPolicy
from jaxkv.cache.eviction.ghosts import Ghosts


@final
class ARC(EvictionPolicy):
    """Balances recency and frequency by what came back too late."""

    def __init__(self, capacity: int, above: EvictionPolicy | None = None) -> None:
        super().__init__(capacity, above)
        self._orders = (self._order, Candidates(self._serials))  # T1, T2
        self._pages = [0, 0]
        self._ghosts = (Ghosts(), Ghosts())  # B1, B2
        self._target = 0.0  # pages that T1 should have
        self._tick = 0

    def _stamp(self, entry: Entry) -> None:
        self._tick += 1
        entry.rank = self._tick

    def _enter(self, key: bytes, entry: Entry, digests: Sequence[bytes]) -> None:
        self._arrive(key, entry)

    def _arrive(self, key: bytes, entry: Entry) -> None:
        self._stamp(entry)
        once, again = self._ghosts
        if key in once:
            step = entry.pages * max(1.0, again.pages / once.pages)
            self._target = min(float(self.capacity), self._target + step)
            once.pop(key)
            entry.seen = True
        elif key in again:
            step = entry.pages * max(1.0, once.pages / again.pages)
            self._target = max(0.0, self._target - step)
            again.pop(key)
            entry.seen = True
        self._pages[entry.seen] += entry.pages
        self._trim()

    def _use(self, entry: Entry) -> None:
        self._stamp(entry)
        self._pages[entry.seen] -= entry.pages
        entry.seen = True
        self._pages[1] += entry.pages

    def _leave(self, key: bytes, entry: Entry) -> None:
        self._pages[entry.seen] -= entry.pages
        for ghosts in self._ghosts:  # a split may have made a node of a remembered digest
            if key in ghosts:
                ghosts.pop(key)
        self._ghosts[entry.seen].put(key, entry.pages)
        self._trim()

    def _trim(self) -> None:
        once, again = self._ghosts
        while len(once) and self._pages[0] + once.pages > self.capacity:
            once.pop_oldest()
        while len(again) and sum(self._pages) + once.pages + again.pages > 2 * self.capacity:
            again.pop_oldest()

    def _list(self, entry: Entry) -> Candidates:
        return self._orders[entry.seen]

    def extend(self, key: bytes, digests: Sequence[bytes]) -> None:
        super().extend(key, digests)
        self._pages[self._entries[key].seen] += len(digests)
        self._trim()

    def rest(self, key: bytes) -> None:
        self._stamp(self._entries[key])

    def _next(self) -> tuple[bytes, Entry] | None:
        once, again = (order.peek() for order in self._orders)
        if once is None or again is None:
            return again if once is None else once
        return once if self._pages[0] > self._target else again

"""Adaptive replacement cache (Megiddo and Modha, FAST 2003), with nodes of several pages.

T1 holds nodes used once, T2 those used again, each by recency; B1 and B2 remember the digests that left them. A node
that comes back through B1 says T1 was too small, through B2 that T2 was: the target share of T1 moves by its pages.
Ghosts are bounded as in the paper, in pages: |T1| + |B1| <= c and |T1| + |T2| + |B1| + |B2| <= 2c. Unlike the paper,
the store asks for room when it wants to, and pinned nodes cannot leave: then the other list gives.
"""

from __future__ import annotations

from itertools import count
from typing import final

from jaxkv.cache.eviction.base import Candidates, Entry, EvictionPolicy


class _Ghosts:
    """Digests that left, oldest first, with their pages."""

    def __init__(self) -> None:
        self.pages = 0
        self._sizes: dict[bytes, int] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def put(self, key: bytes, pages: int) -> None:
        self.pages += pages
        self._sizes[key] = pages

    def pop(self, key: bytes) -> None:
        self.pages -= self._sizes.pop(key)

    def pop_oldest(self) -> None:
        self.pop(next(iter(self._sizes)))


@final
class ARC(EvictionPolicy):
    """Balances recency and frequency by what came back too late."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        serials = count(1)
        self._orders = (Candidates(serials), Candidates(serials))  # T1, T2
        self._pages = [0, 0]
        self._ghosts = (_Ghosts(), _Ghosts())  # B1, B2
        self._target = 0.0  # pages that T1 should have
        self._tick = 0

    def _stamp(self, entry: Entry) -> None:
        self._tick += 1
        entry.rank = self._tick

    def _enter(self, key: bytes, entry: Entry, heat: float | None) -> None:
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
        else:
            entry.seen = heat is not None and heat >= 1.0
        self._pages[entry.seen] += entry.pages
        self._trim()

    def _use(self, entry: Entry) -> None:
        self._stamp(entry)
        self._pages[entry.seen] -= entry.pages
        entry.seen = True
        self._pages[1] += entry.pages

    def _leave(self, key: bytes, entry: Entry) -> float:
        self._pages[entry.seen] -= entry.pages
        for ghosts in self._ghosts:  # a split may have made a node of a remembered digest
            if key in ghosts:
                ghosts.pop(key)
        self._ghosts[entry.seen].put(key, entry.pages)
        self._trim()
        return float(entry.seen)

    def _trim(self) -> None:
        once, again = self._ghosts
        while len(once) and self._pages[0] + once.pages > self.capacity:
            once.pop_oldest()
        while len(again) and sum(self._pages) + once.pages + again.pages > 2 * self.capacity:
            again.pop_oldest()

    def _candidates(self, entry: Entry) -> Candidates:
        return self._orders[entry.seen]

    def extend(self, key: bytes, pages: int) -> None:
        super().extend(key, pages)
        self._pages[self._entries[key].seen] += pages
        self._trim()

    def rest(self, key: bytes) -> None:
        self._stamp(self._entries[key])

    def victim(self) -> bytes | None:
        once, again = (order.peek() for order in self._orders)
        if once is None or again is None:
            return again if once is None else once
        return once if self._pages[0] > self._target else again

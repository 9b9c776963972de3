"""What is kept and brought for sequences that still wait, so that their prefixes are there when they enter.

Owns which waiting sequences hold something, and gives it back when those who run need the room. What is brought, and
whether that is worth it, is the cache's business.
"""

from __future__ import annotations

from operator import attrgetter

from jaxkv.cache.controller import CacheController
from jaxkv.sched.capacity import pages_needed
from jaxkv.sequence import Sequence
from jaxkv.types import Arrival

LOOKAHEAD = 8  # first waiting sequences whose pages are kept and brought although they cannot enter yet
_key = attrgetter("key")


class Lookahead:
    """Prefetch for the head of the waiting queue. ``budget``: tokens of one step."""

    def __init__(self, cache: CacheController, budget: int) -> None:
        self._cache = cache
        self._budget = budget
        self._ahead: dict[str, Sequence] = {}  # waiting ones that something is kept for, by request id
        self._full = False  # a prefix did not fit; none is brought until there may be more room
        self._now = 0.0  # time of the plan under construction

    def begin(self, now: float) -> None:
        """A plan begins."""
        self._now = now

    def room_may_have_grown(self) -> None:
        self._full = False

    def keep(self, waiting: list[Sequence], plan_id: int) -> None:
        """Keep what HBM and host hold of the first sequences' prefixes: bringing one must not push out the next."""
        for seq in waiting[:LOOKAHEAD] if len(waiting) > 1 else ():
            if not seq.kept:
                seq.kept = True
                if self._cache.keep(seq, plan_id):
                    self._ahead[seq.request.id] = seq

    def awaits_pages(self, seq: Sequence, plan_id: int, running: int) -> bool:
        """Whether pages of a waiting sequence's prefix are on their way; asks for them once there is room."""
        if not seq.looked_up and not self._full:
            while (brought := self._prefetch(seq, plan_id, running)) is None and self.give_way(seq.key):
                pass
            seq.looked_up = brought is not None
            self._full = brought is None
            if brought:
                self._ahead[seq.request.id] = seq
                seq.asked = self._now
        return any(not load.done for load in seq.waits)

    def _prefetch(self, seq: Sequence, plan_id: int, running: int) -> bool | None:
        cache = self._cache
        most = [pages_needed(group, cache.page_size, len(seq.tokens), self._budget) for group in cache.groups]
        spare = [running + sum(other.rest[g] for other in self._ahead.values() if other.rest)
                 for g in range(len(cache.groups))]
        return cache.prefetch(seq, plan_id, most, spare)

    def enter(self, seq: Sequence) -> None:
        """The sequence enters a slot."""
        self.start_over(seq)
        seq.admitted = seq.admitted or self._now
        if seq.asked is not None:
            self._cache.stats.page_waits += 1
            self._cache.stats.page_wait_seconds += self._now - seq.asked
            seq.page_wait += self._now - seq.asked
            seq.asked = None

    def start_over(self, seq: Sequence) -> None:
        """Nothing is known of what was kept or brought for the sequence."""
        seq.looked_up = seq.kept = False
        seq.brought = {}

    def leave(self, seq: Sequence) -> None:
        """The sequence holds its prefix itself, or goes on without what was brought for it."""
        if self._ahead.pop(seq.request.id, None):
            self._cache.leave(seq)
            seq.rest = []

    def give_way(self, key: tuple[float, ...] = ()) -> bool:
        """Let go of what is kept for the last waiting sequence after ``key``; False if there is none."""
        last = max(self._ahead.values(), key=_key, default=None)
        if last is None or last.key <= key:
            return False
        self.leave(last)
        return True

    def cancel(self) -> bool:
        """Give up pages on their way, so that those who run never wait for room; False if there are none."""
        if not self._cache.cancel():
            return False
        self._bury()
        return True

    def arrived(self, arrival: Arrival) -> None:
        """A fetch ended. Sequences whose pages will not come go without them."""
        if not self._cache.arrived(arrival):
            self._bury()

    def lose_host_tier(self) -> None:
        """Go on without the host tier, whose pages are lost."""
        self._cache.lose_host_tier()
        self._bury()

    def _bury(self) -> None:
        for seq in list(self._ahead.values()):
            if any(load.failed for load in seq.waits):
                self.leave(seq)
                seq.brought = {}
        self._cache.bury()

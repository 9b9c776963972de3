"""Who waits, who runs, and in which slot.

Owns both orders, the slots, and what goes along when a sequence changes its place: pages are released, what was kept for
one that waited is let go, siblings do not wait for one that is gone. Decides nothing: who enters and who is preempted is the
planner's business, who ends the Scheduler's.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from heapq import heappop, heappush
from itertools import pairwise
from operator import attrgetter

from jaxkv.cache.controller import CacheController
from jaxkv.sched.lookahead import Lookahead
from jaxkv.sched.policy import SchedulerPolicy
from jaxkv.sched.siblings import Siblings
from jaxkv.sequence import Sequence, Status
from jaxkv.types import Request

_key = attrgetter("key")


class Roster:
    """Every sequence that has not ended. Only the methods change what the attributes hold, but for ``stuck``."""

    def __init__(self, cache: CacheController, lookahead: Lookahead, policy: SchedulerPolicy, num_slots: int) -> None:
        self.sequences: dict[str, Sequence] = {}  # by request id
        self.waiting: list[Sequence] = []  # by key
        self.running: list[Sequence] = []  # by key
        self.slots = list(range(num_slots))  # free ones, a heap
        self.siblings = Siblings()
        self.stuck: Sequence | None = None  # did not fit; not tried again until a sequence is released
        self.num_preemptions = 0
        self._cache, self._lookahead, self._policy = cache, lookahead, policy
        self._num_slots = num_slots
        self._num_added = 0

    def add(self, request: Request) -> None:
        """A new sequence waits."""
        seq = Sequence(request, list(request.prompt))
        seq.key = (*self._policy.key(seq), self._num_added)
        self._num_added += 1
        self.sequences[request.id] = seq
        insort(self.waiting, seq, key=_key)
        if self._cache.enable_prefix_caching:
            self.siblings.add(request)

    def enter(self, seq: Sequence) -> None:
        """A waiting sequence, which holds its pages, takes the lowest free slot."""
        _remove(self.waiting, seq)
        seq.slot = heappop(self.slots)
        seq.status = Status.RUNNING
        self._lookahead.enter(seq)
        insort(self.running, seq, key=_key)

    def preempt(self, seq: Sequence) -> None:
        """A running sequence waits again."""
        self._leave(seq, ended=False)
        seq.status = Status.WAITING
        insort(self.waiting, seq, key=_key)
        self.num_preemptions += 1
        self.siblings.gone(seq.request)

    def end(self, seq: Sequence, reason: str) -> None:
        """A sequence is done, or is given up wherever it is."""
        if seq.status is Status.RUNNING:
            self._leave(seq, ended=True)
        else:
            _remove(self.waiting, seq)
            self._lookahead.leave(seq)
            self.unblock()
        seq.status = Status.FINISHED
        seq.finish_reason = reason
        del self.sequences[seq.request.id]
        self.siblings.gone(seq.request)

    def _leave(self, seq: Sequence, ended: bool) -> None:
        """Give up slot and pages; the pages stay in the trie for whoever needs their contents next."""
        _remove(self.running, seq)
        self._cache.release(seq, ended)
        heappush(self.slots, seq.slot)
        seq.slot = -1
        seq.num_scheduled = 0
        self.unblock()

    def unblock(self) -> None:
        """There may be more room: who did not fit is tried again."""
        self.stuck = None
        self._lookahead.room_may_have_grown()

    def check(self) -> None:
        """Assert that every sequence is in exactly one place and every slot and page is accounted for."""
        for order, status in ((self.waiting, Status.WAITING), (self.running, Status.RUNNING)):
            assert all(a.key < b.key for a, b in pairwise(order)), "out of order"
            assert all(seq.status is status and self.sequences[seq.request.id] is seq for seq in order)
        assert len(self.waiting) + len(self.running) == len(self.sequences), "a sequence is nowhere"
        assert all(seq.slot < 0 for seq in self.waiting)
        assert sorted([*self.slots, *(seq.slot for seq in self.running)]) == list(range(self._num_slots)), "slots"
        self._cache.check(self.running)


def _remove(order: list[Sequence], seq: Sequence) -> None:
    index = bisect_left(order, seq.key, key=_key)
    assert order[index] is seq
    del order[index]

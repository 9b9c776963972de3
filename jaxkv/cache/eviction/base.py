"""The contract of an eviction policy, and the bookkeeping that all policies share.

A policy ranks the nodes of one tier. It knows path digests, sizes in pages and depths, nothing else: no node and no page
number. The store tells it what happens to nodes and which of them may leave now (*offered*: nobody uses them and nothing
hangs below them in the tier); the policy answers ``victim``. Ranks only change when the node itself is told something, so
a heap with lazy deletion finds the victim in O(log n). Ties: deepest first, then first offered.

Hints stand above every ranking: nodes of a session that has ended leave before all others, nodes to be retained leave
after all others until their time is over (the only thing here that knows a clock). A use takes an end back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import count
from typing import NamedTuple


class Entry:
    """What a policy knows of one node. It goes with the node from tier to tier."""

    __slots__ = ("pages", "depth", "rank", "offer", "worth", "ended", "until", "seen", "level", "levels", "clock", "digests",
                 "sampled")

    def __init__(self, pages: int, depth: int, worth: int) -> None:
        self.pages = pages
        self.depth = depth  # position of the first token
        self.rank = 0.0  # smallest leaves first
        self.offer = 0  # serial number of the valid heap item, 0: not offered
        self.worth = worth  # log2 of what its last use counts, compared with others
        self.ended = False  # by hint: nobody comes back for it
        self.until = 0.0  # by hint: retained up to this time, seconds on the injected clock
        self.seen = False  # used again since it came (ARC, 2Q)
        self.level = 0.0  # a policy's own measure of its uses
        self.levels: list[tuple[int, float]] = []  # (first index, log2 of the decayed number of uses) of its parts (LFU)
        self.clock = 0.0  # pages inserted before its last use (LFU)
        self.digests: list[bytes] = []  # one per page (LFU)
        self.sampled: list[tuple[int, bytes]] = []  # (index in the node, digest) of pages that shadows follow (LFU)

    def low_part(self, pages: int, depth: int) -> Entry:
        """Cut off the last ``pages`` pages; their entry, not offered."""
        low = Entry(pages, depth, self.worth)
        self.pages -= pages
        low.rank, low.ended, low.until, low.seen = self.rank, self.ended, self.until, self.seen
        low.level, low.clock = self.level, self.clock
        if self.levels:
            last = max(i for i, _ in self.levels if i <= self.pages)
            low.levels = [(max(0, i - self.pages), level) for i, level in self.levels if i >= last]
            self.levels = [item for item in self.levels if item[0] < self.pages]
        low.digests = self.digests[self.pages:]
        del self.digests[self.pages:]
        if self.sampled:
            low.sampled = [(i - self.pages, digest) for i, digest in self.sampled if i >= self.pages]
            self.sampled = [item for item in self.sampled if item[0] < self.pages]
        return low


class Candidates:
    """Offered nodes, smallest rank on top; outdated heap items are skipped when they surface.

    Lists that an entry can change between, those of another tier too, share one ``serials`` counter, so that an item is
    valid in one list only.
    """

    def __init__(self, serials: Iterator[int]) -> None:
        self._heap: list[tuple[float, int, int, bytes, Entry]] = []
        self._serials = serials
        self._offered = 0

    def push(self, key: bytes, entry: Entry, rank: float) -> None:
        """Offer a node, or rank an offered one anew."""
        self._offered += not entry.offer
        entry.offer = next(self._serials)
        heappush(self._heap, (rank, -entry.depth, entry.offer, key, entry))
        self._tidy()

    def discard(self, entry: Entry) -> None:
        self._offered -= bool(entry.offer)
        entry.offer = 0
        self._tidy()

    def _tidy(self) -> None:
        if len(self._heap) > 2 * self._offered + 64:
            self._heap = [item for item in self._heap if item[4].offer == item[2]]
            heapify(self._heap)

    def peek(self) -> tuple[bytes, Entry] | None:
        """The node that leaves first, or None."""
        heap = self._heap
        while heap and heap[0][4].offer != heap[0][2]:
            heappop(heap)
        return heap[0][3:] if heap else None


class Point(NamedTuple):
    """Of a curve: ``capacity`` in pages of this tier and those above, ``hit_rate`` of page reads in 0..1."""

    capacity: int
    hit_rate: float


class EvictionPolicy(ABC):
    """Ranks the nodes of one tier of ``capacity`` pages. Every key passed was added and not removed since.

    ``above``: the policy of the tier above, of the same class; it sees every use, the lower ones only what moves.
    """

    def __init__(self, capacity: int, above: EvictionPolicy | None = None) -> None:
        self.capacity = max(1, capacity)
        self._entries: dict[bytes, Entry] = {}
        self._serials: Iterator[int] = above._serials if above else count(1)  # entries go from tier to tier
        self._now = 0.0  # seconds
        self._ended = Candidates(self._serials)
        self._retained = Candidates(self._serials)  # by the end of retention
        self._order = Candidates(self._serials)  # the only list of most policies

    # ---- what a policy decides

    @abstractmethod
    def _enter(self, key: bytes, entry: Entry, digests: Sequence[bytes]) -> None:
        """Rank the entry of new KV with these page digests."""

    @abstractmethod
    def _arrive(self, key: bytes, entry: Entry) -> None:
        """Rank an entry that comes from another tier."""

    @abstractmethod
    def _use(self, entry: Entry) -> None:
        """Rank an entry that was hit."""

    @abstractmethod
    def rest(self, key: bytes) -> None:
        """The last running user of a node that is not offered left. It may count as recency, never as a hit."""

    def _leave(self, key: bytes, entry: Entry) -> None:  # noqa: B027  most policies keep no history
        """Forget an entry, or move it to the history."""

    def _list(self, entry: Entry) -> Candidates:
        """The list that ``entry`` is offered in when no hint stands above its rank."""
        return self._order

    def _next(self) -> tuple[bytes, Entry] | None:
        """The offered node that leaves first by rank. Changes nothing."""
        return self._order.peek()

    # ---- what happens to nodes

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    @property
    def num_nodes(self) -> int:
        """Nodes of the tier."""
        return len(self._entries)

    def add(self, key: bytes, digests: Sequence[bytes], depth: int, worth: int = 0) -> None:
        """New KV enters the tier: a node of one page per digest. ``worth``: log2 of what this use counts."""
        entry = self._entries[key] = Entry(len(digests), depth, worth)
        self._enter(key, entry, digests)

    def arrive(self, key: bytes, entry: Entry) -> None:
        """A node comes from another tier, whose ``remove`` returned the entry."""
        self._entries[key] = entry
        self._arrive(key, entry)

    def extend(self, key: bytes, digests: Sequence[bytes]) -> None:
        """New pages at the end of a node."""
        self._entries[key].pages += len(digests)

    def touch(self, key: bytes, worth: int = 0) -> None:
        """A request hit the node."""
        entry = self._entries[key]
        offered = entry.offer
        if offered:
            self._candidates(entry).discard(entry)
        entry.worth, entry.ended = worth, False
        self._use(entry)
        if offered:
            self._push(key, entry)

    def split(self, key: bytes, low: bytes, pages: int, depth: int) -> None:
        """The last ``pages`` pages of ``key`` become the node ``low``, which inherits rank and offer."""
        high = self._entries[key]
        entry = self._entries[low] = high.low_part(pages, depth)
        if high.offer:
            self._candidates(high).discard(high)
            self._push(low, entry)

    def remove(self, key: bytes) -> Entry:
        """The node leaves the tier. Returns what is known of it, for the tier that it enters."""
        entry = self._entries.pop(key)
        self._candidates(entry).discard(entry)
        self._leave(key, entry)
        return entry

    def offer(self, key: bytes) -> None:
        """The node may leave from now on. Offering twice is allowed."""
        entry = self._entries[key]
        if not entry.offer:
            self._push(key, entry)

    def withdraw(self, key: bytes) -> None:
        """The node may not leave."""
        entry = self._entries[key]
        self._candidates(entry).discard(entry)

    def victim(self) -> bytes | None:
        """The offered node that leaves first; None if none is offered. Changes nothing but the place of nodes whose
        retention is over."""
        self._release_retained()
        found = self._ended.peek() or self._next() or self._retained.peek()
        return found and found[0]

    def tail(self, key: bytes) -> int:
        """Pages at the end of the node that its rank speaks for: the victim leaves in such parts."""
        return self._entries[key].pages

    # ---- hints

    def end(self, key: bytes) -> None:
        """Nobody comes back for the node, as far as is known: it leaves first, until it is used again."""
        self._hint(key, True, 0.0)

    def is_over(self, key: bytes) -> bool:
        """Whether ``end`` was said of the node and nobody has used it since."""
        return self._entries[key].ended

    def retain(self, key: bytes, until: float) -> None:
        """The node leaves last up to time ``until``, seconds on the clock of ``tick``."""
        entry = self._entries[key]
        self._hint(key, entry.ended, max(entry.until, until))

    def tick(self, now: float) -> None:
        """Time passes; seconds, never backwards."""
        self._now = now

    def _hint(self, key: bytes, ended: bool, until: float) -> None:
        entry = self._entries[key]
        offered = entry.offer
        self._candidates(entry).discard(entry)
        entry.ended, entry.until = ended, until
        if offered:
            self._push(key, entry)

    def _release_retained(self) -> None:
        while (first := self._retained.peek()) and first[1].until <= self._now:
            self._retained.discard(first[1])
            first[1].until = 0.0
            self._push(*first)

    def _candidates(self, entry: Entry) -> Candidates:
        """The list that ``entry`` is offered in. ``until`` is put back to 0 when it is over, never by time alone."""
        return self._ended if entry.ended else self._retained if entry.until else self._list(entry)

    def _push(self, key: bytes, entry: Entry) -> None:
        self._candidates(entry).push(key, entry, entry.until if entry.until and not entry.ended else entry.rank)

    # ---- what is there to know

    def curve(self) -> list[Point]:
        """Hit rates that other capacities would give, by the shadows of a policy that has any; its own comes first."""
        return []

    def offered(self) -> dict[bytes, int]:
        """Pages of every offered node. O(n): for integrity checks."""
        return {key: entry.pages for key, entry in self._entries.items() if entry.offer}

    def sizes(self) -> dict[bytes, int]:
        """Pages of every node. O(n): for integrity checks."""
        return {key: entry.pages for key, entry in self._entries.items()}

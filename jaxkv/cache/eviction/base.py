"""The contract of an eviction policy, and the bookkeeping that all policies share.

A policy ranks the nodes of one tier. It knows path digests, sizes in pages and depths, nothing else: no node, no page
number, no wall clock. The store tells it what happens to nodes and which of them may leave now (*offered*: nobody uses
them and nothing hangs below them in the tier); the policy answers ``victim``. Ranks only change when the node itself is
told something, so a heap with lazy deletion finds the victim in O(log n). Ties: deepest first, then first offered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from heapq import heapify, heappop, heappush


class Entry:
    """What a policy knows of one node."""

    __slots__ = ("pages", "depth", "rank", "seen", "offer")

    def __init__(self, pages: int, depth: int) -> None:
        self.pages = pages
        self.depth = depth  # position of the first token
        self.rank = 0.0  # smallest leaves first
        self.seen = False  # used again since it came (ARC)
        self.offer = 0  # serial number of the valid heap item, 0: not offered


class Candidates:
    """Offered nodes, smallest rank on top; outdated heap items are skipped when they surface.

    Lists that an entry can change between share one ``serials`` counter, so that an item is valid in one list only.
    """

    def __init__(self, serials: Iterator[int]) -> None:
        self._heap: list[tuple[float, int, int, bytes, Entry]] = []
        self._serials = serials
        self._offered = 0

    def push(self, key: bytes, entry: Entry) -> None:
        """Offer a node, or rank an offered one anew."""
        self._offered += not entry.offer
        entry.offer = next(self._serials)
        heappush(self._heap, (entry.rank, -entry.depth, entry.offer, key, entry))
        if len(self._heap) > 2 * self._offered + 64:
            self._heap = [item for item in self._heap if item[4].offer == item[2]]
            heapify(self._heap)

    def discard(self, entry: Entry) -> None:
        self._offered -= bool(entry.offer)
        entry.offer = 0

    def peek(self) -> bytes | None:
        """The node that leaves first, or None."""
        heap = self._heap
        while heap and heap[0][4].offer != heap[0][2]:
            heappop(heap)
        return heap[0][3] if heap else None


class EvictionPolicy(ABC):
    """Ranks the nodes of one tier of ``capacity`` pages. Every key passed was added and not removed since."""

    def __init__(self, capacity: int) -> None:
        self.capacity = max(1, capacity)
        self._entries: dict[bytes, Entry] = {}

    # ---- what a policy decides

    @abstractmethod
    def _enter(self, key: bytes, entry: Entry, heat: float | None) -> None:
        """Rank a new entry."""

    @abstractmethod
    def _use(self, entry: Entry) -> None:
        """Rank an entry that was hit."""

    @abstractmethod
    def _leave(self, key: bytes, entry: Entry) -> float:
        """Forget an entry, or move it to the history; its heat."""

    @abstractmethod
    def _candidates(self, entry: Entry) -> Candidates:
        """The list that ``entry`` is offered in."""

    @abstractmethod
    def victim(self) -> bytes | None:
        """The offered node that leaves first; None if none is offered. Changes nothing."""

    @abstractmethod
    def rest(self, key: bytes) -> None:
        """The last running user of a node that is not offered left. It may count as recency, never as a hit."""

    # ---- what happens to nodes

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def add(self, key: bytes, pages: int, depth: int, heat: float | None = None) -> None:
        """A node enters the tier. ``heat`` is what ``remove`` of the tier it comes from returned; None: new KV."""
        entry = self._entries[key] = Entry(pages, depth)
        self._enter(key, entry, heat)

    def extend(self, key: bytes, pages: int) -> None:
        """``pages`` new pages at the end of a node."""
        self._entries[key].pages += pages

    def touch(self, key: bytes) -> None:
        """A request hit the node."""
        entry = self._entries[key]
        if entry.offer:
            self._candidates(entry).discard(entry)
            self._use(entry)
            self._candidates(entry).push(key, entry)
        else:
            self._use(entry)

    def split(self, key: bytes, low: bytes, pages: int, depth: int) -> None:
        """The last ``pages`` pages of ``key`` become the node ``low``, which inherits rank and offer."""
        high = self._entries[key]
        high.pages -= pages
        entry = self._entries[low] = Entry(pages, depth)
        entry.rank, entry.seen = high.rank, high.seen
        if high.offer:
            self._candidates(high).discard(high)
            self._candidates(entry).push(low, entry)

    def remove(self, key: bytes) -> float:
        """The node leaves the tier. Returns its heat, log2 of what its uses are still worth, for the tier it enters."""
        entry = self._entries.pop(key)
        self._candidates(entry).discard(entry)
        return self._leave(key, entry)

    def offer(self, key: bytes) -> None:
        """The node may leave from now on. Offering twice is allowed."""
        entry = self._entries[key]
        if not entry.offer:
            self._candidates(entry).push(key, entry)

    def withdraw(self, key: bytes) -> None:
        """The node may not leave."""
        entry = self._entries[key]
        self._candidates(entry).discard(entry)

    # ---- integrity

    def offered(self) -> dict[bytes, int]:
        """Pages of every offered node. O(n): for integrity checks."""
        return {key: entry.pages for key, entry in self._entries.items() if entry.offer}

    def sizes(self) -> dict[bytes, int]:
        """Pages of every node. O(n): for integrity checks."""
        return {key: entry.pages for key, entry in self._entries.items()}

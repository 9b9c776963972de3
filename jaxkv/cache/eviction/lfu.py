"""The default: least frequently used, with a worth of frequency and age that is learned online.

A node lies in the list of its class, log2 of its decayed number of uses, by last use. Only the heads of the lists can be
the victim: the one worth least now, by the table of ``reuse``, or simply the one used longest ago while LRU hits more
(``shadows`` compares the two on a sample of the requests). Counts outlive eviction: for nodes in ``past``, up to
``HISTORY`` per page of the tiers, for sampled pages in the directory. What the host tier holds is ranked by the same
counts and ages, but with its own table and choice, made for the capacity of both tiers together.

``worth`` of a use multiplies the worth of the node by 2**worth, in recency its age by 2**-worth.

Token hit rate in % at 1, 5, 10, 25, 50 % of the distinct blocks of two traces (``bench.replay``):
    alone                   chat 9.2 21.3 29.3 35.6 36.8   agent 18.1 76.8 91.4 95.5 96.2
    with session-end hints  chat 12.8 35.0 37.1 37.1 37.1   agent 18.2 77.7 92.1 96.1 96.2
    always by worth         chat 9.1 21.9 29.3 35.6 36.8   agent 18.5 76.3 91.5 95.5 96.2
Classes by the session (its turns, the time since the last one, its length) instead of the count, which would learn when
sessions end, were tried and gained nothing: what can be won without hints is in the count and the age.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from jaxkv.cache.eviction.base import Candidates, Entry, EvictionPolicy, Point
from jaxkv.cache.eviction.reuse import NEVER, class_of, one_more
from jaxkv.cache.eviction.shadows import RECENCY, Directory

HISTORY = 2  # nodes remembered for every page of the tiers


class _Stream:
    """What the tiers share: the requests as pages, time in pages inserted, and the memory of nodes that left."""

    def __init__(self) -> None:
        self.clock = 0.0
        self.tick = 0
        self.limit = 0  # nodes remembered
        self.past: dict[bytes, Entry] = {}  # of nodes that left, oldest departure first
        self.directories: list[Directory] = []
        self._path: list[bytes] = []  # sampled pages of the request under way, top first
        self._depth = -1
        self._begun = 0.0  # clock when that request began

    def read(self, depth: int, sampled: Sequence[tuple[int, bytes]]) -> None:
        """A request read or wrote a node. Nodes come top first, so one that is not deeper begins another request."""
        if depth <= self._depth:
            self._flush()
        self._depth = depth
        self._path += [digest for _, digest in sampled]

    def remember(self, entry: Entry) -> None:
        """A node leaves a tier."""
        self.past.pop(entry.digests[0], None)
        self.past[entry.digests[0]] = entry
        self._bound()

    def _bound(self) -> None:
        while len(self.past) > self.limit:
            del self.past[next(iter(self.past))]

    def recall(self, digests: Sequence[bytes], index: int) -> Entry | None:
        """What left and began with the page at ``index``, as far as it is the same; the rest stays remembered."""
        entry = self.past.pop(digests[index], None)
        if entry is not None:
            same = next((i for i, (a, b) in enumerate(zip(entry.digests, digests[index:])) if a != b),
                        min(entry.pages, len(digests) - index))
            if same < entry.pages:
                rest = entry.low_part(entry.pages - same, 0)
                self.past[rest.digests[0]] = rest
                self._bound()
        return entry

    def _flush(self) -> None:
        path = list(dict.fromkeys(reversed(self._path)))  # pages of a node that was cut meanwhile may be there twice
        self._path.clear()
        if path:
            for directory in self.directories:
                directory.request([digest for digest in path if directory.samples(digest)], self._begun)
        self._begun = self.clock


@final
class LFU(EvictionPolicy):
    """Adaptive: classes by frequency, worth by what was learned."""

    def __init__(self, capacity: int, above: EvictionPolicy | None = None) -> None:
        super().__init__(capacity, above)
        upper = above if isinstance(above, LFU) else None
        self._reach: int = self.capacity + (upper._reach if upper else 0)
        self._stream: _Stream = upper._stream if upper else _Stream()
        self._directory = Directory(self._reach)
        self._stream.directories.append(self._directory)
        self._stream.limit = HISTORY * self._reach
        self._lists: dict[tuple[int, int], Candidates] = {}  # by class and worth

    def _enter(self, key: bytes, entry: Entry, digests: Sequence[bytes]) -> None:
        entry.clock = self._stream.clock
        self._insert(entry, 0, digests)
        self.rest(key)

    def _insert(self, entry: Entry, offset: int, digests: Sequence[bytes]) -> None:
        """New KV at index ``offset`` of a node."""
        self._recall(entry, offset, digests)
        sampled = [(i, digest) for i, digest in enumerate(digests, offset) if self._directory.samples(digest)]
        entry.sampled += sampled
        entry.digests += digests
        self._stream.read(entry.depth + offset, sampled)
        self._stream.clock += len(digests)

    def _recall(self, entry: Entry, offset: int, digests: Sequence[bytes]) -> None:
        """Parts of a node: the uses that new KV at index ``offset`` has had, with this one."""
        now, index = self._stream.clock, 0
        while index < len(digests):
            known = self._stream.recall(digests, index)
            parts, pages = [(0, NEVER)], 1
            if known is not None:
                lost = self._directory.model.lost(now - known.clock)
                parts, pages = [(i, level - lost) for i, level in known.levels], known.pages
            for i, before in parts:
                level = one_more(before)
                if not entry.levels or class_of(entry.levels[-1][1]) != class_of(level):
                    entry.levels.append((offset + index + i, level))
            index += pages

    def _stamp(self, entry: Entry) -> None:
        stream = self._stream
        lost = self._directory.model.lost(stream.clock - entry.clock)
        entry.levels = [(i, one_more(level - lost)) for i, level in entry.levels]
        entry.clock = stream.clock
        stream.tick += 1
        entry.rank = stream.tick

    def _arrive(self, key: bytes, entry: Entry) -> None:
        self._stream.past.pop(key, None)

    def _use(self, entry: Entry) -> None:
        self._stream.read(entry.depth, entry.sampled)
        self._stamp(entry)

    def _leave(self, key: bytes, entry: Entry) -> None:
        self._stream.remember(entry)

    def tail(self, key: bytes) -> int:
        entry = self._entries[key]
        return entry.pages - entry.levels[-1][0]

    def extend(self, key: bytes, digests: Sequence[bytes]) -> None:
        entry = self._entries[key]
        self._insert(entry, entry.pages, digests)
        super().extend(key, digests)

    def rest(self, key: bytes) -> None:
        """The order in which nodes of one class leave. A path is released from its end on."""
        self._stream.tick += 1
        self._entries[key].rank = self._stream.tick

    def _list(self, entry: Entry) -> Candidates:
        place = class_of(entry.levels[-1][1]), entry.worth
        found = self._lists.get(place)
        if found is None:
            found = self._lists[place] = Candidates(self._serials)
        return found

    def _next(self) -> tuple[bytes, Entry] | None:
        clock, model, recency = self._stream.clock, self._directory.model, self._directory.ranking == RECENCY
        best, victim = None, None
        for (cls, worth), candidates in self._lists.items():
            if first := candidates.peek():
                age = clock - first[1].clock
                rank = (-age / 2.0**worth if recency else model.table[cls][model.step(age)] * 2.0**worth, first[1].rank)
                if best is None or rank < best:
                    best, victim = rank, first
        return victim

    def curve(self) -> list[Point]:
        return self._directory.curve()

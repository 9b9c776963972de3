"""Which pages are on disk, where, and how much they are used; which segment goes first. Owns no file.

Eviction is by segment, as whole files are what a log can free: the oldest goes, and those of its pages that were used since
they were written are written again (FIFO with reinsertion, CLOCK by another name; CacheLib's Navy does the same, Berg et al.
2020). Ranking segments by their uses instead keeps the cold pages beside every hot one, and was far worse on real traces.
A segment that another process used is as young as that use. Every method may be called from any thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from jaxkv.runtime.disk.format import Entry


@dataclass(eq=False, slots=True)
class Segment:
    """A file of the log. Files are changed by their owner only; ``end`` and ``size`` (bytes) are as last seen."""

    name: str  # names sort by age
    end: int = 0  # records before this are in the index
    size: int = 0
    sealed: bool = False  # complete: it may be dropped
    since_ns: int = 0  # sealed, or used by another process: the lowest goes first
    mtime_ns: int = 0  # of the file, by which processes tell each other of use
    keys: set[bytes] = field(default_factory=set)


@dataclass(eq=False, slots=True)
class Place:
    """Where a page lies."""

    segment: Segment
    entry: Entry
    uses: int = 0  # since it was written


class Index:
    """Pages by key."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._places: dict[bytes, Place] = {}
        self._segments: dict[str, Segment] = {}
        self._used: set[Segment] = set()
        self._wrong: list[Place] = []

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def find(self, key: bytes) -> Place | None:
        return self._places.get(key)

    # ---- segments

    def segments(self) -> list[Segment]:
        """All of them, oldest first."""
        with self._lock:
            return sorted(self._segments.values(), key=lambda segment: segment.name)

    def held(self) -> int:
        """Bytes of all segments."""
        with self._lock:
            return sum(segment.size for segment in self._segments.values())

    def segment(self, name: str) -> Segment:
        """The segment of that name, new if need be."""
        with self._lock:
            return self._segments.setdefault(name, Segment(name))

    def add(self, segment: Segment, entries: Iterable[Entry]) -> None:
        """``segment`` holds these pages; of a page that was written twice the copy added last counts."""
        with self._lock:
            for entry in entries:
                self._drop(entry.key)
                self._places[entry.key] = Place(segment, entry)
                segment.keys.add(entry.key)

    def forget(self, segment: Segment) -> int:
        """A segment is gone; how many pages went with it."""
        with self._lock:
            self._segments.pop(segment.name, None)
            self._used.discard(segment)
            for key in segment.keys:
                del self._places[key]
            count = len(segment.keys)
            segment.keys.clear()
            return count

    def discard(self, place: Place) -> None:
        """A page turned out bad; a newer copy of it stays."""
        with self._lock:
            if self._places.get(place.entry.key) is place:
                self._drop(place.entry.key)

    def reject(self, keys: Iterable[bytes]) -> None:
        """Pages are wrong: they are gone from here, and are to be damaged where they lie."""
        with self._lock:
            for key in keys:
                if key in self._places:
                    self._wrong.append(self._places[key])
                    self._drop(key)

    def take_wrong(self) -> list[Place]:
        """Places of wrong pages, each once."""
        with self._lock:
            wrong, self._wrong = self._wrong, []
            return wrong

    def _drop(self, key: bytes) -> None:
        place = self._places.pop(key, None)
        if place is not None:
            place.segment.keys.discard(key)

    # ---- use and eviction

    def use(self, place: Place) -> None:
        """A page was read."""
        with self._lock:
            place.uses += 1
            self._used.add(place.segment)

    def take_used(self) -> list[Segment]:
        """Segments used since the last call."""
        with self._lock:
            used, self._used = self._used, set()
            return list(used)

    def victim(self) -> Segment | None:
        """The sealed segment that goes first."""
        with self._lock:
            sealed = [segment for segment in self._segments.values() if segment.sealed]
            return min(sealed, key=lambda segment: (segment.since_ns, segment.name), default=None)

    def hot(self, segment: Segment, limit: int) -> list[Place]:
        """Pages of ``segment`` that were used, most used first, up to ``limit`` bytes."""
        with self._lock:
            places = [place for key in segment.keys if (place := self._places[key]).uses]
        places.sort(key=lambda place: (-place.uses, place.entry.offset))
        chosen = []
        for place in places:
            limit -= place.entry.length
            if limit < 0:
                break
            chosen.append(place)
        return chosen

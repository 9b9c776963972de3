"""What the disk tier counts, and the error of a tier that cannot start."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass

from jaxkv.config import ConfigError


class DiskError(ConfigError):
    """A disk tier that cannot work; the message is one line that names the path and the limit."""


@dataclass(frozen=True)
class DiskStats:
    """The tier now, and counters since it was opened. A page here is one page of every KV group."""

    # now
    pages: int = 0  # that can be read, other processes' included
    bytes: int = 0  # of all segment files of the format, as last seen
    segments: int = 0
    queued_bytes: int = 0  # handed over, not written yet
    writing: bool = True  # False: writing failed, and is tried again later
    # counters
    written: int = 0  # pages
    written_bytes: int = 0
    rewritten: int = 0  # pages in use that were saved from a segment about to be dropped; part of written
    evicted: int = 0  # pages of segments dropped for room, rewritten ones included
    hits: int = 0  # pages read and good
    read_bytes: int = 0
    misses: int = 0  # pages asked for that had gone since they were matched
    corrupt: int = 0  # pages read and damaged or of other tokens: dropped
    damaged: int = 0  # segments with a part that could not be read when they were opened: that part dropped
    torn_bytes: int = 0  # unfinished writes of dead processes that were cut off
    refused: int = 0  # pages not taken over: the queue was full, or writing had failed
    lost: int = 0  # pages taken over and not written: an error, or no room beside other processes' open segments
    write_errors: int = 0
    read_errors: int = 0


class Counters:
    """Counters of ``DiskStats`` by name. Any thread may count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: Counter[str] = Counter()

    def add(self, **more: int) -> bool:
        """Whether these are the first of their kind."""
        with self._lock:
            first = not any(self._values[name] for name in more)
            self._values.update(more)
            return first

    def values(self) -> dict[str, int]:
        with self._lock:
            return dict(self._values)

"""Pages on their way to the writer: bounded by bytes, never blocking who puts. Any thread may call any method."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable

from jaxkv.runtime.disk.format import Record


class PageQueue:
    """Holds at most ``limit`` bytes of records, those being written included."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._changed = threading.Condition()
        self._waiting: deque[Record] = deque()
        self._keys: set[bytes] = set()  # waiting or being written
        self.wrong: set[bytes] = set()  # forgotten while a batch is being written, which may hold them
        self._waiting_bytes = 0
        self._writing_bytes = 0
        self._urgent = False  # somebody waits for the disk
        self._closed = False

    @property
    def held(self) -> int:
        """Bytes."""
        return self._waiting_bytes + self._writing_bytes

    def __contains__(self, key: bytes) -> bool:
        return key in self._keys

    def put(self, record: Record) -> bool:
        """False, and nothing done, if there is no room or the queue is closed."""
        with self._changed:
            if self._closed or self.held + record.length > self._limit:
                return False
            self._waiting.append(record)
            self._keys.add(record.key)
            self._waiting_bytes += record.length
            self._changed.notify_all()
            return True

    def forget(self, keys: Iterable[bytes]) -> None:
        """Records that nobody may have: those that wait are dropped."""
        keys = set(keys)
        with self._changed:
            dropped = [record for record in self._waiting if record.key in keys]
            if dropped:
                self._waiting = deque(record for record in self._waiting if record.key not in keys)
                self._keys.difference_update(record.key for record in dropped)
                self._waiting_bytes -= sum(record.length for record in dropped)
                self._changed.notify_all()
            if self._writing_bytes:
                self.wrong |= keys

    def take(self, size: int, linger_s: float, idle_s: float) -> list[Record]:
        """The next records, in order, up to ``size`` bytes but at least one; nothing if none came for ``idle_s`` seconds.

        Waits up to ``linger_s`` for the batch to fill. The records count as being written until ``done``.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting or self._closed, idle_s):
                return []
            self._changed.wait_for(lambda: self._waiting_bytes >= size or self._urgent or self._closed, linger_s)
            batch: list[Record] = []
            while self._waiting and (not batch or self._writing_bytes + self._waiting[0].length <= size):
                record = self._waiting.popleft()
                batch.append(record)
                self._waiting_bytes -= record.length
                self._writing_bytes += record.length
            return batch

    def done(self, batch: list[Record]) -> None:
        """The taken records are on disk or lost."""
        with self._changed:
            self._keys.difference_update(record.key for record in batch)
            self._writing_bytes = 0
            self.wrong = set()
            self._urgent = self._urgent and bool(self._waiting)
            self._changed.notify_all()

    def drain(self, timeout: float) -> bool:
        """Waits until nothing is left; False after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        with self._changed:
            self._urgent = bool(self._waiting)
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self.held, max(0.0, deadline - time.monotonic()))

    def close(self) -> None:
        """Takes nothing more; what is in it is still to be written."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def finished(self) -> bool:
        """Closed and empty."""
        return self._closed and not self.held

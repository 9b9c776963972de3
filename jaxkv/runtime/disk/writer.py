"""The background thread that writes: batches into this process's open segment, room made before each, errors survived.

Owns the open segment and all changes of the directory; the index learns from it what is on disk. After an error writing
stops for a while, as a full disk may be freed; reading goes on.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import NamedTuple

from jaxkv.runtime.disk.directory import Directory
from jaxkv.runtime.disk.format import HEADER_BYTES, CorruptError, Layout, Record, footer_bytes
from jaxkv.runtime.disk.index import Index, Segment
from jaxkv.runtime.disk.queue import PageQueue
from jaxkv.runtime.disk.segment import Reader, Writer, spoil
from jaxkv.runtime.disk.stats import Counters

log = logging.getLogger("jaxkv.disk")

LINGER_S = 0.05  # how long a page waits for the batch to fill


class Limits(NamedTuple):
    """Sizes in bytes, times in seconds."""

    capacity: int  # of all segments of the format
    batch: int  # written at a time
    segment: int  # sealed from this size on
    refresh_s: float  # between looks for other processes' pages
    retry_s: float  # after a failed write


class BackgroundWriter:
    """Writes what comes through ``queue`` until it is closed and empty."""

    def __init__(self, directory: Directory, layout: Layout, index: Index, queue: PageQueue, counters: Counters,
                 limits: Limits) -> None:
        self._directory = directory
        self._layout = layout
        self._index = index
        self._queue = queue
        self._counters = counters
        self._limits = limits
        self._open: Writer | None = None
        self._retry_at: float | None = None  # when to try again after an error
        self._thread = threading.Thread(target=self._run, name="jaxkv-disk-writer", daemon=True)
        self._thread.start()

    @property
    def failed(self) -> bool:
        """The latest write failed."""
        return self._retry_at is not None

    @property
    def accepts(self) -> bool:
        """Whether there is a point in handing pages over."""
        return self._retry_at is None or time.monotonic() >= self._retry_at

    def join(self, timeout: float) -> bool:
        """Waits for the thread to end; False if it has not."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    # ---- the thread

    def _run(self) -> None:
        refreshed = time.monotonic()
        while not self._queue.finished:
            batch = self._queue.take(self._limits.batch, LINGER_S, self._limits.refresh_s)
            if batch:
                self._attempt(batch)
                self._index.reject(self._queue.wrong.copy())
                self._queue.done(batch)
            self._spoil()
            if time.monotonic() - refreshed >= self._limits.refresh_s:
                self._refresh()
                refreshed = time.monotonic()
        self._spoil()
        if self._open:
            try:
                self._seal()
            except OSError as error:
                self._fail(error)

    def _spoil(self) -> None:
        for place in self._index.take_wrong():
            try:
                spoil(self._directory.path / place.segment.name, self._layout, place.entry)
            except FileNotFoundError:  # dropped meanwhile
                continue
            except OSError as error:
                self._counters.add(write_errors=1)
                log.warning("wrong disk KV page in %s at %d stays there: %s", place.segment.name, place.entry.offset, error)

    def _refresh(self) -> None:
        self._directory.share_use()
        try:
            self._directory.refresh(orphans=False)
        except OSError as error:
            self._counters.add(read_errors=1)
            log.debug("disk KV directory cannot be read: %s", error)

    def _attempt(self, batch: list[Record]) -> None:
        if not self.accepts:
            self._counters.add(lost=len(batch))
            return
        try:
            self._write(batch)
        except (OSError, MemoryError, RuntimeError) as error:  # the last: the device never gave the page
            self._counters.add(lost=sum(record.key not in self._index for record in batch))  # sealing may be what failed
            self._fail(error)
            return
        if self._retry_at is not None:
            self._retry_at = None
            log.warning("disk KV tier writes again")

    def _fail(self, error: Exception) -> None:
        self._counters.add(write_errors=1)
        if self._retry_at is None:
            log.warning("disk KV tier at %s cannot be written (%s): reading goes on, writing is tried again every %g s",
                        self._directory.path, error, self._limits.retry_s)
        self._retry_at = time.monotonic() + self._limits.retry_s
        self._abandon()

    def _abandon(self) -> None:
        if self._open:
            writer, self._open = self._open, None
            writer.abandon()

    def _write(self, batch: list[Record]) -> None:
        """Puts a batch on disk. OSError if that is impossible."""
        with self._directory.locked():
            saved = self._make_room(batch)
            if saved is None:
                self._counters.add(lost=len(batch))
                return
            if self._open is None:
                self._open = self._directory.create()
            entries = self._open.append(batch + saved)
        segment = self._index.segment(self._open.name)
        self._index.add(segment, entries)
        segment.size = segment.end = self._open.end
        self._counters.add(written=len(entries), written_bytes=sum(entry.length for entry in entries), rewritten=len(saved))
        if segment.size >= self._limits.segment:
            self._seal()

    def _seal(self) -> None:
        writer, self._open = self._open, None
        assert writer is not None
        segment = self._index.segment(writer.name)
        status = writer.seal()
        segment.since_ns = segment.mtime_ns = status.st_mtime_ns
        segment.size, segment.sealed = status.st_size, True

    # ---- room

    def _make_room(self, batch: list[Record]) -> list[Record] | None:
        """Drops segments until ``batch`` fits; pages of theirs to write again.

        None instead of the pages if other processes' open segments leave no room.
        """
        self._directory.refresh(orphans=True)
        if self._open and self._open.deleted:
            self._abandon()
        saved: list[Record] = []
        if self._excess(batch) > 0:
            self._directory.learn_use()
        while (excess := self._excess(batch + saved)) > 0:
            victim = self._index.victim()
            if victim is None:
                if self._open is None:
                    return None
                self._seal()
                continue
            # a quarter of each victim goes for good: as much as a batch, so one victim is enough as a rule
            left = victim.size - excess - footer_bytes(len(victim.keys))
            saved += self._used_pages(victim, min(victim.size * 3 // 4, left))
            self._directory.drop(victim)
            self._counters.add(evicted=self._index.forget(victim))
        return saved

    def _excess(self, records: list[Record]) -> int:
        """Bytes over the capacity once ``records`` are in the open segment and it is sealed."""
        pages = len(records) + (len(self._open.entries) if self._open else 0)
        need = sum(record.length for record in records) + footer_bytes(pages) + (0 if self._open else HEADER_BYTES)
        return self._index.held() + need - self._limits.capacity

    def _used_pages(self, victim: Segment, limit: int) -> list[Record]:
        """Reads the pages of ``victim`` that were used, up to ``limit`` bytes."""
        pages = []
        with Reader(self._directory.path, self._layout) as reader:
            for place in self._index.hot(victim, limit):
                try:
                    (raw,) = reader.read(victim.name, [place.entry])
                    tokens, payload = reader.page(victim.name, place.entry, raw)
                    pages.append(Record(place.entry.key, tokens, payload, place.entry.length))
                except CorruptError:
                    self._counters.add(corrupt=1)
                except OSError:
                    self._counters.add(read_errors=1)
        return pages

"""The disk tier as the engine sees it: which pages are there, hand one over, read some back.

A content-addressed store of KV pages beside the trie: a page's key is its path digest, which starts from everything that KV
depends on (model, layout, dtype, adapter, namespace), so what must not hit cannot. Its tokens are stored and compared too.
Files are log-structured, as in LFS (Rosenblum and Ousterhout, 1992) and Bitcask: pages are appended to segments in large
writes, dropped by whole segments, found by an index in memory that the segments restore after a crash.

No call blocks on the disk but ``__init__``, ``flush`` and ``close``, and none raises for what a disk may do: the tier then
holds less, and ``stats`` says why. Every method may be called from any thread.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxkv.runtime.disk.directory import Directory
from jaxkv.runtime.disk.format import HEADER_BYTES, CorruptError, DiskFormat, Layout, Payload, footer_bytes, xxh3_64
from jaxkv.runtime.disk.index import Index, Place
from jaxkv.runtime.disk.queue import PageQueue
from jaxkv.runtime.disk.segment import Reader
from jaxkv.runtime.disk.stats import Counters, DiskError, DiskStats
from jaxkv.runtime.disk.writer import BackgroundWriter, Limits

log = logging.getLogger("jaxkv.disk")

BATCH_BYTES = 16 << 20
QUEUE_BYTES = 64 << 20
BATCHES_PER_SEGMENT = 4
READ_BYTES = 8 << 20  # neighbours that are read by one call
WRITE_WAIT_S = 5.0  # most time that a read waits for pages to be written first
READERS = 2  # threads


class _Wanted(NamedTuple):
    place: Place
    tokens: bytes


class DiskStore:
    """Pages of ``form`` in the directory ``path``, at most ``capacity_bytes`` of files over all processes that share it.

    ``batch_bytes`` are written at a time; ``queue_bytes`` of handed-over pages are held in memory at most (both grow to hold
    one page if need be). Other processes' pages are found every ``refresh_s`` seconds; ``retry_s`` after a failed write the
    next is tried. DiskError, one line, if the path is no directory or cannot be written, or if the capacity is more than the
    disk has or less than a batch.
    """

    def __init__(self, path: str | Path, capacity_bytes: int, form: DiskFormat, *, batch_bytes: int = BATCH_BYTES,
                 queue_bytes: int = QUEUE_BYTES, refresh_s: float = 0.25, retry_s: float = 60.0) -> None:
        if xxh3_64 is None:
            raise DiskError("the disk KV tier needs the package xxhash")
        self._layout = Layout(form)
        self.capacity = capacity_bytes
        batch_bytes = max(batch_bytes, self._layout.page_bytes)
        least = batch_bytes + HEADER_BYTES + footer_bytes(batch_bytes // self._layout.head_bytes)
        if capacity_bytes < least:
            raise DiskError(f"disk KV capacity must be at least {least} bytes, one batch; got {capacity_bytes}")
        segment_bytes = min(BATCHES_PER_SEGMENT * batch_bytes, max(batch_bytes, capacity_bytes // 8))
        self._index = Index()
        self._counters = Counters()
        self._directory = Directory(Path(path), self._layout, self._index, self._counters)
        try:
            self._recover(capacity_bytes)
        except DiskError:
            self._directory.close()
            raise
        self._largest = batch_bytes
        self._queue = PageQueue(max(queue_bytes, 2 * batch_bytes))
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="jaxkv-disk-reader")
        self._writer = BackgroundWriter(self._directory, self._layout, self._index, self._queue, self._counters,
                                        Limits(capacity_bytes, batch_bytes, segment_bytes, refresh_s, retry_s))

    def _recover(self, capacity: int) -> None:
        start = time.perf_counter()
        try:
            with self._directory.locked():
                self._directory.refresh(orphans=True)
            room = self._directory.room()
            count, size = self._directory.foreign()
        except OSError as error:
            raise DiskError(f"disk KV path {str(self._directory.path)!r} cannot be used: {error}") from None
        if capacity > room:
            raise DiskError(f"disk KV capacity of {capacity} bytes is more than the disk of "
                            f"{str(self._directory.path)!r} has free: {room} bytes")
        log.info("disk KV tier at %s: %d pages in %d segments, %.3f GB of %.3f GB, recovered in %.3f s",
                 self._directory.path, len(self._index), len(self._index.segments()), self._index.held() / 1e9,
                 capacity / 1e9, time.perf_counter() - start)
        if count:
            log.info("disk KV path %s also holds %d segments (%.3f GB) of other models or settings: left alone",
                     self._directory.path, count, size / 1e9)

    def match(self, keys: Sequence[bytes]) -> int:
        """How many leading keys are on disk or on their way, as far as known: a page may be gone, or turn out bad, when it is
        read."""
        return next((n for n, key in enumerate(keys)
                     if key in self._queue.wrong or key not in self._index and key not in self._queue), len(keys))

    def forget(self, keys: Sequence[bytes]) -> None:
        """Pages that are wrong, on disk or on their way: they match no more, nobody ever reads them, and they may be put
        again."""
        self._queue.forget(keys)  # in this order: pages go from the one to the other
        self._index.reject(keys)

    def put(self, key: bytes, tokens: bytes, payload: Payload) -> bool:
        """Hands a page over to be written. Its arrays must not change any more. ValueError if it is none of the format.

        False if the page is on disk or on its way already, or is refused (counted): the queue is full, writing fails,
        or an encoded page is longer than a batch.
        """
        record = self._layout.record(key, tokens, payload)
        if key in self._queue or key in self._index:  # in this order: pages go from the one to the other
            return False
        if record.length <= self._largest and self._writer.accepts and self._queue.put(record):
            return True
        self._counters.add(refused=1)
        return False

    def read(self, items: Sequence[tuple[bytes, bytes]]) -> Future[list[Payload]]:
        """Pages by (key, tokens): those of the leading items that are there and good. The future never fails.

        The arrays are the caller's; those of neighbours are views of one new buffer of up to ``READ_BYTES``. A page that is
        damaged or of other tokens is dropped.
        """
        try:
            return self._readers.submit(self._read, list(items))
        except RuntimeError:  # closed
            nothing: Future[list[Payload]] = Future()
            nothing.set_result([])
            return nothing

    def describe(self) -> str:
        """One line for a person."""
        stats = self.stats()
        return (f"{self._directory.path}, {stats.pages:,} pages, {stats.bytes:,} of {self.capacity:,} bytes "
                f"({self.capacity / 2**20:.1f} MiB)")

    @property
    def queued_bytes(self) -> int:
        """Bytes handed over and not written yet."""
        return self._queue.held

    def stats(self) -> DiskStats:
        return DiskStats(pages=len(self._index), bytes=self._index.held(), segments=len(self._index.segments()),
                         queued_bytes=self._queue.held, writing=not self._writer.failed, **self._counters.values())

    def flush(self, timeout: float) -> bool:
        """Waits until what was handed over is written (or lost); False after ``timeout`` seconds."""
        return self._queue.drain(timeout)

    def close(self, timeout: float = 30.0) -> bool:
        """Writes what is queued, seals and stops; False if that takes more than ``timeout`` seconds and goes on behind.

        Reads under way end on their own, later ones find nothing. To be called once.
        """
        self._readers.shutdown(wait=False)
        self._queue.close()
        done = self._writer.join(timeout)
        if done:
            self._directory.close()
        return done

    # ---- reader threads

    def _read(self, items: list[tuple[bytes, bytes]]) -> list[Payload]:
        if any(key in self._queue for key, _ in items):
            self._queue.drain(WRITE_WAIT_S)
        pages: list[Payload] = []
        runs = deque(_runs(self._find(items)))
        with Reader(self._directory.path, self._layout) as reader:
            while runs:
                run = runs.popleft()
                try:
                    raws = reader.read(run[0].place.segment.name, [wanted.place.entry for wanted in run])
                except (OSError, MemoryError, CorruptError) as error:
                    if len(run) == 1:
                        self._drop(run[0].place, error)
                        break
                    runs.extendleft([wanted] for wanted in reversed(run))  # one by one, up to the bad one
                    continue
                good = self._check(reader, run, raws)
                pages += good
                if len(good) < len(run):
                    break
        return pages

    def _find(self, items: list[tuple[bytes, bytes]]) -> list[_Wanted]:
        """Where the leading items are."""
        found = []
        for key, tokens in items:
            place = self._index.find(key)
            if place is None:
                self._counters.add(misses=1)
                break
            found.append(_Wanted(place, tokens))
        return found

    def _check(self, reader: Reader, run: list[_Wanted], raws: list[np.ndarray]) -> list[Payload]:
        """The leading good pages of what was read."""
        pages = []
        for (place, tokens), raw in zip(run, raws):
            try:
                stored, payload = reader.page(place.segment.name, place.entry, raw)
                if stored != tokens:
                    raise CorruptError("other tokens")
            except CorruptError as error:
                self._drop(place, error)
                break
            self._index.use(place)
            self._counters.add(hits=1, read_bytes=place.entry.length)
            pages.append(payload)
        return pages

    def _drop(self, place: Place, error: Exception) -> None:
        """A page cannot be had: it is matched no more."""
        self._index.discard(place)
        if isinstance(error, FileNotFoundError):  # another process dropped the segment
            self._counters.add(misses=1)
        elif isinstance(error, CorruptError):
            self._counters.add(corrupt=1)
            log.warning("disk KV page in %s at %d dropped: %s", place.segment.name, place.entry.offset, error)
        elif self._counters.add(read_errors=1):
            log.warning("disk KV page in %s cannot be read (%s); further read errors are counted only",
                        place.segment.name, error)


def _runs(found: list[_Wanted]) -> list[list[_Wanted]]:
    """Pages that lie one after the other in a segment, up to READ_BYTES together."""
    runs: list[list[_Wanted]] = []
    size = 0
    for wanted in found:
        segment, entry = wanted.place.segment, wanted.place.entry
        if runs:
            last = runs[-1][-1].place
            if last.segment is segment and last.entry.offset + last.entry.length == entry.offset \
                    and size + entry.length <= READ_BYTES:
                runs[-1].append(wanted)
                size += entry.length
                continue
        runs.append([wanted])
        size = entry.length
    return runs

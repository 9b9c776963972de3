"""The directory of segments: which files there are, who may change them, what the index knows of them.

Several processes share it. What a process does to files that others may change (create, adopt, drop), and what counts
against the capacity (each batch), it does under one directory lock, held for a batch at most. Sealed files and readers need
no lock. All methods but ``locked`` belong to one thread at a time.

A file's name says its format (a digest) and its age: files of other formats are never opened.
"""

from __future__ import annotations

import fcntl
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxkv.runtime.disk.format import CorruptError, Layout
from jaxkv.runtime.disk.index import Index, Segment
from jaxkv.runtime.disk.segment import Scan, Writer, adopt, scan
from jaxkv.runtime.disk.stats import Counters, DiskError

log = logging.getLogger("jaxkv.disk")

SUFFIX = ".kvseg"
_LOCK = "jaxkv.lock"
_LOCK_S = 10.0  # how long to wait for another process's batch


class Directory:
    """Segments of one format in ``path``, which is created if need be. DiskError if it cannot be used."""

    def __init__(self, path: Path, layout: Layout, index: Index, counters: Counters) -> None:
        self.path = path
        self._layout = layout
        self._index = index
        self._counters = counters
        self._prefix = layout.digest + "-"
        self._serial = 0
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):  # the only sure way to know that files can be made
                pass
            self._lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except (FileExistsError, NotADirectoryError):
            raise DiskError(f"disk KV path {str(path)!r} is not a directory") from None
        except OSError as error:
            raise DiskError(f"disk KV path {str(path)!r} cannot be written: {error.strerror}") from None

    def close(self) -> None:
        os.close(self._lock)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The directory lock. TimeoutError (an OSError) if another process keeps it for seconds."""
        deadline = time.monotonic() + _LOCK_S
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process holds {_LOCK}") from None
                time.sleep(0.001)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def room(self) -> int:
        """Bytes this format's segments have or could get on the disk."""
        disk = os.statvfs(self.path)
        return disk.f_bavail * disk.f_frsize + self._index.held()

    def foreign(self) -> tuple[int, int]:
        """Number and bytes of segments of other formats."""
        with os.scandir(self.path) as files:
            sizes = [file.stat().st_size for file in files
                     if file.name.endswith(SUFFIX) and not file.name.startswith(self._prefix)]
        return len(sizes), sum(sizes)

    def create(self) -> Writer:
        """A new segment of this process. Under the lock."""
        self._serial = max(self._serial + 1, time.time_ns())
        return Writer(self.path / f"{self._prefix}{self._serial:016x}{SUFFIX}", self._layout)

    def drop(self, segment: Segment) -> None:
        """Deletes the file of a sealed segment. Under the lock."""
        (self.path / segment.name).unlink(missing_ok=True)

    def refresh(self, *, orphans: bool) -> None:
        """Brings the index up to date with the files. ``orphans``: seals those of dead processes, under the lock."""
        with os.scandir(self.path) as files:
            names = {file.name for file in files if file.name.startswith(self._prefix) and file.name.endswith(SUFFIX)}
        for segment in self._index.segments():
            if segment.name not in names:
                self._index.forget(segment)
        for name in sorted(names):
            segment = self._index.segment(name)
            if not segment.sealed:
                self._learn(segment, orphans)

    def share_use(self) -> None:
        """Tells other processes, by the files' mtime, which segments this one used."""
        for segment in self._index.take_used():
            if segment.sealed:
                try:
                    os.utime(self.path / segment.name)
                    segment.mtime_ns = os.stat(self.path / segment.name).st_mtime_ns
                except OSError:
                    continue  # dropped meanwhile, or a disk that cannot be written: then nobody evicts

    def learn_use(self) -> None:
        """Learns which segments other processes used."""
        for segment in self._index.segments():
            if segment.sealed:
                try:
                    mtime_ns = os.stat(self.path / segment.name).st_mtime_ns
                except OSError:
                    continue  # dropped meanwhile
                if mtime_ns > segment.mtime_ns:
                    segment.since_ns = segment.mtime_ns = mtime_ns

    def _learn(self, segment: Segment, orphans: bool) -> None:
        path = self.path / segment.name
        try:
            found = scan(path, self._layout, segment.end)
            if orphans and not (found and found.sealed) and self._adopt(path):
                found = scan(path, self._layout, segment.end)
        except FileNotFoundError:
            self._index.forget(segment)
            return
        except CorruptError as error:
            log.warning("disk KV segment %s dropped: %s", path, error)
            self._counters.add(damaged=1)
            found = Scan([], 0, path.stat().st_size, True, 0)  # the oldest, so it goes first
        except OSError as error:  # perhaps it is us (too many open files): the next refresh tries again
            if self._counters.add(read_errors=1):
                log.warning("disk KV segment %s cannot be read now: %s", path, error)
            return
        if found is not None:
            self._index.add(segment, found.entries)
            segment.end, segment.size, segment.sealed = found.end, found.size, found.sealed
            segment.since_ns = segment.mtime_ns = found.mtime_ns

    def _adopt(self, path: Path) -> bool:
        """Whether an orphan was sealed, or deleted because it is empty."""
        try:
            whole = adopt(path, self._layout)
        except FileNotFoundError:
            raise
        except OSError as error:
            log.warning("disk KV segment %s cannot be sealed: %s", path, error.strerror)
            return False
        if whole and whole.torn:
            log.warning("disk KV segment %s: %d bytes of an unfinished write dropped", path, whole.torn)
            self._counters.add(torn_bytes=whole.torn)
        return whole is not None

"""One segment file: appended to by the process that holds its lock, read by any.

The owner holds ``flock`` on the file as long as it appends; the system releases it however the process ends, so an unsealed
file without a lock is an orphan, which any process may cut after its last whole record and seal. A sealed file never
changes again, but for pages that ``spoil`` damages. Nothing here is decided and nothing is caught: OSError goes up.

Batches are not synced one by one: a cache that loses its last pages with the power has lost nothing that cannot be computed
again, and the checksums tell. ``seal`` syncs data and footer, so at most one segment per process is ever unsynced.
"""

from __future__ import annotations

import fcntl
import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxkv.runtime.disk.format import (
    HEADER_BYTES,
    CorruptError,
    Entry,
    Layout,
    Payload,
    Record,
    entries,
    footer_bytes,
    footer_size,
    seed,
)

_WRONG = b"jaxkv: wrong KV."  # in the place of a page's first bytes
_IOV = 512  # buffers per call; the system takes 1024


class Scan(NamedTuple):
    """What a segment file holds from some offset on."""

    entries: list[Entry]
    end: int  # offset after the last whole record
    size: int  # of the file
    sealed: bool
    mtime_ns: int

    @property
    def torn(self) -> int:
        """Bytes after the last whole record that are no footer: unfinished, or damaged."""
        return 0 if self.sealed else self.size - self.end


class Writer:
    """The end of a segment that this process appends to."""

    def __init__(self, path: Path, layout: Layout) -> None:
        """Creates the file and locks it. The caller keeps others from adopting it in between."""
        self.name = path.name
        self._layout = layout
        self._seed = seed(path.name)
        self.entries: list[Entry] = []
        self.end = HEADER_BYTES
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            write_all(self._fd, [layout.header(self._seed)], 0)
        except OSError:
            os.close(self._fd)
            raise

    @property
    def deleted(self) -> bool:
        """Whether somebody has deleted the file: what is appended would be lost."""
        return not os.fstat(self._fd).st_nlink

    def append(self, batch: list[Record]) -> list[Entry]:
        """Writes records at the end, as one sequential write. After an OSError only ``abandon`` may follow."""
        at, new, buffers = self.end, [], []
        for record in batch:
            buffers += self._layout.buffers(record, self._seed)
            new.append(Entry(record.key, at, record.length))
            at += record.length
        write_all(self._fd, buffers, self.end)
        self.end = at
        self.entries += new
        return new

    def seal(self) -> os.stat_result:
        """Writes the footer, waits for the disk and closes; the file as it stays. Closed even after an OSError."""
        try:
            write_all(self._fd, [self._layout.footer(self.entries, self._seed)], self.end)
            os.fdatasync(self._fd)
            return os.fstat(self._fd)
        finally:
            os.close(self._fd)

    def abandon(self) -> None:
        """Closes after an error: an orphan from now on, and whoever adopts it cuts off what the error left."""
        os.close(self._fd)


def scan(path: Path, layout: Layout, start: int = 0) -> Scan | None:
    """The records of a segment from ``start`` on, the end of an earlier scan (0: all), by the footer if there is one.

    None: the file is too young to have a header. CorruptError: the header is not that of ``layout`` or is damaged.
    """
    with _opened(path, os.O_RDONLY) as fd:
        return _scan(fd, path.name, layout, start)


def adopt(path: Path, layout: Layout) -> Scan | None:
    """Seals an orphan, torn writes cut off, and says what it holds. None if its owner lives or it was sealed meanwhile.

    An orphan without a record is deleted (an empty scan). OSError if the file cannot be changed; it stays readable.
    """
    with _opened(path, os.O_RDWR) as fd:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        found = _scan(fd, path.name, layout, 0) or Scan([], 0, os.fstat(fd).st_size, False, 0)
        if found.sealed:
            return None
        if not found.entries:
            os.unlink(path)
            return found
        os.ftruncate(fd, found.end)
        write_all(fd, [layout.footer(found.entries, seed(path.name))], found.end)
        os.fdatasync(fd)
        return found


def spoil(path: Path, layout: Layout, entry: Entry) -> None:
    """Damages a page for good, so that no process ever gets it; the records after it stay. Needs no lock."""
    with _opened(path, os.O_WRONLY) as fd:
        write_all(fd, [_WRONG], entry.offset + layout.head_bytes)
        os.fdatasync(fd)


class Reader:
    """Open segment files for one read, so that neighbours cost one open. Descriptors do not outlive the read: the space of a
    dropped segment comes back when the last of them is closed."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._folder = folder
        self._layout = layout
        self._fds: dict[str, int] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._fds.values():
            os.close(fd)

    def read(self, name: str, run: list[Entry]) -> list[np.ndarray]:
        """Records that lie one after the other, with one call; views of one buffer. CorruptError if the file ends before."""
        fd = self._fds.get(name)
        if fd is None:
            fd = self._fds[name] = os.open(self._folder / name, os.O_RDONLY)
        start, size = run[0].offset, sum(entry.length for entry in run)
        raw = np.empty(size, np.uint8)
        at = 0
        while at < size:
            count = os.preadv(fd, [raw[at:].data], start + at)
            if not count:
                raise CorruptError("the file ends inside")
            at += count
        return [raw[entry.offset - start:entry.offset - start + entry.length] for entry in run]

    def page(self, name: str, entry: Entry, raw: np.ndarray) -> tuple[bytes, Payload]:
        """Tokens and pages of a record that was read. CorruptError if it is damaged."""
        return self._layout.payload(raw, entry, seed(name))


def write_all(fd: int, buffers: list[Any], at: int) -> None:
    """Writes buffers one after the other from offset ``at`` on, in as few calls as the system allows."""
    left = deque(memoryview(buffer) for buffer in buffers if len(buffer))
    while left:
        count = os.pwritev(fd, list(islice(left, _IOV)), at)
        at += count
        while left and count >= len(left[0]):
            count -= len(left.popleft())
        if count:
            left[0] = left[0][count:]


def _scan(fd: int, name: str, layout: Layout, start: int) -> Scan | None:
    status = os.fstat(fd)
    size, mark = status.st_size, seed(name)
    if size < HEADER_BYTES:
        return None
    if start < HEADER_BYTES:
        if os.pread(fd, HEADER_BYTES, 0) != layout.header(mark):
            raise CorruptError("the header is damaged")
        start = HEADER_BYTES
    footer = footer_size(os.pread(fd, footer_bytes(0), size - footer_bytes(0)))
    if footer is not None and HEADER_BYTES + footer <= size:
        listed = entries(os.pread(fd, footer, size - footer), mark)
        if listed is not None:
            new = [entry for entry in listed if entry.offset >= start]
            return Scan(new, size - footer, size, True, status.st_mtime_ns)
    found = list(_walk(fd, layout, mark, start, size))
    return Scan(found, found[-1].offset + found[-1].length if found else start, size, False, status.st_mtime_ns)


def _walk(fd: int, layout: Layout, mark: int, at: int, size: int) -> Iterator[Entry]:
    """Whole records, one after the other, up to the first thing that is none."""
    while (entry := layout.entry(os.pread(fd, layout.head_bytes, at), at, mark)) and at + entry.length <= size:
        yield entry
        at += entry.length


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)

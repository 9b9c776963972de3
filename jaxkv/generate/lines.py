"""The lines of the input file, by number, and the grain pipeline that reads and prepares those still to do.

Owns offsets (8 bytes per line; the text stays on disk) and digests. Knows nothing of JSON.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import TypeVar

import grain
import numpy as np

from jaxkv.config import ConfigError

T = TypeVar("T")
_BLOCK = 1 << 24


class Lines:
    """Random access to the lines of a file. ConfigError if it cannot be read."""

    def __init__(self, path: Path) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY)
            starts = [np.zeros(1, np.int64)]
            position = 0
            while block := os.pread(self._fd, _BLOCK, position):
                ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
                starts.append(ends.astype(np.int64) + (position + 1))
                position += len(block)
        except OSError as error:
            raise ConfigError(f"input {str(path)!r} cannot be read: {error.strerror}") from None
        self._starts = np.concatenate(starts)  # [lines + 1] bytes, the last one is the end of the file
        if self._starts[-1] < position:
            self._starts = np.append(self._starts, position)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> bytes:
        """The line without white space around it."""
        start, end = int(self._starts[number]), int(self._starts[number + 1])
        return os.pread(self._fd, end - start, start).strip()

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)

    def shard(self, index: int, count: int) -> list[int]:
        """Numbers of the lines that are not blank, every ``count``-th line from ``index``."""
        return [number for number in range(index, len(self), count) if self[number]]


def digest(line: bytes) -> str:
    """What tells one input line from another: 64 bits, hexadecimal."""
    return blake2b(line, digest_size=8).hexdigest()


def pipeline(lines: Lines, todo: Collection[int], prepare: Callable[[int, bytes], T], ahead: int) -> Iterator[T]:
    """``prepare(number, line)`` for each number in order, at most ``ahead`` of them before they are asked for, on a
    thread of their own."""
    if not todo:
        return iter(())
    dataset = grain.MapDataset.source(np.array(todo, np.int64)).map(lambda number: prepare(int(number), lines[number]))
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead)))

"""Fetches under way: pages from the host tier or the disk into staging memory on the device, while steps run.

Owns the staged arrays until a plan lands or refuses them, and the clock of each fetch. Decides nothing and never waits:
host pages are copied by ``device_put``, disk pages are read, checked and put by the disk tier's reader threads, a watcher
thread notes when copies have ended, and ``arrivals`` only looks. The engine looks once a step, which may be much later:
taken for the link's doing, that would speak against fetches that cost nothing. What does not come, or takes longer than
``LIMIT_S``, is reported as failed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import jax

from jaxkv.cache.trie import encode
from jaxkv.runtime.disk import DiskStore, Payload
from jaxkv.types import Arrival, Fetch, PageKey, PageMove, Tier

LIMIT_S = 10.0  # a fetch of some megabytes that takes longer is not worth waiting for


@dataclass(eq=False)
class _Flight:
    fetch: Fetch
    start: float
    host_bytes: int = 0  # read buffers
    copies: list[jax.Array] | None = None  # of each move; None: not read yet
    end: float | None = None  # on the device
    failed: bool = False
    reported: bool = False


def key_bytes(key: PageKey) -> tuple[bytes, bytes]:
    """Digest and encoded tokens, as the disk tier takes them."""
    return bytes.fromhex(key.digest), encode(key.tokens)


class Fetches:
    """``start`` and ``land`` in plan order; ``arrivals`` between plans. All on the engine's thread."""

    def __init__(self, page_bytes: list[int], on_device: jax.sharding.Sharding, disk: DiskStore | None,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._page_bytes = page_bytes
        self._on_device = on_device
        self.disk = disk
        self._clock = clock
        self._flights: dict[int, _Flight] = {}
        self._ended = dict.fromkeys(Tier, 0.0)  # when the latest fetch from a tier did that came
        self._watcher = ThreadPoolExecutor(1, "fetches")
        self._news = threading.Event()  # a fetch has ended since ``arrivals`` last looked

    def clear(self) -> None:
        """Forget everything under way."""
        self._flights.clear()

    @property
    def busy(self) -> bool:
        """Whether a fetch has not been reported."""
        return any(not flight.reported for flight in self._flights.values())

    def host_bytes_held(self) -> int:
        """Bytes of host memory that hold what was read from disk."""
        return sum(flight.host_bytes for flight in self._flights.values())

    def start(self, fetch: Fetch, host: dict[tuple[int, int], jax.Array]) -> None:
        """``host``: the host tier's pages by (group, page)."""
        flight = self._flights[fetch.id] = _Flight(fetch, self._clock())
        if not fetch.keys:
            flight.copies = jax.device_put([host[m.group, m.src[1]] for m in fetch.moves], self._on_device)
            self._watcher.submit(self._watch, flight)
            return
        assert self.disk is not None
        flight.host_bytes = sum(self._page_bytes[m.group] for m in fetch.moves)
        self.disk.read([key_bytes(key) for key in fetch.keys]).add_done_callback(
            lambda future: self._put(flight, future))

    def _put(self, flight: _Flight, future: Future[list[Payload]]) -> None:
        """On a reader thread: from the pages read to the device."""
        try:
            pages, moves = future.result(), flight.fetch.moves
            if len(pages) < len(flight.fetch.keys):
                self._fail(flight)
            else:
                flight.copies = jax.device_put([pages[m.src[1]][m.group] for m in moves], self._on_device)
                self._watcher.submit(self._watch, flight)
        except Exception:  # reported as a failed fetch: its pages are computed instead
            self._fail(flight)

    def _watch(self, flight: _Flight) -> None:
        try:
            jax.block_until_ready(flight.copies)
            flight.end = self._clock()
            self._news.set()
        except Exception:  # as above
            self._fail(flight)

    def _fail(self, flight: _Flight) -> None:
        flight.failed = True
        self._news.set()

    def arrivals(self) -> list[Arrival]:
        """Fetches that ended since the last call, oldest first."""
        out = []
        self._news.clear()
        for number, flight in self._flights.items():
            if flight.reported:
                continue
            now, end = self._clock(), flight.end
            if end is not None or flight.failed or now - flight.start > LIMIT_S:
                flight.reported = True
                tier = flight.fetch.moves[0].src[0]
                out.append(Arrival(number, end is not None, max(0.0, (end or now) - max(flight.start, self._ended[tier]))))
                self._ended[tier] = max(self._ended[tier], end or 0.0)
        return out

    def wait(self, seconds: float) -> None:
        """Sleep until a fetch under way has ended, at most ``seconds``."""
        if self.busy:
            self._news.wait(seconds)

    def land(self, fetch_id: int, wanted: bool) -> list[tuple[list[PageMove], list[jax.Array]]]:
        """What a fetch brought, by group: moves and their pages; nothing if it is not wanted."""
        flight = self._flights.pop(fetch_id)
        if not wanted:
            return []
        assert flight.copies is not None
        both = sorted(zip(flight.fetch.moves, flight.copies), key=lambda pair: pair[0].group)
        return [([move for move, _ in run], [copy for _, copy in run])
                for run in (list(pairs) for _, pairs in groupby(both, key=lambda pair: pair[0].group))]

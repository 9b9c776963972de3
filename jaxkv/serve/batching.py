"""The dynamic batching window: prompts that arrive within a moment go to the engine together.

``Window`` decides and knows no event loop; ``Batcher`` acts for it. A batch closes when it is full or when its oldest item
has waited long enough, whichever comes first; a prompt that arrives alone so waits ``max_wait`` seconds and no longer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Generic, TypeVar

from jaxkv.runtime.outputs import Delta
from jaxkv.serve.calls import Call
from jaxkv.serve.engine_loop import EngineLoop
from jaxkv.serve.errors import ApiError, generation_failed

T = TypeVar("T")


class Window(Generic[T]):
    """Items in the order they came, and when they leave. ``max_wait`` and ``clock`` are in seconds."""

    def __init__(self, max_batch: int, max_wait: float, clock: Callable[[], float]):
        self.max_batch, self.max_wait, self._clock = max_batch, max_wait, clock
        self._arrivals: dict[T, float] = {}

    def add(self, item: T) -> None:
        """A new item, the last in the order."""
        self._arrivals[item] = self._clock()

    def remove(self, item: T) -> None:
        """An item leaves without its batch; unknown ones are ignored (their batch may just have closed)."""
        self._arrivals.pop(item, None)

    @property
    def deadline(self) -> float | None:
        """When the present batch closes if it is not full before; None without items."""
        return next(iter(self._arrivals.values())) + self.max_wait if self._arrivals else None

    def take(self) -> list[T]:
        """The batch that is to close now, at most ``max_batch`` items, oldest first; empty if none is."""
        deadline = self.deadline
        if deadline is None or len(self._arrivals) < self.max_batch and self._clock() < deadline:
            return []
        batch = list(self._arrivals)[: self.max_batch]
        for item in batch:
            del self._arrivals[item]
        return batch


class Batcher:
    """Hands calls to the engine in the batches of a window. Belongs to the event loop's thread."""

    def __init__(self, loop: EngineLoop, max_batch: int, max_wait: float):
        self._loop = loop
        self._window: Window[Call] = Window(max_batch, max_wait, time.monotonic)
        self._timer: asyncio.TimerHandle | None = None

    async def run(self, calls: Sequence[Call]) -> list[Delta]:
        """The last delta of every call, in their order; they share a mailbox and at most a batch of them is under way.
        Raises how the engine refused one. Cancelled or failed, it leaves nothing behind."""
        done: dict[Call, Delta] = {}
        size = self._window.max_batch
        try:
            for start in range(0, len(calls), size):
                for call in calls[start : start + size]:
                    self._window.add(call)
                    self._close()
                while len(done) < min(start + size, len(calls)):
                    done |= {call: delta for call, delta in await calls[0].mailbox.next() if delta.finish_reason}
                for delta in done.values():
                    if delta.finish_reason == "error":
                        raise generation_failed(delta.error)
        finally:
            for call in calls:
                self._window.remove(call)
            self._loop.abort(calls)
        return [done[call] for call in calls]

    def _submit(self, calls: list[Call]) -> None:
        """Submits calls together or, where not all fit, those of one HTTP request after the other."""
        try:
            self._loop.submit(calls)
        except ApiError as error:
            requests = [list(group) for _, group in groupby(calls, key=lambda call: call.mailbox)]
            if len(requests) == 1:
                calls[0].mailbox.fail(error)
            else:
                for request in requests:
                    self._submit(request)

    def _close(self) -> None:
        """Submits what is due and sleeps until the next deadline."""
        while batch := self._window.take():
            self._submit(batch)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if (deadline := self._window.deadline) is not None:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, deadline - time.monotonic()), self._close)

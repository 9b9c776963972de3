"""One prompt that is open at the engine, and the mailbox in which its answers arrive.

A ``Call`` is changed on one thread only, in the server that of the event loop; the engine's reads what it was made with.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from jaxkv.params import CacheHints, SamplingParams
from jaxkv.runtime.outputs import Delta
from jaxkv.types import Logprobs, Start


class Mailbox:
    """What arrives for one HTTP request: (call, delta) in order, pushed and awaited on the event loop."""

    __slots__ = ("_error", "_items", "_waiter")

    def __init__(self) -> None:
        self._items: list[tuple[Call, Delta]] = []
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def next(self) -> list[tuple[Call, Delta]]:
        """Everything since the last call, at least one delta. Raises how the request failed."""
        while not self._items:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        items, self._items = self._items, []
        return items

    def put(self, call: Call, delta: Delta) -> None:
        """Adds a delta and wakes the consumer."""
        self._items.append((call, delta))
        self._wake()

    def fail(self, error: Exception) -> None:
        """Ends the request after what has already arrived; the first error stays."""
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@dataclass(eq=False, slots=True)
class Call:
    """One prompt for the engine and where its ``params.n`` answers go."""

    id: str
    prompt: list[int]
    params: SamplingParams
    mailbox: Mailbox
    position: int = 0  # among the prompts of one HTTP request
    text: str | None = None  # the prompt as it came, None for token ids
    hints: CacheHints = field(default_factory=CacheHints)
    arrival: float = field(default_factory=time.monotonic)
    first: float = 0.0  # time of the first token, 0: none yet
    last: dict[int, float] = field(default_factory=dict)  # child -> time of its latest token
    start: Start | None = None  # of the child that gave the first token
    tokens: int = 0  # of all children
    cached: int = 0  # prompt tokens found in the cache
    reasons: list[str] = field(default_factory=list)  # why children finished, in the order they did
    prompt_logprobs: tuple[Logprobs, ...] = ()  # of prompt[1:], if asked for, from the first child

    @property
    def scored(self) -> bool:
        """Whether the prompt has all log-probabilities that were asked for."""
        return self.params.prompt_logprobs is None or len(self.prompt_logprobs) == len(self.prompt) - 1

"""A thread for work that would hold the event loop up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass
class Worker:
    """Does one thing at a time; what is at most ``inline`` characters, bytes or tokens large is done on the event loop."""

    name: str
    inline: int
    _pool: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, self.name)

    async def run(self, size: int, work: Callable[[], T]) -> T:
        """What ``work`` gives."""
        return work() if size <= self.inline else await asyncio.get_running_loop().run_in_executor(self._pool, work)

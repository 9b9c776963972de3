"""A machine in a virtual clock: runs plans of the real Scheduler and CacheController and says when what would be done.

Owns the model of time, nothing else: tokens come from the caller, and no KV is computed. A step takes
``base + per_token * tokens + per_position * sum(positions)`` seconds. A link is a serial queue, each transfer takes
``latency + bytes / rate``; what comes from disk crosses the disk's link, then the host's,
which others may use at the same time. Fetches go on while steps run
and are noticed between steps; moves of a plan delay its step, in both directions, which share no bandwidth.
The loop is the engine's: step n + 1 is planned before step n is read.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from jaxkv.sched.scheduler import Scheduler
from jaxkv.types import Arrival, Fetch, PageMove, Request, StepPlan, StepResult, Tier


@dataclass(frozen=True)
class Machine:
    """Seconds of a step, and bytes of a page."""

    name: str
    base: float
    per_token: float
    per_position: float
    page_bytes: int

    def step_seconds(self, plan: StepPlan) -> float:
        if not plan.chunks:
            return 0.0
        positions = sum(len(c.tokens) * (2 * c.start + len(c.tokens) - 1) / 2 for c in plan.chunks)
        return self.base + self.per_token * plan.num_tokens + self.per_position * positions


class Link:
    """A serial queue. ``rate``: bytes per second at a time, so that it may change."""

    def __init__(self, rate: Callable[[float], float], latency: float) -> None:
        self._rate = rate
        self._latency = latency
        self._free = 0.0

    def seconds(self, now: float, size: int) -> float:
        """What a transfer takes that begins now."""
        return self._latency + size / self._rate(now)

    def send(self, now: float, size: int) -> float:
        """When a transfer of ``size`` bytes that is asked for at ``now`` ends."""
        start = max(now, self._free)
        self._free = start + self.seconds(start, size)
        return self._free


class VirtualDisk:
    """A ``DiskIndex`` of unlimited size."""

    def __init__(self) -> None:
        self._pages: set[bytes] = set()

    def save(self, digest: str) -> None:
        self._pages.add(bytes.fromhex(digest))

    def match(self, keys: list[bytes]) -> int:
        return sum(1 for _ in itertools.takewhile(self._pages.__contains__, keys))


class VirtualEngine:
    """Serves requests to the end. ``answer``: the token of a request at an index; ``disk`` is told what was saved."""

    def __init__(self, scheduler: Scheduler, machine: Machine, host: tuple[Link, Link], disk_link: Link,
                 disk: VirtualDisk, answer: Callable[[str, int], int]) -> None:
        self._scheduler = scheduler
        self._machine = machine
        self._in, self._out = host
        self._disk_link = disk_link
        self._disk = disk
        self._answer = answer
        self._flying: list[tuple[float, int, Tier, float]] = []  # when it ends, fetch, tier, when it began
        self._ended = dict.fromkeys(Tier, 0.0)  # when the latest fetch from a tier ended
        self._sampled: dict[str, int] = {}
        self._device_free = 0.0
        self.first_token: dict[str, float] = {}  # request -> seconds from its arrival
        self.now = 0.0

    def run(self, requests: Iterable[Request]) -> None:
        """Add every request when it arrives, and go on until all have ended."""
        due = sorted(requests, key=lambda one: one.arrival)[::-1]
        arrivals = {one.id: one.arrival for one in due}
        pending: tuple[StepPlan, StepResult, float] | None = None
        while due or pending or self._scheduler.has_work or self._flying:
            while due and due[-1].arrival <= self.now:
                self._scheduler.add(due.pop())
            while self._flying and self._flying[0][0] <= self.now:
                end, fetch_id, tier, start = heapq.heappop(self._flying)
                self._scheduler.arrived(Arrival(fetch_id, True, end - max(start, self._ended[tier])))
                self._ended[tier] = end
            plan = self._scheduler.plan(self.now)
            before, pending = pending, None
            if plan is not None:
                pending = plan, self._result(plan), self._submit(plan)
            if before is not None:
                done, result, end = before
                self.now = max(self.now, end)
                for event in self._scheduler.commit(done, result, self.now):
                    self.first_token.setdefault(event.request_id, self.now - arrivals[event.request_id])
            elif plan is None:
                coming = [at for at, *_ in self._flying[:1]] + [one.arrival for one in due[-1:]]
                self.now = max(self.now, min(coming, default=self.now))

    def _submit(self, plan: StepPlan) -> float:
        """When the step of a plan ends."""
        ready = max(self.now, self._device_free)
        inward = [m for m in plan.moves if m.src[0] is Tier.HOST and m.dst and m.dst[0] is Tier.HBM]
        outward = [m for m in plan.moves if m.src[0] is Tier.HBM and m.dst and m.dst[0] is not Tier.HBM]
        begin = max([ready, *(link.send(at, self._bytes(moves)) for link, at, moves in
                              ((self._in, self.now, inward), (self._out, ready, outward)) if moves)])
        for key in plan.saves:
            self._disk.save(key.digest)
        for fetch in plan.fetches:
            heapq.heappush(self._flying, (self._fetch(fetch), fetch.id, fetch.moves[0].src[0], self.now))
        self._device_free = begin + self._machine.step_seconds(plan)
        return self._device_free

    def _fetch(self, fetch: Fetch) -> float:
        """When a fetch arrives."""
        size = self._bytes(fetch.moves)
        if not fetch.keys:
            return self._in.send(self.now, size)
        read = self._disk_link.send(self.now, size)
        return read + self._in.seconds(read, size)

    def _bytes(self, moves: Iterable[PageMove]) -> int:
        return sum(self._machine.page_bytes for _ in moves)

    def _result(self, plan: StepPlan) -> StepResult:
        tokens = []
        for chunk in plan.chunks:
            count = self._sampled.get(chunk.request_id, 0)
            tokens.append(tuple(self._answer(chunk.request_id, count + i) for i in range(chunk.num_logits)))
            self._sampled[chunk.request_id] = count + chunk.num_logits
        return StepResult(tuple(tokens))

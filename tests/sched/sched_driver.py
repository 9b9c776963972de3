"""Runs a Scheduler with the real CacheController against the simulated device, checking every plan on the way.

The driver is the engine's loop without JAX: plan, submit, and read the step before (overlap) or this one (no overlap).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from jaxkv.cache.controller import CacheController
from jaxkv.config import SchedConfig
from jaxkv.params import SamplingParams
from jaxkv.sched.replay import RecordedDisk, Recorder, replay
from jaxkv.sched.scheduler import Scheduler
from jaxkv.sequence import Sequence, Status
from jaxkv.types import Arrival, DiskIndex, KVGroup, Logprobs, Request, StepPlan, StepResult, TokenEvent
from tests.sim_device import SimDevice

FULL = (KVGroup((0, 1), 2, 8, "float32"),)
FULL_AND_WINDOW = (KVGroup((0,), 2, 8, "float32"), KVGroup((1,), 2, 8, "float32", window=10))
WINDOWS = (KVGroup((0, 1), 2, 8, "float32", window=10), KVGroup((2,), 2, 8, "float32", window=6))


def request(name: str, prompt: Iterable[int], max_tokens: int = 4, **fields: Any) -> Request:
    params = fields.pop("params", SamplingParams())
    return Request(name, tuple(prompt), params, max_tokens, **fields)


def children(name: str, prompt: Iterable[int], n: int, max_tokens: int = 4, **fields: Any) -> list[Request]:
    params = replace(fields.pop("params", SamplingParams()), n=n)
    return [request(f"{name}.{child}", prompt, max_tokens, params=params, child=child, parent=name, **fields)
            for child in range(n)]


def scheduled(driver: Driver, name: str) -> int:
    """Tokens of a request that were computed."""
    return sum(len(c.tokens) for p in driver.plans for c in p.chunks if c.request_id == name)


@dataclass(frozen=True)
class Settings:
    pages: int = 400  # per group
    host_pages: int = 0
    policy: str = "lfu"
    groups: tuple[KVGroup, ...] = FULL
    page_size: int = 4
    max_num_seqs: int = 8
    budget: int = 64
    chunked: bool = True
    overlap: int = 0  # plans submitted before the one before them is read
    max_model_len: int = 64
    caching: bool = True
    step_sizes: tuple[int, ...] = ()
    disk: bool = False
    fetch_pages: int = 8
    delay: int = 2  # steps that a fetch takes
    failures: int = 0  # every so many fetches one fails; 0: none

    def scheduler(self, disk: DiskIndex | None = None) -> Scheduler:
        """A fresh scheduler with a fresh cache."""
        count = len(self.groups)
        cache = CacheController(self.groups, self.page_size, (self.pages,) * count, (self.host_pages,) * count,
                                self.policy, "salt", self.caching, disk, fetch_pages=self.fetch_pages)
        return Scheduler(SchedConfig(self.max_num_seqs, self.budget, self.chunked, self.overlap > 0), cache,
                         self.max_model_len, step_sizes=self.step_sizes)


class Driver:
    def __init__(self, device: type[SimDevice] = SimDevice, **settings: Any) -> None:
        s = self.settings = Settings(**settings)
        self.device = device(s.groups, s.page_size, (s.pages,) * len(s.groups), (s.host_pages,) * len(s.groups))
        self.inner = s.scheduler(self.device if s.disk else None)
        self.log: list[dict[str, Any]] = []
        self.scheduler = Recorder(self.inner, self.log.append)
        self.fetched = 0  # fetches that ended
        self.decodes_while_fetching = 0
        self._due: deque[tuple[int, float]] = deque()  # fetch, when it ends
        self.plans: list[StepPlan] = []
        self.events: list[TokenEvent] = []
        self.requests: dict[str, Request] = {}
        self.tokens: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}
        self.cached: dict[str, int] = {}
        self.cached_below: dict[str, tuple[int, int]] = {}
        self.submitted_before_read = 0
        self.lost_late = False  # that a step failed is known when it is read, not when it is submitted
        self.holes = 0  # pages of window groups seen out of the window
        self.preemptions_while_in_flight = 0
        self._unread: deque[tuple[StepPlan, StepResult]] = deque()
        self.clock = 0.0

    # ---- the engine's part

    def add(self, *requests: Request) -> None:
        for one in requests:
            self.device.add(one)
            self.requests[one.id] = one
            self.tokens[one.id] = []
            self.scheduler.add(one)

    def abort(self, request_id: str) -> None:
        if self.scheduler.abort(request_id):
            self.reasons[request_id] = "abort"
            self.check()

    def step(self) -> StepPlan | None:
        """Plan, submit, read what is due: an engine has overlap 0 or 1, more shows that nothing depends on it."""
        self.clock += 1.0
        while self._due and self._due[0][1] <= self.clock:
            fetch_id, _ = self._due.popleft()
            self.fetched += 1
            ok = not self.settings.failures or self.fetched % self.settings.failures > 0
            self.scheduler.arrived(Arrival(fetch_id, ok, float(self.settings.delay)))
            self.check()
        before = {seq: seq.in_flight for seq in self.inner._roster.running}
        plan = self.scheduler.plan(self.clock) if self.scheduler.has_work or self.inner.cache.loading else None
        if plan is not None:
            self.check_plan(plan, before)
            self.submitted_before_read += bool(self._unread)
            self._unread.append((plan, self.execute(plan)))
            self.plans.append(plan)
            self.decodes_while_fetching += bool(self._due) and any(len(c.tokens) == 1 for c in plan.chunks)
            self._due.extend((fetch.id, self.clock + self.settings.delay) for fetch in plan.fetches)
        noticed = bool(self._unread) and self._unread[-1][1].failed and not self.lost_late
        keep = self.settings.overlap if plan is not None and not noticed else 0
        while len(self._unread) > keep:
            self.read()
        return plan

    def execute(self, plan: StepPlan) -> StepResult:
        """The device's result, with prompt log-probabilities that name the token and its position."""
        reports = []
        for chunk in plan.chunks:
            following = (*chunk.tokens[1:], *((chunk.next_token,) if chunk.next_token >= 0 else ()))
            reports.append(tuple(Logprobs(token, 0.0, position, ())
                                 for position, token in enumerate(following, chunk.start + 1))
                           if chunk.prompt_logprobs else ())
        return replace(self.device.apply(plan), prompt_logprobs=tuple(reports))

    def read(self) -> None:
        plan, result = self._unread.popleft()
        for event in self.scheduler.commit(plan, result, self.clock):
            assert event.request_id not in self.reasons, "an event of a sequence that ended"
            self.events.append(event)
            self.tokens[event.request_id].extend(event.tokens)
            self.cached[event.request_id], self.cached_below[event.request_id] = event.num_cached, event.cached_below
            assert min(event.cached_below) >= 0 and sum(event.cached_below) <= event.num_cached
            if event.finish_reason:
                self.reasons[event.request_id] = event.finish_reason
        if result.failed:
            self._unread.clear()
            self._due.clear()
            self.device.restore(self.inner.cache.host_pages())
        self.check()

    def replayed(self, log: list[dict[str, Any]]) -> list[StepPlan]:
        """The plans of a fresh scheduler that is fed ``log``."""
        return replay(log, self.settings.scheduler(RecordedDisk(log) if self.settings.disk else None))

    def run(self, max_steps: int = 2000) -> None:
        """Until nothing is left; no progress within ``max_steps`` is a deadlock."""
        for _ in range(max_steps):
            if not self.scheduler.has_work and not self._unread and not self._due and not self.inner.cache.loading:
                break
            self.step()
        assert not self.scheduler.has_work, "requests are stuck"
        self.check()

    # ---- what must always hold

    def check(self) -> None:
        self.inner.check()

    def check_plan(self, plan: StepPlan, before: dict[Sequence, int]) -> None:
        """Budget, slots and admits are sound; what decoded before goes on decoding or was preempted."""
        s = self.settings
        self.check()
        assert plan.id == len(self.plans)
        assert plan.num_tokens <= s.budget
        slots = [chunk.slot for chunk in plan.chunks]
        assert len(set(slots)) == len(slots) <= s.max_num_seqs
        chunk_of = {chunk.request_id: chunk for chunk in plan.chunks}
        for admit in plan.admits:
            assert chunk_of[admit.request_id].slot == admit.slot
            assert all(first == 0 for first, _ in chunk_of[admit.request_id].pages)
        victims = 0
        for seq, in_flight in before.items():
            if seq.status is Status.WAITING:
                victims += 1
                self.preemptions_while_in_flight += bool(in_flight)
                assert seq.request.id not in chunk_of
            elif seq.request.needs_last_token and in_flight:
                assert seq.request.id not in chunk_of, "planned without its last token"
            elif len(seq.tokens) + in_flight - len(seq.request.prompt) < seq.request.max_tokens:
                assert seq.request.id in chunk_of or len(seq.tokens) < len(seq.request.prompt), "a decode stalls"
        assert not (victims and plan.admits), "preempted to admit"
        for seq in self.inner._roster.running:
            self.holes += sum(pages.count(-1) for pages in seq.pages)

    def check_outputs(self) -> None:
        """Everything that was not aborted answered exactly what the device's model answers when it runs alone."""
        for name, one in self.requests.items():
            want = self.device.reference(one)
            if self.reasons[name] in ("abort", "error"):
                assert self.tokens[name] == want[:len(self.tokens[name])], name
            else:
                assert self.tokens[name] == want, name
                assert self.reasons[name] == ("stop" if want[-1] in one.stop_ids else "length")
                reported = [item.rank for e in self.events if e.request_id == name for item in e.prompt_logprobs]
                assert reported == ([] if one.params.prompt_logprobs is None else list(range(1, len(one.prompt))))

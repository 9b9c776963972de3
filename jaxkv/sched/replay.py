"""Record what a scheduler was told and replay it: the plans must come out identical.

Owns the event format (one JSON object per call). Owns no decision: what is recorded are the inputs only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from jaxkv.sched.scheduler import Scheduler
from jaxkv.types import Arrival, DiskIndex, Request, StepPlan, StepResult, TokenEvent


class Recorder:
    """A scheduler that hands every input to ``sink`` (say, ``list.append``) as a JSON-ready dict before acting on it.

    Results are recorded without log-probabilities: they decide nothing.
    """

    def __init__(self, scheduler: Scheduler, sink: Callable[[dict[str, Any]], None]) -> None:
        self._scheduler = scheduler
        self._sink = sink
        cache = scheduler.cache
        if cache.disk is not None:
            cache.disk = _Listener(cache.disk, sink)

    def add(self, request: Request) -> None:
        self._sink({"event": "add", "request": request.to_dict()})
        self._scheduler.add(request)

    def abort(self, request_id: str) -> bool:
        return self.finish(request_id, "abort")

    def finish(self, request_id: str, reason: str) -> bool:
        self._sink({"event": "finish", "request_id": request_id, "reason": reason})
        return self._scheduler.finish(request_id, reason)

    def plan(self, now: float) -> StepPlan | None:
        self._sink({"event": "plan", "now": now})
        return self._scheduler.plan(now)

    def plan_saves(self, pages: int, now: float) -> StepPlan | None:
        self._sink({"event": "saves", "pages": pages, "now": now})
        return self._scheduler.plan_saves(pages, now)

    def lose_host_tier(self) -> None:
        self._sink({"event": "host lost"})
        self._scheduler.lose_host_tier()

    def arrived(self, arrival: Arrival) -> None:
        self._sink({"event": "arrived", "arrival": asdict(arrival)})
        self._scheduler.arrived(arrival)

    def commit(self, plan: StepPlan, result: StepResult, now: float) -> list[TokenEvent]:
        self._sink({"event": "commit", "plan": plan.id, "tokens": result.tokens, "failed": result.failed, "now": now})
        return self._scheduler.commit(plan, result, now)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scheduler, name)  # counters


class _Listener:
    """A disk tier whose answers are recorded."""

    def __init__(self, disk: DiskIndex, sink: Callable[[dict[str, Any]], None]) -> None:
        self._disk = disk
        self._sink = sink

    def match(self, keys: list[bytes]) -> int:
        pages = self._disk.match(keys)
        self._sink({"event": "disk", "pages": pages})
        return pages

    def forget(self, keys: list[bytes]) -> None:
        self._disk.forget(keys)


class RecordedDisk:
    """The disk tier of a replay: gives the recorded answers in their order."""

    def __init__(self, events: Iterable[dict[str, Any]]) -> None:
        self._answers = iter([event["pages"] for event in events if event["event"] == "disk"])

    def match(self, keys: list[bytes]) -> int:
        return next(self._answers)

    def forget(self, keys: list[bytes]) -> None: ...


def replay(events: Iterable[dict[str, Any]], scheduler: Scheduler) -> list[StepPlan]:
    """Feed recorded inputs to a fresh scheduler with a fresh cache of the same settings; the plans it makes.

    If the cache had a disk tier, the fresh one's is ``RecordedDisk(events)``.
    """
    plans: list[StepPlan] = []
    for event in events:
        match event["event"]:
            case "add":
                scheduler.add(Request.from_dict(event["request"]))
            case "finish":
                scheduler.finish(event["request_id"], event["reason"])
            case "plan":
                if (plan := scheduler.plan(event["now"])) is not None:
                    plans.append(plan)
            case "saves":
                if (plan := scheduler.plan_saves(event["pages"], event["now"])) is not None:
                    plans.append(plan)
            case "commit":
                result = StepResult(tuple(tuple(tokens) for tokens in event["tokens"]), failed=event["failed"])
                scheduler.commit(plans[event["plan"]], result, event["now"])
            case "arrived":
                scheduler.arrived(Arrival(**event["arrival"]))
            case "host lost":
                scheduler.lose_host_tier()
            case unknown if unknown != "disk":  # those are given by RecordedDisk
                raise ValueError("event must be add, finish, plan, saves, commit, arrived, host lost or disk, "
                                 f"got {unknown!r}")
    return plans

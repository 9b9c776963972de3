"""Timing of calls that a device runs behind the host's back.

A *candidate* enqueues a run of several calls and names what to wait for. Candidates of one shape are sampled in turn, so that
a disturbance of the machine meets all of them; each sample is one run long enough to hide the wait.
"""

from __future__ import annotations

import faulthandler
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple


@contextmanager
def ends_within(seconds: float) -> Iterator[None]:
    """Ends the process with a traceback of all threads and exit status 1 if the body takes longer, whatever it hangs in."""
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


class Candidate(NamedTuple):
    """run: enqueues `calls` calls and returns a handle; wait: returns when the handle's work is done."""

    run: Callable[[], Any]
    wait: Callable[[Any], Any]
    calls: int


class Timing(NamedTuple):
    """Seconds per call: the median of `samples` samples, the lowest and the highest."""

    median: float
    low: float
    high: float
    samples: int


def time_together(candidates: Mapping[str, Candidate], *, samples: int = 7, sample_s: float = 0.05) -> dict[str, Timing]:
    """Each candidate once to warm up, once to see how long it takes, then `samples` times in turn; fewer when they take more
    than 2 seconds together, but one at least."""
    runs, times = {}, {name: [] for name in candidates}
    for name, candidate in candidates.items():
        candidate.wait(candidate.run())
        runs[name] = max(1, round(sample_s / _once(candidate, 1)))
    for number in range(samples):
        for name, candidate in candidates.items():
            if number == 0 or sum(times[name]) * runs[name] < 2.0:
                times[name].append(_once(candidate, runs[name]))
    return {name: Timing(statistics.median(t), min(t), max(t), len(t)) for name, t in (
        (name, [x / candidates[name].calls for x in t]) for name, t in times.items())}


def _once(candidate: Candidate, runs: int) -> float:
    """Seconds per run."""
    start = time.perf_counter()
    for _ in range(runs):
        handle = candidate.run()
    candidate.wait(handle)
    return (time.perf_counter() - start) / runs

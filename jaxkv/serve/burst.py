"""How long an idle engine waits for the other requests of a burst.

What clients send together arrives milliseconds apart, and a step that has begun takes no more prompts: the first would have
a step to itself while all others wait for it to end. So an idle engine first waits a moment behind each arrival, but never
longer than a small share of what computing the prompts it has would take if nothing of them were cached.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from jaxkv.serve.calls import Call

SHARE = 0.02  # of the time that the prompts would take
GAP_S = 0.002  # without an arrival: the burst is over
LONGEST_S = 0.02


def settle(wakeup: threading.Condition, calls: list[Call], prefill_seconds: Callable[[int], float]) -> None:
    """Returns when the burst is over, or patience. The caller holds the lock of ``wakeup``, which tells that ``calls`` has
    grown; ``prefill_seconds`` says what a prompt of so many tokens takes, 0 while that is not known."""
    start = time.monotonic()
    while (left := start + _patience(calls, prefill_seconds) - time.monotonic()) > 0:
        count = len(calls)
        if not wakeup.wait_for(lambda count=count: len(calls) > count, min(GAP_S, left)):  # type: ignore[misc]
            return


def _patience(calls: list[Call], prefill_seconds: Callable[[int], float]) -> float:
    """Seconds from the first arrival that such prompts may wait for others."""
    return min(LONGEST_S, SHARE * sum(prefill_seconds(len(call.prompt)) for call in calls))

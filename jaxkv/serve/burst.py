"""How long an idle engine waits for the other requests of a burst.

What clients send together arrives milliseconds apart, and a step that has begun takes no more prompts: the first would have
a step to itself while all others wait for it to end. So an idle engine first waits a moment, for 2 ms behind each arrival, but
never longer than a small share of what computing the prompts it already has takes (without what the cache spares).
"""

from __future__ import annotations

import threading
import time

from jaxkv.serve.calls import Call

SHARE = 0.02  # of the time that the prompts take
GAP_S = 0.002  # without an arrival: the burst is over
LONGEST_S = 0.02
MANY = 64  # tokens of a step that is worth timing


class Burst:
    """Knows the engine's pace from its steps. Belongs to the engine thread."""

    def __init__(self) -> None:
        self._token_s = 0.0  # seconds per token, of the quickest step so far; 0: not known yet
        self._computed = self._before = 0

    def note(self, computed: int, seconds: float) -> None:
        """A round of the engine took so long and ended with so many tokens computed since its start. What a round waits
        for is the step submitted in the round before (without overlap it is its own: the pace is then taken for too
        quick, and waits are too short)."""
        if self._before >= MANY:
            pace = seconds / self._before
            self._token_s = min(self._token_s or pace, pace)
        self._before, self._computed = computed - self._computed, computed

    def patience(self, calls: list[Call]) -> float:
        """Seconds from the first arrival that such prompts may wait for others."""
        return min(LONGEST_S, SHARE * self._token_s * sum(len(call.prompt) for call in calls))

    def settle(self, wakeup: threading.Condition, calls: list[Call]) -> None:
        """Returns when the burst is over, or patience. The caller holds the lock of ``wakeup``, which tells that ``calls``
        has grown."""
        start = time.monotonic()
        while (left := start + self.patience(calls) - time.monotonic()) > 0:
            count = len(calls)
            if not wakeup.wait_for(lambda count=count: len(calls) > count, min(GAP_S, left)):  # type: ignore[misc]
                return

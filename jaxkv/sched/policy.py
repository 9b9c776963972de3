"""The order in which sequences are served.

Owns the sort key, nothing else: who fits, how long a chunk is and who is preempted follow from that one order.
"""

from __future__ import annotations

from typing import Protocol

from jaxkv.sequence import Sequence


class SchedulerPolicy(Protocol):
    """A total order over sequences, ties broken by the order of arrival at the scheduler."""

    def key(self, seq: Sequence) -> tuple[float, ...]:
        """Sort key, smallest first. Read once, when the sequence arrives: of equal length and fixed from then on."""
        ...


class FCFS:
    """First come, first served within a priority (Orca, Yu et al., OSDI 2022); lower priorities run earlier."""

    def key(self, seq: Sequence) -> tuple[float, ...]:
        return (seq.request.priority, seq.request.arrival)

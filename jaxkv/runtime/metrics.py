"""What the engine counts: plain numbers that the engine's one thread writes and any thread may read.

Owns the names, units and meanings of the counters and a histogram small enough for the hot path. Owns no text format
(``jaxkv.serve.metrics`` renders Prometheus) and no clock. Standard library only. Nothing here takes a lock: every
field is one Python number, and a reader may see step n of one counter and step n + 1 of the next.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

STAGES = ("plan", "moves", "pack", "dispatch", "wait", "commit", "output")  # host time of a step; "wait" is idle
TIERS = ("device", "host", "disk")
EVICTIONS = ("demoted", "dropped", "hole", "superseded")  # a hole: one window group's page
LINKS = ("device-device", "device-host", "host-device", "device-disk", "host-disk", "disk-device")
DISK_FAULTS = ("corrupt", "refused", "lost", "write_errors", "read_errors")
REASONS = ("stop", "length", "abort", "error")
LATENCY_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(slots=True)
class TierUsage:
    """Fill of one memory tier, summed over KV groups. Pages and tokens of a tier without memory are 0."""

    pages_used: int = 0  # referenced or cached
    pages_active: int = 0  # of those, pages that running sequences hold: not evictable
    pages_total: int = 0
    tokens_total: int = 0
    bytes_used: int = 0
    bytes_total: int = 0

    @property
    def active_fraction(self) -> float:
        """Share of the tier that running sequences hold, 0..1."""
        return self.pages_active / self.pages_total if self.pages_total else 0.0


@dataclass(slots=True)
class EngineMetrics:
    """Gauges and ever-growing counters of one engine. Tokens count positions, times are seconds."""

    # gauges
    running: int = 0  # sequences, a child of n > 1 counts as one
    waiting: int = 0
    device: TierUsage = field(default_factory=TierUsage)
    host: TierUsage = field(default_factory=TierUsage)
    disk: TierUsage = field(default_factory=TierUsage)
    disk_staging_bytes: int = 0  # host memory with pages on their way to or from the disk
    # requests
    prompt_tokens: int = 0  # of accepted requests, once for all n children
    generation_tokens: int = 0  # delivered, end-of-sequence tokens included
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))  # keys never change
    # prefix cache
    prefix_query_tokens: int = 0  # prompt tokens looked up at admission
    prefix_hit_tokens: int = 0  # of those found, in any tier
    hit_tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(TIERS, 0))  # tokens not computed, by tier
    partial_copies: int = 0  # partly matching pages copied into a private page
    evictions: dict[str, int] = field(default_factory=lambda: dict.fromkeys(EVICTIONS, 0))  # pages that left a tier
    offloads: int = 0  # of the demoted pages those that left ahead of need
    promotions: int = 0  # pages moved host -> device
    loads: int = 0  # prefixes brought ahead of their sequences
    failed_loads: int = 0  # of those, computed instead because their pages did not come
    cancelled_loads: int = 0  # and because others needed the room
    recomputed_tokens: int = 0  # found below the device and computed because that was quicker
    page_waits: int = 0  # sequences that waited for pages
    page_wait_seconds: float = 0.0
    saved_pages: int = 0  # handed to the disk tier
    bytes_moved: dict[str, int] = field(default_factory=lambda: dict.fromkeys(LINKS, 0))  # keys never change
    disk_faults: dict[str, int] = field(default_factory=lambda: dict.fromkeys(DISK_FAULTS, 0))
    preemptions: int = 0
    curve: tuple[tuple[float, float], ...] = ()  # (bytes of device and host KV together, page hit rate they would give)
    # steps
    steps: int = 0
    lost_steps: int = 0  # the device had no memory for: their requests ended, all others went back to waiting
    computed_tokens: int = 0  # positions run through the model
    stage_seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))  # keys never change
    # facts fixed at start: e.g. kv_layout, dtype, platform, eviction_policy
    info: dict[str, str] = field(default_factory=dict)


class Histogram:
    """Counts of observations by upper bound, as Prometheus means them (value <= bound). One writer."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float] = LATENCY_BUCKETS):
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)  # the last one: above every bound
        self.total = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Adds `times` observations of the same value."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def buckets(self) -> list[tuple[str, int]]:
        """(upper bound as text, observations up to it), cumulative, ending with +Inf."""
        rows, seen = [], 0
        for bound, count in zip((*map(str, self.bounds), "+Inf"), self.counts):
            seen += count
            rows.append((bound, seen))
        return rows

"""Brings the cache's counters and the tiers' into the engine's metrics: a few assignments a step."""

from __future__ import annotations

from jaxkv.cache.stats import CacheStats
from jaxkv.runtime.metrics import DISK_FAULTS, TIERS, EngineMetrics
from jaxkv.runtime.tiers import Tiers
from jaxkv.types import Tier

DISK_STEPS = 16
_SAME = ("partial_copies", "promotions", "offloads", "loads", "failed_loads", "cancelled_loads", "recomputed_tokens",
         "page_waits", "page_wait_seconds")
_LINKS = {(a, b): f"{TIERS[a]}-{TIERS[b]}" for a in Tier for b in Tier if (a, b) != (Tier.HOST, Tier.HOST)}


def refresh_cache(metrics: EngineMetrics, stats: CacheStats, tiers: Tiers, idle: bool) -> None:
    """Once a step; the disk tier's counters take locks and are read every ``DISK_STEPS`` steps and when ``idle``."""
    for name in _SAME:
        setattr(metrics, name, getattr(stats, name))
    metrics.saved_pages = stats.saves
    below = stats.host_hit_tokens + stats.disk_hit_tokens
    metrics.hit_tokens = {"device": stats.hit_tokens - below, "host": stats.host_hit_tokens, "disk": stats.disk_hit_tokens}
    metrics.evictions = {"demoted": stats.demotions, "dropped": stats.evictions, "hole": stats.holes,
                         "superseded": stats.supersedes}
    for pair, count in tiers.bytes_moved.items():
        if count:
            metrics.bytes_moved[_LINKS[pair]] = count
    if tiers.disk is not None and (idle or metrics.steps % DISK_STEPS == 0):
        disk = tiers.disk.stats()
        metrics.disk_staging_bytes = tiers.disk_staging_bytes()
        metrics.disk.pages_used, metrics.disk.bytes_used = disk.pages, disk.bytes
        metrics.disk.bytes_total = tiers.disk.capacity
        metrics.disk_faults = {name: getattr(disk, name) for name in DISK_FAULTS}

"""Counters of the cache. Owns no meaning beyond them: rates and metric names belong to the runtime."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class CacheStats:
    """Counters since the start. A page here is one page of every KV group."""

    query_tokens: int = 0  # tokens of sequences at admission, the one that always runs included
    hit_tokens: int = 0  # those found in any tier
    host_hit_tokens: int = 0  # of the found ones those that came from the host tier
    disk_hit_tokens: int = 0  # and from disk
    demotions: int = 0  # pages HBM -> HOST
    promotions: int = 0  # pages HOST -> HBM
    evictions: int = 0  # pages dropped for room: their KV is lost
    holes: int = 0  # pages of one window group dropped for room
    partial_copies: int = 0  # pages copied because a match ended inside
    page_waits: int = 0  # sequences that waited for pages before they entered
    page_wait_seconds: float = 0.0  # how long, together
    loads: int = 0  # sequences whose pages came while others ran
    failed_loads: int = 0  # those whose pages did not come: computed instead
    cancelled_loads: int = 0  # those given up, for room or as their link became slow
    offloads: int = 0  # demoted pages that left ahead of need
    recomputed_tokens: int = 0  # found below HBM, and quicker to compute than to bring
    saves: int = 0  # pages handed to the disk tier
    splits: int = 0
    claims: int = 0  # ANSWER nodes that became PROMPT
    swaps: int = 0  # pages computed twice: the trie's page replaced the sequence's
    supersedes: int = 0  # partly filled leaves replaced by longer ones

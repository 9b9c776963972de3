"""How much of what the trie knows a sequence can use now: windows, unfinished pages and room shorten a match.

Reads the trie and the store, changes neither.
"""

from __future__ import annotations

import sys
from enum import IntEnum
from typing import NamedTuple

from jaxkv.cache.pages import WindowPool
from jaxkv.cache.store import PageStore
from jaxkv.cache.trie import Node, Source, encode
from jaxkv.sequence import Sequence
from jaxkv.types import Tier


class Hit(NamedTuple):
    """A prefix to start from."""

    path: list[Node]  # root first; the last node may be used in part
    pages: int  # whole pages used
    source: Source | None  # page to copy for the tokens after those, or to bring so that it can be copied
    first: list[int]  # [group] first page that the next position sees
    need: list[int]  # [group] HBM pages that it takes: HOST pages in sight and the copy (of COMING: what is copied)


class Use(IntEnum):
    """Which nodes a hit may use."""

    HOT = 0  # those in HBM
    COLD = 1  # and those in the host tier
    COMING = 2  # and those under way


def find_hit(store: PageStore, seq: Sequence, plan_id: int, use: Use, most: int = sys.maxsize) -> Hit:
    """The longest usable prefix of ``seq.tokens[:seq.match_limit]``, at most ``most`` pages; in the worst case of length 0.
    Of what may still come a part of a page is named where it has to come from the host tier.

    A page that plan ``plan_id`` itself computes is no source of a copy. A window group must hold every page that the
    next position sees. All HBM pages taken must be free, or idle once the path is pinned.
    """
    root = store.trie.root(seq.request.namespace)
    path, pages, sources = store.trie.match(root, encode(seq.tokens[:seq.match_limit]))
    for node in path[1:]:
        if use is not Use.COMING and node.load is not None or use is Use.HOT and node.tier is not Tier.HBM or store.lost(node):
            pages, sources = store.first_page(node), []
            break
    if pages >= most:
        pages, sources = most, []
    copied = {Use.HOT: (Tier.HBM,), Use.COLD: (Tier.HBM, Tier.HOST), Use.COMING: (Tier.HOST,)}[use]
    source = next((s for s in sources if s.node.tier in copied and s.ready(plan_id, store.page_size)), None)
    while True:
        tokens = pages * store.page_size + (source.tokens if source else 0)
        hit = Hit(path, pages, source, store.first_visible(tokens), [])
        hole = _last_hole(store, hit)
        if hole >= 0:
            pages, source = hole, None
            continue
        hit.need.extend(_need(store, hit))
        short = -min(room_beside(store, hit)) if any(hit.need) else 0
        if short <= 0:
            break
        if source:
            source = None
        else:
            pages -= short
    while len(path) > 1 and store.first_page(path[-1]) >= pages:
        path.pop()
    return hit


def _last_hole(store: PageStore, hit: Hit) -> int:
    """Index of the last whole page in sight that a window group lost; -1: none."""
    last = -1
    for g in store.windows:
        first = max(hit.first[g], last + 1)
        for node in reversed(hit.path[1:]):
            start = store.first_page(node)
            held = node.pages[g]
            for i in range(min(hit.pages, start + len(held)) - 1, max(first, start) - 1, -1):
                if held[i - start] < 0:
                    last = i
                    break
            if start <= first or last >= first:
                break
    return last


def _need(store: PageStore, hit: Hit) -> list[int]:
    need = [int(hit.source is not None)] * len(hit.first)
    for node in reversed(hit.path[1:]):
        if node.tier is Tier.HBM:
            break
        start = store.first_page(node)
        end = min(hit.pages, start + len(node))
        for g, first in enumerate(hit.first):
            need[g] += max(0, end - max(start, first))
    return need


def cold_runs(store: PageStore, hit: Hit) -> tuple[int, list[tuple[Tier, int]]]:
    """First page of a hit that is in the host tier, and the runs of pages from there on: tier and pages."""
    cold = [node for node in hit.path[1:] if node.tier is Tier.HOST]
    if not cold:
        return hit.pages, []
    return store.first_page(cold[0]), [(Tier.HOST, min(len(node), hit.pages - store.first_page(node))) for node in cold]


def room_beside(store: PageStore, hit: Hit) -> list[int]:
    """[group] pages that can be made free once the hit is pinned and has what it needs; negative: so many it lacks."""
    warm = [node for node in hit.path[1:] if node.tier is Tier.HBM]
    source = hit.source if hit.source and hit.source.node.tier is Tier.HBM else None
    pinned = sum(max(0, min(hit.pages - store.first_page(node), len(node))) for node in warm if not node.refs)
    if source and not source.node.refs:
        pinned += len(source.node) - source.page  # of a node cut by the match, the part above the source is counted
    room = []
    for g, pool in enumerate(store.hbm):
        if not isinstance(pool, WindowPool):
            room.append(store.available(g) - hit.need[g] - pinned)
            continue
        seen = [page for node in warm for start in [store.first_page(node)]
                for page in node.pages[g][max(0, hit.first[g] - start):max(0, hit.pages - start)]]
        if source:
            seen.append(source.node.pages[g][source.page])
        room.append(store.available(g) - hit.need[g] - sum(not pool.users[page] for page in seen))
    return room

"""A sequence enters: from the prefix that was chosen for it to pages of its own.

Owns no state. Pinning comes before making room, so that room is never made of what the sequence is about to use.
"""

from __future__ import annotations

from jaxkv.cache import hints
from jaxkv.cache.hit import Use, cold_runs, find_hit
from jaxkv.cache.store import PageStore
from jaxkv.cache.tiering import Tiering
from jaxkv.cache.trie import Node, Source, decode
from jaxkv.sequence import Sequence
from jaxkv.types import PageMove, Tier


class Admission:
    """Starts sequences on cached prefixes; with ``save_on_reuse`` the disk tier gets what is used a second time."""

    def __init__(self, store: PageStore, tiering: Tiering, save_on_reuse: bool) -> None:
        self._store = store
        self._tiering = tiering
        self._save_on_reuse = save_on_reuse

    def begin(self, seq: Sequence, plan_id: int, cold: bool) -> int:
        """See ``CacheController.acquire``."""
        store, stats = self._store, self._store.stats
        hit = find_hit(store, seq, plan_id, Use.COLD if cold else Use.HOT)
        first, runs = cold_runs(store, hit)
        cut = store.costs.best_cut(first * store.page_size, runs, len(seq.tokens))
        if cut < sum(pages for _, pages in runs):
            hit = find_hit(store, seq, plan_id, Use.COLD, first + cut)
        source, node = hit.source, hit.path[-1]
        keep = hit.pages - store.first_page(node)
        if keep < len(node):
            source = source and Source(node, 0, source.tokens)
            node = store.split(node, keep)
        store.claim(node, len(seq.request.prompt))
        seq.node, seq.first = node, hit.first
        path = self._pin(node, hit.first)
        if source:
            self._protect(source, True)
        room = self._tiering.reserve(hit.need)
        assert room, "find_hit chose a prefix that there is no room for"
        warm = sum(len(node) for node in path if node.tier is Tier.HBM) * store.page_size
        self._enter(seq, path, plan_id)
        seq.num_published = seq.num_matched = hit.pages * store.page_size
        seq.num_scheduled = seq.num_settled = seq.num_matched + (source.tokens if source else 0)
        if source:
            warm += source.tokens if source.node.tier is Tier.HBM else 0
            self._copy(seq, source)
            self._protect(source, False)
        seq.borrowed |= seq.num_scheduled > 0
        stats.query_tokens += len(seq.tokens)
        stats.hit_tokens += seq.num_scheduled
        brought = {tier: len(range(span.start, min(span.stop, warm))) for tier, span in seq.brought.items()}
        seq.came = seq.num_scheduled - warm + brought.get(Tier.HOST, 0), brought.get(Tier.DISK, 0)
        stats.host_hit_tokens += seq.came[0]
        stats.disk_hit_tokens += seq.came[1]
        return seq.num_scheduled

    def _pin(self, node: Node, first: list[int]) -> list[Node]:
        """Pin the path to ``node`` and, of window groups, its pages from index ``first[g]`` on; the path, top first."""
        self._store.pin(node)
        path = []
        while node.parent is not None:
            path.append(node)
            node = node.parent
        path.reverse()
        for g in self._store.windows:
            pool = self._store.window_pool(g)
            for node in path:
                if node.tier is Tier.HBM:
                    for page in node.pages[g][max(0, first[g] - self._store.first_page(node)):]:
                        pool.share(page)
        return path

    def _enter(self, seq: Sequence, path: list[Node], plan_id: int) -> None:
        """Bring a pinned path into HBM, count the use and give the sequence the pages."""
        for node in path:
            if node.tier is Tier.HOST:
                self._tiering.promote(node, seq.first, None)
            elif self._save_on_reuse:
                self._tiering.save(node, plan_id)
            hints.use(self._store, node, seq.request)
            for mine, pages in zip(seq.pages, node.pages, strict=True):
                mine += pages
        for g in self._store.windows:
            hidden = min(seq.first[g], len(seq.pages[g]))
            seq.pages[g][:hidden] = [-1] * hidden

    def _protect(self, source: Source, on: bool) -> None:
        """Keep the page to be copied where it is while room is made."""
        (self._store.hold if on else self._store.let_go)(source.node)
        if source.node.tier is Tier.HBM:
            for g in self._store.windows:
                pool = self._store.window_pool(g)
                (pool.share if on else pool.unshare)(source.node.pages[g][source.page])

    def _copy(self, seq: Sequence, source: Source) -> None:
        """A private copy of a partly matching page in every group."""
        node, store = source.node, self._store
        at, size = source.page * store.page_size, store.page_size
        seq.copied.append((seq.num_matched, decode(node.data)[at:at + size]))
        for g, pages in enumerate(seq.pages):
            pages.append(store.hbm[g].take())
            store.moves.append(PageMove(g, (node.tier, node.pages[g][source.page]), (Tier.HBM, pages[-1])))
        if store.trie.partial(node):
            store.policies[node.tier].touch(node.key)
            node.hits += 1
        store.stats.partial_copies += 1

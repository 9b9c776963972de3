"""Room in HBM: who leaves, where it goes, what comes back, and which moves that takes.

Owns no state; works on the pools, policies and moves of ``PageStore``.

Room in a full-attention group comes from the policy's victim: demoted if the host tier has room or can make some,
otherwise dropped with what hangs below it. Room in a window group comes from its oldest idle page, even of a pinned
path, which leaves a hole there; in a model of window groups only, an idle page of an unpinned node hands over to the
policy, so that such models use the host tier too.

Order is everything: the moves of a plan run one after the other before its step, so a page freed here may be taken
again at once, in either tier. What a chunk of the plan under construction computes is never moved: its nodes are pinned
by the sequence that runs, and no sequence with a chunk in a plan is released before ``take_transfers`` ends the plan.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jaxkv.cache.loads import Load
from jaxkv.cache.pages import WindowPool
from jaxkv.cache.store import PageStore
from jaxkv.cache.trie import Node
from jaxkv.types import PageKey, PageMove, Tier

WINDOW = 32  # plans that a page rests after it changed its tier, unless room is needed at once
OFFLOAD_PAGES = 16  # most pages that one plan offloads ahead of need


class Tiering:
    """Moves nodes between the tiers of ``store``; with ``disk``, what they drop is handed to the disk tier."""

    def __init__(self, store: PageStore, disk: bool) -> None:
        self._store = store
        self._disk = disk

    def reserve(self, need: Sequence[int]) -> bool:
        """Make room for ``need[group]`` pages in every group; False, and nothing changed, if that is impossible."""
        store, hbm = self._store, self._store.hbm
        if all(pool.free >= n for pool, n in zip(hbm, need, strict=True)):
            return True
        if any(n > store.available(g) for g, n in enumerate(need)):
            return False
        for g in store.full:
            while hbm[g].free < need[g]:
                self._evict(need[g] - hbm[g].free)
        for g in store.windows:
            while hbm[g].free < need[g]:
                self._reclaim(g)
        return True

    def offload(self, watermark: int) -> None:
        """Keep ``watermark`` pages free by demoting a few cold ones ahead of need, as FastServe does (Wu et al. 2023).

        What came within the last ``WINDOW`` plans stays, and so does what a waiting sequence keeps, being pinned."""
        store = self._store
        if not store.host_capacity or not store.full:
            return
        short = watermark - min(store.hbm[g].free for g in store.full)
        if short <= 0 or not store.idle:
            return
        key = store.policies[Tier.HBM].victim()
        if key is not None and store.plan - store.nodes[key].moved >= WINDOW:
            before = store.stats.demotions
            self._evict(min(short, OFFLOAD_PAGES), ahead=True)
            store.stats.offloads += store.stats.demotions - before

    def _evict(self, count: int, ahead: bool = False) -> None:
        """Take up to ``count`` tail pages of the policy's victim out of HBM; ``ahead`` of need, nothing is lost for that."""
        store = self._store
        key = store.policies[Tier.HBM].victim()
        assert key is not None, "idle pages without a candidate"
        node = store.nodes[key]
        count = min(count, store.policies[Tier.HBM].tail(key))
        if store.host_capacity:
            count = min(count, store.host_capacity)
        if len(node) > count:
            store.split(node, len(node) - count)
        over = not store.host_capacity or store.policies[Tier.HBM].is_over(node.key)
        worth = 0 if over else store.costs.worth_moving(Tier.HOST, node.start, node.end, store.host_held)
        if 0 < worth < len(node):
            upper = store.split(node, len(node) - worth if ahead else worth)
            if not ahead:
                self._drop(node)
                node = upper
        if worth and self._host_room(node):
            self._demote(node)
        elif over or not ahead:
            self._drop(node)

    def _drop(self, node: Node) -> None:
        """Forget a node, which the disk tier may remember, and everything below it."""
        self._store.stats.evictions += len(node)
        if self._disk:
            below = [node]
            for node in below:
                below.extend(node.children.values())
                self.save(node)
        self._store.discard(below[0] if self._disk else node)

    def save(self, node: Node, plan_id: int | None = None, most: int = sys.maxsize) -> None:
        """Hand the first ``most`` full pages of a node that the disk tier did not get yet to it; none that plan ``plan_id``
        computes or that a window group has lost."""
        store, size = self._store, self._store.trie.page_bytes
        if node.load is not None or node.born == plan_id:
            return
        full = min(len(node.data) // size, node.saved + most)
        if node.saved >= full or store.policies[node.tier].is_over(node.key):
            return
        start, end = node.start + node.saved * store.page_size, node.start + full * store.page_size
        full = min(full, node.saved + store.costs.worth_moving(Tier.DISK, start, end, store.host_held))
        for i in range(node.saved, full):
            if all(pages[i] >= 0 for pages in node.pages):
                tokens = memoryview(node.data[i * size:(i + 1) * size]).cast("i")
                store.moves += [PageMove(g, (node.tier, pages[i]), (Tier.DISK, len(store.saves)))
                                for g, pages in enumerate(node.pages)]
                store.saves.append(PageKey(node.digests[i].hex(), tuple(tokens)))
        store.stats.saves += full - node.saved
        node.saved = full

    def _host_room(self, node: Node) -> bool:
        """Make room in the host tier for all pages of ``node``, dropping host nodes by policy."""
        store = self._store
        need = [sum(page >= 0 for page in pages) for pages in node.pages]
        if not store.host_capacity or any(n > pool.capacity for n, pool in zip(need, store.host, strict=True)):
            return False
        while (short := max(n - pool.free for n, pool in zip(need, store.host, strict=True))) > 0:
            key = store.policies[Tier.HOST].victim()
            if key is None:
                return False
            victim = store.nodes[key]
            count = min(short, store.policies[Tier.HOST].tail(key))
            if len(victim) > count:
                store.split(victim, len(victim) - count)
            store.costs.lost(len(victim), store.host_held)
            self._drop(victim)
        return True

    def _demote(self, node: Node, lost: bool = False) -> None:
        """Move an unused node without HBM children to the host tier, which has room; ``lost``: without its pages."""
        store = self._store
        parent, key = node.parent, node.key
        assert parent is not None and not node.refs and not node.hot
        store.idle -= len(node)
        entry = store.policies[Tier.HBM].remove(key)
        store.free_hbm(node)
        for g, pages in enumerate(node.pages):
            for i, page in enumerate(pages):
                if page >= 0 and not lost:
                    pages[i] = store.host[g].take()
                    store.moves.append(PageMove(g, (Tier.HBM, page), (Tier.HOST, pages[i])))
                else:
                    pages[i] = -1
        node.tier, node.moved = Tier.HOST, store.plan
        parent.hot -= 1
        store.policies[Tier.HOST].arrive(key, entry)
        store.settle(node)
        store.settle(parent)
        store.stats.demotions += 0 if lost else len(node)

    def lose(self, since: int) -> None:
        """HBM's contents are gone, and those of nodes that became HOST nodes since so many plans had ended. What is above a
        node that is left stays, as a HOST node without pages."""
        store = self._store
        for node in reversed(list(store.trie.nodes())):  # children before parents
            if node.tier is Tier.HOST and node.moved < since:
                continue
            if not node.children:
                store.discard(node)
            elif node.tier is Tier.HBM:
                self._demote(node, lost=True)
            else:
                store.drop_host(node)

    def _reclaim(self, group: int) -> None:
        """Free the page of a window group that nobody has seen for longest."""
        store = self._store
        pool = store.window_pool(group)
        page = pool.oldest_idle()
        node = pool.owner[page]
        if not store.full and not node.refs:
            self._evict(1)
        else:
            store.leave_hole(node, group, page)

    # ---- back to HBM

    def promote(self, node: Node, first: Sequence[int], load: Load | None) -> None:
        """Bring a HOST node back for the one sequence that has pinned it; room was reserved.

        Of window group g only pages from index ``first[g]`` of the path come, earlier ones are dropped. They come with
        ``load``, or, without one, before the step of this very plan.
        """
        store = self._store
        store.costs.used(node.start, node.end, store.host_held)
        start = store.first_page(node)
        for g, pages in enumerate(node.pages):
            pool = store.hbm[g]
            for i, page in enumerate(pages):
                if page < 0:
                    continue
                if start + i < first[g]:
                    store.free_host(g, page)
                    pages[i] = -1
                    continue
                pages[i] = pool.take()
                move = PageMove(g, (Tier.HOST, page), (Tier.HBM, pages[i]), last=True)
                if load is None:
                    store.host[g].give(page)
                    store.moves.append(move)
                else:
                    load.moves.append(move)
                if isinstance(pool, WindowPool):
                    pool.adopt(pages[i], node, 1)
                    if load is not None:
                        load.shared.append((g, pages[i]))
        if load is not None:
            node.load = load
            load.nodes.append(node)
        self._to_hbm(node)
        store.stats.promotions += len(node)

    def refill(self, node: Node, pages: list[list[int]]) -> None:
        """Give a HOST node the HBM pages of a sequence that computed the same tokens; it gets one more user."""
        store = self._store
        store.costs.used(node.start, node.end, store.host_held)
        store.drop_host(node)
        node.pages = pages
        node.refs += 1
        self._to_hbm(node)
        store.adopt(node, pages)
        store.stats.swaps += len(node)

    def _to_hbm(self, node: Node) -> None:
        """Bookkeeping of a HOST node whose pages are HBM pages from now on."""
        store = self._store
        parent = node.parent
        assert parent is not None
        entry = store.policies[Tier.HOST].remove(node.key)
        node.tier, node.moved = Tier.HBM, store.plan
        parent.hot += 1
        store.policies[Tier.HBM].arrive(node.key, entry)
        store.settle(parent)

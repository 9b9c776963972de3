"""Pages of trie nodes in two exclusive tiers: who may leave HBM, where it goes, and which moves that takes.

Owns the page pools, the eviction policies and the list of moves of the plan under construction. Knows nodes and groups,
no sequences. A node lives in one tier: HBM nodes form the top of the tree, HOST nodes hang below them, so demotion takes
HBM nodes without HBM children, tail pages first, and dropping takes nodes without children.

Room in a full-attention group comes from the policy's victim: demoted if the host tier has room or can make some,
otherwise dropped with what hangs below it. Room in a window group comes from its oldest idle page, even of a pinned
path, which leaves a hole there; in a model of window groups only, an idle page of an unpinned node hands over to the
policy, so that such models use the host tier too.

Order is everything: the moves of a plan run one after the other before its step, so a page freed here may be taken again at
once, in either tier. What a chunk of the plan under construction computes is never moved: its nodes are pinned by the
sequence that runs, and no sequence with a chunk in a plan is released before ``take_moves`` ends the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxkv.cache.eviction import POLICIES
from jaxkv.cache.pages import PagePool, WindowPool
from jaxkv.cache.trie import Node, Trie
from jaxkv.types import Kind, KVGroup, PageMove, Tier


@dataclass
class CacheStats:
    """Counters since the start. A page here is one page of every KV group."""

    query_tokens: int = 0  # tokens of sequences at admission, the one that always runs included
    hit_tokens: int = 0  # those found in any tier
    host_hit_tokens: int = 0  # those found in the host tier
    demotions: int = 0  # pages HBM -> HOST
    promotions: int = 0  # pages HOST -> HBM
    evictions: int = 0  # pages dropped for room: their KV is lost
    holes: int = 0  # pages of one window group dropped for room
    partial_copies: int = 0  # pages copied because a match ended inside
    splits: int = 0
    claims: int = 0  # ANSWER nodes that became PROMPT
    swaps: int = 0  # pages computed twice: the trie's page replaced the sequence's
    supersedes: int = 0  # partly filled leaves replaced by longer ones


class PageStore:
    """Pools, policies and moves behind the trie."""

    def __init__(self, trie: Trie, groups: Sequence[KVGroup], num_pages: Sequence[int], num_host_pages: Sequence[int],
                 policy: str) -> None:
        self.trie = trie
        self.page_size = trie.page_size
        self.stats = CacheStats()
        self._spans = [group.window for group in groups]
        self.full = [g for g, group in enumerate(groups) if group.window is None]
        self.windows = [g for g, group in enumerate(groups) if group.window is not None]
        self.hbm = [PagePool(n) if group.window is None else WindowPool(n)
                    for group, n in zip(groups, num_pages, strict=True)]
        self.host = [PagePool(n) for n in num_host_pages]
        counted = self.full or self.windows
        self.host_capacity = min(num_host_pages[g] for g in counted)
        self.policies = {tier: POLICIES[policy](min(pages[g] for g in counted))
                         for tier, pages in ((Tier.HBM, num_pages), (Tier.HOST, num_host_pages))}
        self.nodes: dict[bytes, Node] = {}  # by Node.key
        self.idle = 0  # pages (of every full group) of HBM nodes that nobody uses
        self.moves: list[PageMove] = []

    def window_pool(self, group: int) -> WindowPool:
        pool = self.hbm[group]
        assert isinstance(pool, WindowPool)
        return pool

    def first_page(self, node: Node) -> int:
        """Index of the node's first page in its path."""
        return node.start // self.page_size

    def first_visible(self, position: int) -> list[int]:
        """[group] index of the first page that a query at ``position`` sees."""
        return [0 if window is None else max(0, position - window + 1) // self.page_size for window in self._spans]

    # ---- references

    def pin(self, node: Node | None) -> None:
        """One more running sequence uses the path that ends in ``node``."""
        while node is not None:
            self.hold(node)
            node = node.parent

    def unpin(self, node: Node | None) -> None:
        """One running sequence less uses the path that ends in ``node``."""
        while node is not None:
            parent = node.parent
            self.let_go(node)
            node = parent

    def hold(self, node: Node) -> None:
        """One more user of this node, whose parents are pinned."""
        node.refs += 1
        if node.refs == 1 and node.parent is not None:
            self.policies[node.tier].withdraw(node.key)
            if node.tier is Tier.HBM:
                self.idle -= len(node)

    def let_go(self, node: Node) -> None:
        """One user of this node less."""
        node.refs -= 1
        if node.refs:
            return
        if node.parent is None:
            self.trie.prune(node)
            return
        if node.tier is Tier.HBM:
            self.idle += len(node)
        self.policies[node.tier].rest(node.key)
        self._settle(node)

    def _settle(self, node: Node) -> None:
        """Offer the node to its tier's policy if nothing needs it there, else withdraw it."""
        if node.parent is None:
            self.trie.prune(node)
        elif node.refs or (node.hot if node.tier is Tier.HBM else node.children):
            self.policies[node.tier].withdraw(node.key)
        else:
            self.policies[node.tier].offer(node.key)

    # ---- nodes

    def attach(self, parent: Node, data: bytes, kind: Kind, pages: list[list[int]], born: int) -> Node:
        """A new HBM node with one user, the sequence that brings the pages."""
        node = self.trie.attach(parent, data, kind, pages, born)
        node.refs = 1
        self.nodes[node.key] = node
        self.policies[Tier.HBM].add(node.key, len(node), node.start)
        self._adopt(node, pages)
        self._settle(parent)
        return node

    def extend(self, node: Node, data: bytes, pages: list[list[int]]) -> None:
        """Append pages of its only user to a node without children."""
        self.trie.extend(node, data, pages)
        self.policies[Tier.HBM].extend(node.key, len(pages[0]))
        self._adopt(node, pages)

    def _adopt(self, node: Node, pages: list[list[int]]) -> None:
        for g in self.windows:
            pool = self.window_pool(g)
            for page in pages[g]:
                if page >= 0:
                    pool.adopt(page, node, 1)

    def split(self, node: Node, count: int) -> Node:
        """Cut a node after ``count`` pages; returns the upper part, ``node`` stays the end of its path."""
        key = node.key
        upper = self.trie.split(node, count)
        self.nodes[key] = upper
        self.nodes[node.key] = node
        self.policies[node.tier].split(key, node.key, len(node), node.start)
        if node.tier is Tier.HBM:
            for g in self.windows:
                owner = self.window_pool(g).owner
                owner.update((page, upper) for page in upper.pages[g] if page >= 0)
        self.stats.splits += 1
        return upper

    def take_back(self, node: Node) -> None:
        """Make a leaf's pages private to its only user again."""
        assert node.refs == 1 and node.tier is Tier.HBM
        for g in self.windows:
            self.window_pool(g).disown(node.pages[g][0])
        self._forget(node)

    def _forget(self, node: Node) -> float:
        """Take a node whose pages are taken care of out of the tree; its heat."""
        parent = node.parent
        assert parent is not None
        del self.nodes[node.key]
        heat = self.policies[node.tier].remove(node.key)
        self.trie.detach(node)
        self._settle(parent)
        return heat

    def discard(self, node: Node) -> None:
        """Drop an unused node and everything below it."""
        doomed = [node]
        for parent in doomed:
            doomed.extend(parent.children.values())
        for node in reversed(doomed):
            assert not node.refs
            if node.tier is Tier.HBM:
                self.idle -= len(node)
                self._free_hbm(node)
            else:
                for g, pages in enumerate(node.pages):
                    for page in pages:
                        if page >= 0:
                            self.free_host(g, page)
            self._forget(node)

    def _free_hbm(self, node: Node) -> None:
        for g, pages in enumerate(node.pages):
            pool = self.hbm[g]
            for page in pages:
                if page >= 0:
                    if isinstance(pool, WindowPool):
                        pool.disown(page)
                    pool.give(page)

    def free_host(self, group: int, page: int) -> None:
        """Drop a host page unread."""
        self.host[group].give(page)
        self.moves.append(PageMove(group, (Tier.HOST, page), None))

    # ---- room

    def available(self, group: int) -> int:
        """Pages of a group that are free or can be made free."""
        pool = self.hbm[group]
        return pool.free + (len(pool.idle) if isinstance(pool, WindowPool) else self.idle)

    def reserve(self, need: Sequence[int]) -> bool:
        """Make room for ``need[group]`` pages in every group; False, and nothing changed, if that is impossible."""
        hbm = self.hbm
        if all(pool.free >= n for pool, n in zip(hbm, need, strict=True)):
            return True
        if any(n > self.available(g) for g, n in enumerate(need)):
            return False
        for g in self.full:
            while hbm[g].free < need[g]:
                self._evict(need[g] - hbm[g].free)
        for g in self.windows:
            while hbm[g].free < need[g]:
                self._reclaim(g)
        return True

    def _evict(self, count: int) -> None:
        """Take up to ``count`` tail pages of the policy's victim out of HBM."""
        key = self.policies[Tier.HBM].victim()
        assert key is not None, "idle pages without a candidate"
        node = self.nodes[key]
        if self.host_capacity:
            count = min(count, self.host_capacity)
        if len(node) > count:
            self.split(node, len(node) - count)
        if self._host_room(node):
            self._demote(node)
        else:
            self.stats.evictions += len(node)
            self.discard(node)

    def _host_room(self, node: Node) -> bool:
        """Make room in the host tier for all pages of ``node``, dropping host nodes by policy."""
        need = [sum(page >= 0 for page in pages) for pages in node.pages]
        if any(n > pool.capacity for n, pool in zip(need, self.host, strict=True)):
            return False
        while (short := max(n - pool.free for n, pool in zip(need, self.host, strict=True))) > 0:
            key = self.policies[Tier.HOST].victim()
            if key is None:
                return False
            victim = self.nodes[key]
            if len(victim) > short:
                self.split(victim, len(victim) - short)
            self.stats.evictions += len(victim)
            self.discard(victim)
        return True

    def _demote(self, node: Node) -> None:
        parent, key = node.parent, node.key
        assert parent is not None and not node.refs and not node.hot
        self.idle -= len(node)
        heat = self.policies[Tier.HBM].remove(key)
        self._free_hbm(node)
        for g, pages in enumerate(node.pages):
            for i, page in enumerate(pages):
                if page >= 0:
                    pages[i] = self.host[g].take()
                    self.moves.append(PageMove(g, (Tier.HBM, page), (Tier.HOST, pages[i])))
        node.tier = Tier.HOST
        parent.hot -= 1
        self.policies[Tier.HOST].add(key, len(node), node.start, heat)
        self._settle(node)
        self._settle(parent)
        self.stats.demotions += len(node)

    def _reclaim(self, group: int) -> None:
        """Free the page of a window group that nobody has seen for longest."""
        pool = self.window_pool(group)
        page = pool.oldest_idle()
        node = pool.owner[page]
        if not self.full and not node.refs:
            self._evict(1)
            return
        pages = node.pages[group]
        pages[pages.index(page)] = -1
        pool.disown(page)
        pool.give(page)
        self.stats.holes += 1

    # ---- back to HBM

    def promote(self, node: Node, first: Sequence[int]) -> None:
        """Bring a HOST node back for the one sequence that has pinned it; room was reserved.

        Of window group g only pages from index ``first[g]`` of the path come, earlier ones are dropped.
        """
        start = self.first_page(node)
        for g, pages in enumerate(node.pages):
            pool = self.hbm[g]
            for i, page in enumerate(pages):
                if page < 0:
                    continue
                if start + i < first[g]:
                    self.free_host(g, page)
                    pages[i] = -1
                    continue
                pages[i] = pool.take()
                self.host[g].give(page)
                self.moves.append(PageMove(g, (Tier.HOST, page), (Tier.HBM, pages[i]), last=True))
                if isinstance(pool, WindowPool):
                    pool.adopt(pages[i], node, 1)
        self._to_hbm(node)
        self.stats.promotions += len(node)

    def refill(self, node: Node, pages: list[list[int]], born: int) -> None:
        """Give an unused HOST node the HBM pages of a sequence that computed the same tokens; it gets one user."""
        for g, old in enumerate(node.pages):
            for page in old:
                if page >= 0:
                    self.free_host(g, page)
        node.pages = pages
        node.born = born
        node.refs = 1
        self._to_hbm(node)
        self._adopt(node, pages)
        self.stats.swaps += len(node)

    def _to_hbm(self, node: Node) -> None:
        parent = node.parent
        assert parent is not None
        heat = self.policies[Tier.HOST].remove(node.key)
        node.tier = Tier.HBM
        parent.hot += 1
        self.policies[Tier.HBM].add(node.key, len(node), node.start, heat)
        self._settle(parent)

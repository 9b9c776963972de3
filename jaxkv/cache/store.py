"""Pages of trie nodes in two exclusive tiers: who uses them, who may leave, what a change of the tree does to them.

Owns the page pools, the eviction policies and the list of moves of the plan under construction. Knows nodes and groups,
no sequences; ``tiering`` decides what leaves and what comes back. A node lives in one tier: HBM nodes form the top of
the tree, HOST nodes hang below them, so demotion takes HBM nodes without HBM children, tail pages first, and dropping
takes nodes without children.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxkv.cache.costs import Costs
from jaxkv.cache.eviction import POLICIES
from jaxkv.cache.pages import PagePool, WindowPool
from jaxkv.cache.stats import CacheStats
from jaxkv.cache.trie import Node, Trie
from jaxkv.types import Kind, KVGroup, PageKey, PageMove, Tier


class PageStore:
    """Pools, policies and moves behind the trie."""

    def __init__(self, trie: Trie, groups: Sequence[KVGroup], num_pages: Sequence[int], num_host_pages: Sequence[int],
                 policy: str, costs: Costs, answer_worth: int = 0) -> None:
        self.trie = trie
        self.page_size = trie.page_size
        self.stats = CacheStats()
        self.costs = costs
        self.answer_worth = answer_worth  # log2 of what a use of an ANSWER node counts, compared with a PROMPT node
        self._spans = [group.window for group in groups]
        self.full = [g for g, group in enumerate(groups) if group.window is None]
        self.windows = [g for g, group in enumerate(groups) if group.window is not None]
        self.hbm = [PagePool(n) if group.window is None else WindowPool(n)
                    for group, n in zip(groups, num_pages, strict=True)]
        self.host = [PagePool(n) for n in num_host_pages]
        counted = self.full or self.windows
        self.host_capacity = min(num_host_pages[g] for g in counted)
        hbm = POLICIES[policy](min(num_pages[g] for g in counted))
        host = POLICIES[policy](self.host_capacity, hbm if self.host_capacity else None)
        self.policies = {Tier.HBM: hbm, Tier.HOST: host}
        self.nodes: dict[bytes, Node] = {}  # by Node.key
        self.plan = 0  # plans that ended
        self.idle = 0  # pages (of every full group) of HBM nodes that nobody uses
        self.moves: list[PageMove] = []
        self.saves: list[PageKey] = []

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
        self.settle(node)

    def settle(self, node: Node) -> None:
        """Offer the node to its tier's policy if nothing needs it there, else withdraw it."""
        if node.parent is None:
            self.trie.prune(node)
        elif node.refs or (node.hot if node.tier is Tier.HBM else node.children):
            self.policies[node.tier].withdraw(node.key)
        else:
            self.policies[node.tier].offer(node.key)

    # ---- nodes

    def attach(self, parent: Node, data: bytes, kind: Kind, pages: list[list[int]], session: str | None = None,
               worth: int = 0) -> Node:
        """A new HBM node with one user, the sequence that brings the pages. ``worth``: log2 of what this use counts."""
        node = self.trie.attach(parent, data, kind, pages)
        node.session = session
        node.refs = 1
        self.nodes[node.key] = node
        self.policies[Tier.HBM].add(node.key, node.digests, node.start, worth)
        self.adopt(node, pages)
        self.settle(parent)
        return node

    def extend(self, node: Node, data: bytes, pages: list[list[int]]) -> None:
        """Append pages of its only user to a node without children."""
        known = len(node)
        self.trie.extend(node, data, pages)
        self.policies[Tier.HBM].extend(node.key, node.digests[known:])
        self.adopt(node, pages)

    def adopt(self, node: Node, pages: list[list[int]]) -> None:
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

    def claim(self, node: Node | None, prompt: int) -> None:
        """ANSWER nodes on the path to ``node`` become PROMPT as far as their pages are within ``prompt`` tokens."""
        while node is not None and node.parent is not None:
            inside = prompt // self.page_size - self.first_page(node)
            if node.kind is Kind.ANSWER and inside > 0:
                if inside < len(node):
                    node = self.split(node, inside)
                node.kind = Kind.PROMPT
                self.stats.claims += 1
            node = node.parent

    def lost(self, node: Node) -> bool:
        """Whether a HOST node has no pages: they were lost with HBM, and whoever computes them makes it whole."""
        return bool(self.full) and node.pages[self.full[0]][0] < 0

    def take_back(self, node: Node) -> None:
        """Make a leaf's pages private to its only user again."""
        assert node.refs == 1 and node.tier is Tier.HBM
        for g in self.windows:
            self.window_pool(g).disown(node.pages[g][0])
        self._forget(node)

    def _forget(self, node: Node) -> None:
        """Take a node whose pages are taken care of out of the tree."""
        parent = node.parent
        assert parent is not None
        del self.nodes[node.key]
        self.policies[node.tier].remove(node.key)
        self.trie.detach(node)
        self.settle(parent)

    def discard(self, node: Node) -> list[bytes]:
        """Drop an unused node and everything below it; the digests of the pages."""
        doomed = [node]
        for parent in doomed:
            doomed.extend(parent.children.values())
        for node in reversed(doomed):
            assert not node.refs
            if node.tier is Tier.HBM:
                self.idle -= len(node)
                self.free_hbm(node)
            else:
                self.drop_host(node)
            self._forget(node)
        return [digest for node in doomed for digest in node.digests]

    def leave_hole(self, node: Node, group: int, page: int) -> None:
        """Free a page of a window group that nobody sees."""
        pages, pool = node.pages[group], self.window_pool(group)
        pages[pages.index(page)] = -1
        pool.disown(page)
        pool.give(page)
        self.stats.holes += 1

    def discard_unseen(self, node: Node) -> list[bytes]:
        """Drop of a node in use the pages of window groups that nobody sees; their digests."""
        if node.tier is not Tier.HBM:
            return []
        unseen = [(g, i, page) for g in self.windows for i, page in enumerate(node.pages[g])
                  if page in self.window_pool(g).idle]
        for g, _, page in unseen:
            self.leave_hole(node, g, page)
        return [node.digests[i] for _, i, _ in unseen]

    def free_hbm(self, node: Node) -> None:
        for g, pages in enumerate(node.pages):
            pool = self.hbm[g]
            for page in pages:
                if page >= 0:
                    if isinstance(pool, WindowPool):
                        pool.disown(page)
                    pool.give(page)

    def drop_host(self, node: Node) -> None:
        """Drop the pages of a HOST node unread."""
        for g, pages in enumerate(node.pages):
            for i, page in enumerate(pages):
                if page >= 0:
                    self.free_host(g, page)
                    pages[i] = -1

    def free_host(self, group: int, page: int) -> None:
        """Drop a host page unread."""
        self.host[group].give(page)
        self.moves.append(PageMove(group, (Tier.HOST, page), None))

    # ---- room

    @property
    def host_held(self) -> int:
        """Pages (of every group) in the host tier."""
        return max(pool.used for pool in self.host)

    def available(self, group: int) -> int:
        """Pages of a group that are free or can be made free."""
        pool = self.hbm[group]
        return pool.free + (len(pool.idle) if isinstance(pool, WindowPool) else self.idle)

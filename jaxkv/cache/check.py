"""Integrity: recompute every count, list and mark of the cache from the tree and the running sequences.

Reads only. O(everything): for tests after each call, for the server when it is idle, always between two plans' calls.
"""

from __future__ import annotations

from collections import Counter

from jaxkv.cache.loads import Load
from jaxkv.cache.pages import WindowPool
from jaxkv.cache.store import PageStore
from jaxkv.cache.trie import Node, Root, Trie, encode
from jaxkv.sequence import Sequence
from jaxkv.types import Kind, Tier


def check(store: PageStore, sequences: list[Sequence], loads: list[Load]) -> None:
    """``sequences``: those acquired and not released; ``loads``: those not ended. AssertionError names what is broken."""
    _check_tree(store.trie)
    _check_marks(store, sequences, loads)
    for seq in sequences:
        if seq.node is not None:
            _check_sequence(store, seq)
    for g in range(len(store.hbm)):
        _check_pages(store, g, sequences, loads)


def _check_tree(trie: Trie) -> None:
    for namespace, root in trie.roots.items():
        assert root.namespace == namespace and root.tier is Tier.HBM
        assert root.children or root.refs, f"root of {namespace!r} is of no use"
    for node in [*trie.roots.values(), *trie.nodes()]:
        assert node.order == sorted(node.children), f"{node.start}: children out of order"
        assert node.hot == sum(child.tier is Tier.HBM for child in node.children.values())
        assert node.below == len(node) + sum(child.below for child in node.children.values())
        for first, child in node.children.items():
            assert child.parent is node and child.data[:trie.page_bytes] == first
            assert child.start == node.end
            assert child.digests == trie.digest(node.digests[-1], child.data), "digests do not follow from the tokens"
            assert node.tier is Tier.HBM or child.tier is Tier.HOST, "an HBM node below a HOST node"
            assert node.kind is Kind.PROMPT or child.kind is Kind.ANSWER, "a PROMPT node below an ANSWER node"
            assert child.data and (trie.partial(child) or len(child.data) % trie.page_bytes == 0)
            assert not (trie.partial(child) and child.children), "a leaf has children"
            assert all(len(pages) == len(child) for pages in child.pages)


def _check_marks(store: PageStore, sequences: list[Sequence], loads: list[Load]) -> None:
    """References, idle count, the node index and what the policies know."""
    refs: Counter[int] = Counter()
    for node in [*(seq.node for seq in sequences), *(load.end for load in loads)]:
        while node is not None:
            refs[id(node)] += 1
            node = node.parent
    nodes = list(store.trie.nodes())
    for node in [*store.trie.roots.values(), *nodes]:
        assert node.refs == refs[id(node)], f"node at {node.start}: {node.refs} references, {refs[id(node)]} holders"
        assert not (store.trie.partial(node) and node.refs > 1), "a leaf has one writer"
        assert node.load is None or (node.load in loads and node in node.load.nodes), "what brings the node has ended"
    assert store.nodes == {node.key: node for node in nodes}
    assert store.idle == sum(len(node) for node in nodes if node.tier is Tier.HBM and not node.refs)
    assert store.host_capacity or all(node.tier is Tier.HBM for node in nodes), "a HOST node without a host tier"
    for tier, policy in store.policies.items():
        here = [node for node in nodes if node.tier is tier]
        assert policy.sizes() == {node.key: len(node) for node in here}
        free = {node.key: len(node) for node in here
                if not node.refs and not (node.hot if tier is Tier.HBM else node.children)}
        assert policy.offered() == free, f"{tier.name}: offered nodes are not the evictable ones"


def _check_sequence(store: PageStore, seq: Sequence) -> None:
    path: list[Node] = []
    node = seq.node
    while not isinstance(node, Root):
        assert node is not None and node.tier is Tier.HBM, "a running sequence's path is not in HBM"
        path.insert(0, node)
        node = node.parent
    assert node.namespace == seq.request.namespace
    assert seq.num_published == seq.node.end <= seq.num_scheduled
    assert b"".join(node.data for node in path) == encode(seq.tokens[:seq.num_published])
    assert len({len(pages) for pages in seq.pages}) == 1
    for g, pages in enumerate(seq.pages):
        shared = [page for node in path for page in node.pages[g]]
        first = seq.first[g]
        assert pages[first:len(shared)] == shared[first:], f"group {g}: the sequence does not use the pages of its path"
        assert all(page < 0 for page in pages[:first]) and all(page >= 0 for page in pages[first:])


def _check_pages(store: PageStore, group: int, sequences: list[Sequence], loads: list[Load]) -> None:
    """Every page of one group is free, private to one sequence or owned by one node."""
    pool, host = store.hbm[group], store.host[group]
    owner: dict[Tier, dict[int, Node]] = {tier: {} for tier in Tier}
    for node in store.trie.nodes():
        for page in node.pages[group]:
            assert page >= 0 or isinstance(pool, WindowPool) or store.lost(node), "a hole in a full-attention group"
            if page >= 0:
                assert page not in owner[node.tier], f"group {group}: {node.tier.name} page {page} has two owners"
                owner[node.tier][page] = node
    private: list[int] = []
    users: Counter[int] = Counter()
    for seq in sequences:
        shared = -(-seq.num_published // store.page_size)
        private += [page for page in seq.pages[group][shared:] if page >= 0]
        users.update(page for page in seq.pages[group][:shared] if page >= 0)
    coming = []
    for load in loads:
        users.update(page for g, page in load.shared if g == group)
        coming += [page for g, page in load.host_pages if g == group]
    assert sorted([*pool.free_pages(), *owner[Tier.HBM], *private]) == list(range(pool.capacity)), \
        f"group {group}: free, private and trie pages are not the pool"
    assert sorted([*host.free_pages(), *owner[Tier.HOST], *coming]) == list(range(host.capacity)), \
        f"group {group}: free, trie and leaving pages are not the host pool"
    if isinstance(pool, WindowPool):
        assert pool.owner == owner[Tier.HBM]
        assert all(pool.users[page] == users[page] for page in pool.owner)
        assert set(pool.idle) == {page for page in pool.owner if not pool.users[page]}

"""The cache as JSON, for people and pages: what each tier holds and the prefixes that matter most.

Reads everything, changes nothing. O(nodes): asked for by a person now and then, never by the engine.
"""

from __future__ import annotations

from heapq import nlargest
from typing import Any

from jaxkv.cache.controller import CacheController
from jaxkv.cache.trie import TOKEN_BYTES, Node, Root, Trie
from jaxkv.types import Tier

HEAD_TOKENS = 32  # of a node, to recognise it by


def inspect(cache: CacheController, top: int) -> dict[str, Any]:
    """Tiers, counters, costs, and the ``top`` nodes with most pages below them and their parents, parents first."""
    nodes = list(cache.trie.nodes())
    below: dict[int, int] = {id(node): len(node) for node in nodes}
    for node in reversed(nodes):  # children before parents
        if node.parent is not None and not isinstance(node.parent, Root):
            below[id(node.parent)] += below[id(node)]
    shown = {id(node) for node in nlargest(top, nodes, key=lambda node: below[id(node)])}
    salted = _salted(cache.trie)
    usage, groups = cache.usage(), len(cache.groups)
    return {
        "page_size": cache.page_size,
        "tiers": {tier.name.lower(): {"pages_used": list(usage[tier]), "pages_total": list(total),
                                      "nodes": sum(node.tier is tier for node in nodes)}
                  for tier, total in ((Tier.HBM, cache.num_pages), (Tier.HOST, cache.num_host_pages or (0,) * groups))},
        "namespaces": len(cache.trie.roots),
        "nodes_total": len(nodes),
        "stats": dict(vars(cache.stats)),
        "seconds": {"bring_64_pages_from_host": cache.costs.fetch_seconds({Tier.HOST: 64}),
                    "bring_64_pages_from_disk": cache.costs.fetch_seconds({Tier.DISK: 64}),
                    "compute_64_pages": cache.costs.prefill_seconds(0, 64 * cache.page_size)},
        "curve": curve(cache),
        "nodes": [_node(node, below[id(node)], node.key in salted) for node in nodes if id(node) in shown],
    }


def curve(cache: CacheController) -> list[dict[str, float]]:
    """Page hit rates that other sizes of HBM and host tier together would give, by the shadows of the lowest tier's policy;
    empty if the policy keeps none or knows nothing yet."""
    lowest = Tier.HOST if cache.store.host_capacity else Tier.HBM
    return [{"pages": point.capacity, "hit_rate": point.hit_rate} for point in cache.curves()[lowest]]


def _salted(trie: Trie) -> set[bytes]:
    """Keys of the nodes of salted namespaces: who reads this may not know their salts."""
    nodes = [node for root in trie.roots.values() if root.namespace for node in root.children.values()]
    for node in nodes:
        nodes.extend(node.children.values())
    return {node.key for node in nodes}


def _node(node: Node, below: int, salted: bool) -> dict[str, Any]:
    parent = node.parent
    head = None if salted else memoryview(node.data[:HEAD_TOKENS * TOKEN_BYTES]).cast("i").tolist()
    return {"digest": node.key.hex(), "parent": None if parent is None or isinstance(parent, Root) else parent.key.hex(),
            "start": node.start, "tokens": node.end - node.start, "pages": len(node), "pages_below": below,
            "kind": node.kind.name, "tier": node.tier.name, "hits": node.hits, "users": node.refs,
            "children": len(node.children), "coming": node.load is not None, "on_disk": node.saved, "head": head}

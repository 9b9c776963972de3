"""The cache as JSON, for people and pages: what each tier holds and the prefixes that matter most.

Changes nothing. It is asked for while requests run, so it looks at a bounded part of the trie, and says so where that is
not all of it.
"""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import count, islice
from typing import Any

from jaxkv.cache.controller import CacheController
from jaxkv.cache.trie import TOKEN_BYTES, Node, Root, Trie
from jaxkv.types import Tier

HEAD_TOKENS = 32  # of a node, to recognise it by
SEEN_NODES = 20_000  # most that an answer looks at
SEEN_CHILDREN = 2_000  # of one node, evenly spread over all


def inspect(cache: CacheController, top: int) -> dict[str, Any]:
    """Tiers, counters, costs, and the ``top`` nodes with most pages below them, each before what is below it; "sampled": of
    those that were looked at, which were not all."""
    nodes, sampled = _top(cache.trie, top)
    usage, groups, policies = cache.usage(), len(cache.groups), cache.store.policies
    return {
        "page_size": cache.page_size,
        "tiers": {tier.name.lower(): {"pages_used": list(usage[tier]), "pages_total": list(total),
                                      "nodes": policies[tier].num_nodes}
                  for tier, total in ((Tier.HBM, cache.num_pages), (Tier.HOST, cache.num_host_pages or (0,) * groups))},
        "namespaces": len(cache.trie.roots),
        "nodes_total": len(cache.store.nodes),
        "sampled": sampled,
        "stats": dict(vars(cache.stats)),
        "seconds": {"bring_64_pages_from_host": cache.costs.fetch_seconds({Tier.HOST: 64}),
                    "bring_64_pages_from_disk": cache.costs.fetch_seconds({Tier.DISK: 64}),
                    "compute_64_pages": cache.costs.prefill_seconds(0, 64 * cache.page_size)},
        "curve": curve(cache),
        "nodes": [_node(node, salted) for node, salted in _in_order(nodes)],
    }


def _top(trie: Trie, top: int) -> tuple[list[tuple[Node, bool]], bool]:
    """Nodes by falling number of pages below them, and whether each is in a salted namespace: who reads this may not know its
    salt. No node has more than its parent, so the best is always next to what was found. Then, whether any were left out."""
    heap: list[tuple[int, int, Node, bool]] = []
    serial = count()
    found: list[tuple[Node, bool]] = []
    for root in islice(trie.roots.values(), SEEN_CHILDREN):
        heappush(heap, (-root.below, next(serial), root, bool(root.namespace)))
    seen, sampled = len(heap), len(heap) < len(trie.roots)
    while heap and len(found) < top:
        _, _, node, salted = heappop(heap)
        if not isinstance(node, Root):
            found.append((node, salted))
        most = min(SEEN_CHILDREN, SEEN_NODES - seen)
        keys = node.order[::-(-len(node.order) // most) or 1] if most > 0 else []
        sampled |= len(keys) < len(node.order)
        seen += len(keys)
        for key in keys:
            heappush(heap, (-node.children[key].below, next(serial), node.children[key], salted))
    return found, sampled


def _in_order(nodes: list[tuple[Node, bool]]) -> list[tuple[Node, bool]]:
    """As a person reads a tree: a node, then all below it."""
    order: list[tuple[Node, bool]] = []
    children: dict[int, list[tuple[Node, bool]]] = {}
    known = {id(node) for node, _ in nodes}
    for item in nodes:
        children.setdefault(id(item[0].parent) if id(item[0].parent) in known else 0, []).append(item)
    stack = children.get(0, [])[::-1]
    while stack:
        order.append(stack.pop())
        stack += children.get(id(order[-1][0]), [])[::-1]
    return order


def curve(cache: CacheController) -> list[dict[str, float]]:
    """Page hit rates that other sizes of HBM and host tier together would give, by the shadows of the lowest tier's policy;
    empty if the policy keeps none or knows nothing yet."""
    lowest = Tier.HOST if cache.store.host_capacity else Tier.HBM
    return [{"pages": point.capacity, "hit_rate": point.hit_rate} for point in cache.curves()[lowest]]


def _node(node: Node, salted: bool) -> dict[str, Any]:
    parent = node.parent
    head = None if salted else memoryview(node.data[:HEAD_TOKENS * TOKEN_BYTES]).cast("i").tolist()
    return {"digest": node.key.hex(), "parent": None if parent is None or isinstance(parent, Root) else parent.key.hex(),
            "start": node.start, "tokens": node.end - node.start, "pages": len(node), "pages_below": node.below,
            "kind": node.kind.name, "tier": node.tier.name, "hits": node.hits, "users": node.refs,
            "children": len(node.children), "coming": node.load is not None, "on_disk": node.saved, "head": head}

"""What a request says about the future of its KV, told to the eviction policies.

A node belongs to the session that brought it until another one uses it; a request without a session is one of its own.
When a session ends, what belongs to it may leave first, abandoned branches included. Retention is the opposite: the path
of the request leaves last for so many seconds. Neither is a promise to keep or to drop: whoever comes back finds what is
still there, and nothing blocks a request that needs room.
"""

from __future__ import annotations

from jaxkv.cache.store import PageStore
from jaxkv.cache.trie import Node
from jaxkv.types import Kind, Request, Tier

SHARED = None  # Node.session of a node that two sessions used
MOST = 4  # |log2| of what a use counts at most: no priority keeps KV for ever


def session_of(request: Request) -> str:
    return request.session_id or request.id


def worth(request: Request, kind: Kind, answer: int) -> int:
    """log2 of what a use by the request counts: doubled by every step of priority, times 2**answer in ANSWER nodes."""
    return max(-MOST, min(MOST, -request.priority + (answer if kind is Kind.ANSWER else 0)))


def use(store: PageStore, node: Node, request: Request) -> None:
    """The request hit an HBM node."""
    if node.session != session_of(request):
        node.session = SHARED
    node.hits += 1
    store.policies[Tier.HBM].touch(node.key, worth(request, node.kind, store.answer_worth))


def leave(store: PageStore, node: Node | None, request: Request, ended: bool, now: float) -> None:
    """The request let go of the path that ends in ``node``; ``ended``: for good, it was not preempted."""
    if request.retention:
        at = node
        while at is not None and at.parent is not None:
            store.policies[at.tier].retain(at.key, now + request.retention)
            at = at.parent
    if ended and request.end_session:
        _end(store, node, session_of(request))


def _end(store: PageStore, node: Node | None, session: str) -> None:
    """Everything around ``node`` that belongs to the session and that nobody uses now may leave first."""
    own: list[Node] = []
    while node is not None and node.parent is not None and node.session == session:
        own = [node]
        node = node.parent
    for node in own:
        own.extend(child for child in node.children.values() if child.session == session)
        if not node.refs:
            store.policies[node.tier].end(node.key)

"""KV that turned out wrong, or is gone with its tier: what the tree forgets of it. Owns no state and no transfer under way."""

from __future__ import annotations

from jaxkv.cache.store import PageStore
from jaxkv.sequence import Sequence
from jaxkv.types import Tier


def drop_wrong(store: PageStore, seq: Sequence) -> list[bytes]:
    """Drop what holds a sequence's tokens or a page that it copied, and all below; the names of the pages, for the disk tier
    to forget too. What others see stays until they forget it; what is out of their windows they would never find wrong."""
    names: list[bytes] = []
    for tokens in (seq.tokens, *(seq.tokens[:at] + page for at, page in seq.copied)):
        used: set[bytes] = set()
        for node in store.trie.holders(seq.request.namespace, tokens):
            if node.refs:
                unseen = store.discard_unseen(node)
                names += unseen
                used.update(set(node.digests).difference(unseen))
            else:
                names += store.discard(node)
        names += [name for name in store.trie.page_names(seq.request.namespace, tokens) if name not in used]
    return names


def drop_host(store: PageStore) -> None:
    """Drop all that the host tier held."""
    tops = [n for n in store.trie.nodes() if n.tier is Tier.HOST and n.parent is not None and n.parent.tier is Tier.HBM]
    for node in tops:
        store.discard(node)

"""Gives the trie what a sequence computed: full pages along its path, and a partly filled last page.

Owns no state. The trie never gets the same tokens twice: where it has them, the sequence goes over to the trie's page;
if that one is in the host tier, the trie takes the sequence's instead.
"""

from __future__ import annotations

import sys

from jaxkv.cache.hints import session_of, use, worth
from jaxkv.cache.pages import WindowPool
from jaxkv.cache.store import PageStore
from jaxkv.cache.tiering import Tiering
from jaxkv.cache.trie import TOKEN_BYTES, Node, common_tokens, encode
from jaxkv.sequence import Sequence
from jaxkv.types import Kind, Tier

RUN_PAGES = 64  # a node grows in place up to this many pages: long enough to walk fast, short enough to cut and copy
SETTLED = sys.maxsize  # every position was computed by an earlier plan


class Publisher:
    """Publication into the trie behind ``store``."""

    def __init__(self, store: PageStore, tiering: Tiering) -> None:
        self._store = store
        self._tiering = tiering

    def publish(self, seq: Sequence, plan_id: int) -> None:
        """Full pages of known, scheduled tokens, and the last page of a prompt that is complete; plan ``plan_id`` computes what
        no earlier one did."""
        done = min(len(seq.tokens), seq.num_scheduled)
        full = done - done % self._store.page_size
        if full > seq.num_published:
            self._full_pages(seq, full, seq.num_settled, plan_id)
        if done == len(seq.request.prompt) and seq.num_published == full < done:
            self._last_page(seq, done, seq.num_settled, plan_id)

    def publish_all(self, seq: Sequence) -> None:
        """What a sequence that runs no more has, a partly filled last page included."""
        done = min(len(seq.tokens), seq.num_scheduled)
        full = done - done % self._store.page_size
        if full > seq.num_published:
            self._full_pages(seq, full, SETTLED, -1)
        if full <= seq.num_published < done:
            self._take_back_leaf(seq)
            self._last_page(seq, done, SETTLED, -1)

    def _full_pages(self, seq: Sequence, full: int, settled: int, plan_id: int) -> None:
        """Extend the pinned path to ``full`` tokens; positions from ``settled`` on are computed by plan ``plan_id``."""
        store = self._store
        self._take_back_leaf(seq)
        at, size = seq.num_published, store.page_size
        data = encode(seq.tokens[at:full])
        while data:
            child = seq.node.children.get(data[:store.trie.page_bytes])
            if child is None:
                self._append(seq, data, settled, plan_id)
                return
            count = common_tokens(child.data, data) // size
            if child.tier is Tier.HBM:
                count = min(count, (settled - at) // size)
            if count <= 0 or child.load is not None:
                return
            if count < len(child):
                child = store.split(child, count)
            if child.tier is Tier.HBM:
                store.hold(child)
                self._swap(seq, child)
                seq.borrowed = True
            else:
                own = [pages[at // size:at // size + count] for pages in seq.pages]
                self._tiering.refill(child, own)
                _mark(child, settled, plan_id)
            use(store, child, seq.request)
            store.claim(child, len(seq.request.prompt))
            data = data[count * store.trie.page_bytes:]
            at = seq.num_published = child.end
            seq.node = child

    def _swap(self, seq: Sequence, node: Node) -> None:
        """Go over to the pages of a pinned node that holds the same tokens; the node's holes are filled."""
        store = self._store
        at = store.first_page(node)
        for g, pages in enumerate(seq.pages):
            pool = store.hbm[g]
            window = isinstance(pool, WindowPool)
            for i, theirs in enumerate(node.pages[g]):
                mine = pages[at + i]
                if mine < 0:
                    continue
                if theirs < 0:
                    node.pages[g][i] = mine
                    store.window_pool(g).adopt(mine, node, 1)
                    continue
                if window:
                    store.window_pool(g).share(theirs)
                pool.give(mine)
                pages[at + i] = theirs
            seq.dirty[g] = min(seq.dirty[g], at)
        store.stats.swaps += len(node)

    def _append(self, seq: Sequence, data: bytes, settled: int, plan_id: int) -> None:
        """New runs for the full pages ``data`` below the sequence's node; a run is all PROMPT or all ANSWER."""
        store = self._store
        prompt = len(seq.request.prompt) // store.page_size
        while data:
            at = seq.num_published // store.page_size
            count = len(data) // store.trie.page_bytes
            kind = Kind.PROMPT if at < prompt else Kind.ANSWER
            if kind is Kind.PROMPT:
                count = min(count, prompt - at)
            run, data = data[:count * store.trie.page_bytes], data[count * store.trie.page_bytes:]
            pages = [pages[at:at + count] for pages in seq.pages]
            node = seq.node
            if node.start >= seq.num_matched and node.kind is kind and node.refs == 1 and not node.children \
                    and 0 < len(node) <= RUN_PAGES - count:
                store.extend(node, run, pages)
            else:
                self._supersede(node, run[:store.trie.page_bytes])
                seq.node = store.attach(node, run, kind, pages, session_of(seq.request),
                                        worth(seq.request, kind, store.answer_worth))
            _mark(seq.node, settled, plan_id)
            seq.num_published += count * store.page_size

    def _last_page(self, seq: Sequence, done: int, settled: int, plan_id: int) -> None:
        """The partly filled page behind the path, unless the trie has its tokens already."""
        store = self._store
        at = seq.num_published
        data = encode(seq.tokens[at:done])
        known = store.trie.sources(seq.node, data)
        pages = [pages[at // store.page_size] for pages in seq.pages]
        if (known and known[0].tokens == done - at) or min(pages) < 0:
            return
        self._supersede(seq.node, data)
        kind = Kind.PROMPT if done <= len(seq.request.prompt) else Kind.ANSWER
        seq.node = store.attach(seq.node, data, kind, [[page] for page in pages], session_of(seq.request),
                                worth(seq.request, kind, store.answer_worth))
        _mark(seq.node, settled, plan_id)
        seq.num_published = done

    def _take_back_leaf(self, seq: Sequence) -> None:
        """The leaf that a sequence published and went on writing becomes private again."""
        store = self._store
        leaf = seq.node
        if store.trie.partial(leaf):
            seq.node, seq.num_published = leaf.parent, leaf.start
            store.take_back(leaf)

    def _supersede(self, parent: Node, data: bytes) -> None:
        """Drop the unused leaf that the new page ``data`` extends."""
        store = self._store
        for known in store.trie.sources(parent, data):
            leaf = known.node
            if not leaf.refs and len(leaf.data) == known.tokens * TOKEN_BYTES < len(data):
                store.discard(leaf)
                store.stats.supersedes += 1
                return


def _mark(node: Node, settled: int, plan_id: int) -> None:
    """Remember what of a node plan ``plan_id`` is about to compute."""
    if node.end > settled:
        node.born, node.settled = plan_id, settled

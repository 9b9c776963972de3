"""Brings the cold part of a waiting sequence's prefix to HBM before the sequence is scheduled.

Owns no state: what is under way is in ``loads``. The prefix goes on from the trie to the disk tier, which is not in the
trie but finds pages by their digest; they become nodes when their load begins.
"""

from __future__ import annotations

from jaxkv.cache.hit import Hit, Use, find_hit, room_beside
from jaxkv.cache.loads import Load, Loader
from jaxkv.cache.store import PageStore
from jaxkv.cache.tiering import Tiering
from jaxkv.cache.trie import Node, encode
from jaxkv.types import DiskIndex, Kind, PageKey, PageMove, Sequence, Tier


class Prefetcher:
    """Begins loads. ``disk`` answers which pages the disk tier has, if there is one."""

    def __init__(self, store: PageStore, tiering: Tiering, loader: Loader, disk: DiskIndex | None) -> None:
        self._store = store
        self._tiering = tiering
        self._loader = loader
        self.disk = disk

    def prefetch(self, seq: Sequence, plan_id: int, spare: int, cold: bool) -> bool:
        """See ``CacheController.prefetch``. With less room than the whole prefix takes, a shorter one is brought."""
        store = self._store
        if self.disk is None and not store.host_capacity:
            return False
        hit = find_hit(store, seq, plan_id, Use.COMING, spare)
        data, keys = self._on_disk(seq, hit, spare)
        if keys or cold and any(node.tier is Tier.HOST for node in hit.path[1:]):
            self._begin(seq, hit, data, keys)
        else:
            seq.waits = list(dict.fromkeys(node.load for node in hit.path[1:] if node.load is not None))
            store.trie.prune(hit.path[0])
        for load in seq.waits:
            load.users += 1
        return bool(seq.waits)

    def _begin(self, seq: Sequence, hit: Hit, data: bytes, keys: list[bytes]) -> None:
        store, load, end = self._store, Load(), hit.path[-1]
        keep = hit.pages - store.first_page(end)
        if keep < len(end):
            hit.path[-1] = end = store.split(end, keep)
        store.claim(end, len(seq.request.prompt))
        store.pin(end)
        path: list[Node] = []
        node: Node | None = end
        while node is not None and node.parent is not None:
            path.insert(0, node)
            node = node.parent
        seq.waits = [*dict.fromkeys(node.load for node in path if node.load is not None), load]
        for g in store.windows:
            for node in path:
                if node.tier is Tier.HBM:
                    seen = node.pages[g][max(0, hit.first[g] - store.first_page(node)):]
                    load.shared += [(g, page) for page in seen if page >= 0]
        for g, page in load.shared:
            store.window_pool(g).share(page)
        room = self._tiering.reserve([need + len(keys) for need in hit.need])
        assert room, "find_hit chose a prefix that there is no room for"
        for node in path:
            if node.tier is Tier.HOST:
                store.stats.host_hit_tokens += len(node) * store.page_size
                self._tiering.promote(node, hit.first, load)
        if keys:
            end = self._attach(end, data, keys, load)
        store.stats.loads += 1
        self._loader.begin(load, end)

    def _on_disk(self, seq: Sequence, hit: Hit, spare: int) -> tuple[bytes, list[bytes]]:
        """Encoded tokens and digests of the pages that the disk tier has after the hit, as far as there is room."""
        store, size = self._store, self._store.trie.page_bytes
        end = hit.path[-1]
        at = hit.pages * size
        if self.disk is None or end.end != hit.pages * store.page_size:
            return b"", []
        data = encode(seq.tokens[:seq.match_limit])[at:]
        data = data[:len(data) // size * size]
        if not data or data[:size] in end.children:
            return b"", []
        keys = store.trie.digest(end.digests[-1], data)
        count = max(0, min(self.disk.match(keys), room_beside(store, hit) - spare))
        return data[:count * size], keys[:count]

    def _attach(self, parent: Node, data: bytes, keys: list[bytes], load: Load) -> Node:
        """The node that pages on disk become."""
        store = self._store
        size, page_size = store.trie.page_bytes, store.page_size
        pages = [pool.take_many(len(keys)) for pool in store.hbm]
        node = store.attach(parent, data, Kind.PROMPT, pages)
        node.load, node.saved = load, len(keys)
        load.nodes.append(node)
        load.shared += [(g, page) for g in store.windows for page in pages[g]]
        for i, key in enumerate(keys):
            tokens = memoryview(data[i * size:(i + 1) * size]).cast("i")
            load.keys.append(PageKey(key.hex(), tuple(tokens)))
            load.moves += [PageMove(g, (Tier.DISK, i), (Tier.HBM, own[i])) for g, own in enumerate(pages)]
        store.stats.disk_hit_tokens += len(keys) * page_size
        return node

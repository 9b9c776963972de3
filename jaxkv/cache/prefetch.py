"""Brings the cold part of a waiting sequence's prefix to HBM before the sequence is scheduled.

Owns no state: what is under way is in ``loads``. The prefix goes on from the trie to the disk tier, which is not in the
trie but finds pages by their digest; they become nodes when their load begins.
"""

from __future__ import annotations

from jaxkv.cache import hints
from jaxkv.cache.hit import Hit, Use, cold_runs, find_hit, room_beside
from jaxkv.cache.loads import Load, Loader
from jaxkv.cache.store import PageStore
from jaxkv.cache.tiering import Tiering
from jaxkv.cache.trie import Node, common_tokens, encode
from jaxkv.sequence import Sequence
from jaxkv.types import DiskIndex, Kind, PageKey, PageMove, Request, Tier

DISK_RUN = 16  # pages: how finely a run on disk may be cut


class Prefetcher:
    """Begins loads. ``disk`` answers which pages the disk tier has, if there is one."""

    def __init__(self, store: PageStore, tiering: Tiering, loader: Loader, disk: DiskIndex | None) -> None:
        self._store = store
        self._tiering = tiering
        self._loader = loader
        self.disk = disk

    def keep(self, seq: Sequence, plan_id: int) -> bool:
        """See ``CacheController.keep``."""
        hit = find_hit(self._store, seq, plan_id, Use.COMING)
        if len(hit.path) == 1:
            self._store.trie.prune(hit.path[0])
            return False
        self._store.pin(hit.path[-1])
        self._begin(seq, hit.path, self._store.first_visible(hit.pages * self._store.page_size), Load())
        return True

    def prefetch(self, seq: Sequence, plan_id: int, most: list[int], spare: list[int]) -> bool | None:
        """See ``CacheController.prefetch``."""
        store = self._store
        if self.disk is None and not store.host_capacity:
            return False
        hit = find_hit(store, seq, plan_id, Use.COMING)
        data, keys = self._on_disk(seq, hit)
        hit, keys = self._worth(seq, plan_id, hit, keys)
        rest = [max(len(keys), min(-(-len(seq.tokens) // store.page_size) - hit.pages, n)) for n in most]
        if any(room - own < others for room, own, others in zip(room_beside(store, hit), rest, spare)):
            store.trie.prune(hit.path[0])
            return None
        part = hit.source and hit.source.node
        if not keys and not part and all(node.tier is Tier.HBM for node in hit.path[1:]):
            for load in dict.fromkeys(node.load for node in hit.path[1:] if node.load is not None):
                self._wait(seq, load)
            store.trie.prune(hit.path[0])
            return bool(seq.waits)
        end, load = hit.path[-1], Load()
        keep = hit.pages - store.first_page(end)
        if keep < len(end):
            end = store.split(end, keep)
        store.claim(end, len(seq.request.prompt))
        if part:  # it follows ``end``: what has to be copied is its first page
            end = store.split(part, 1) if len(part) > 1 else part
        store.pin(end)
        path = _path(end)
        for other in dict.fromkeys(node.load for node in path if node.load is not None):
            self._wait(seq, other)
        self._begin(seq, path, hit.first, load)
        room = self._tiering.reserve([need + len(keys) for need in hit.need])
        assert room, "find_hit chose a prefix that there is no room for"
        cold = [node for node in path if node.tier is Tier.HOST]  # the end of the path
        if cold:
            seq.brought[Tier.HOST] = range(cold[0].start, cold[-1].end)
        for node in cold:
            self._tiering.promote(node, hit.first, load)
        if keys:
            seq.brought[Tier.DISK] = range(end.end, end.end + len(keys) * store.page_size)
            load.end = self._attach(end, data[:len(keys) * store.trie.page_bytes], keys, seq.request, load)
        seq.rest = [max(0, n - len(keys)) for n in rest]
        store.stats.loads += 1
        self._loader.fetch(load)
        return True

    def _begin(self, seq: Sequence, path: list[Node], first: list[int], load: Load) -> None:
        """Make ``load`` keep what is in HBM of a pinned path, of window groups the pages from index ``first[g]`` on."""
        store = self._store
        for g in store.windows:
            for node in path[1:]:
                if node.tier is Tier.HBM:
                    seen = node.pages[g][max(0, first[g] - store.first_page(node)):]
                    load.shared += [(g, page) for page in seen if page >= 0]
        for g, page in load.shared:
            store.window_pool(g).share(page)
        self._loader.begin(load, path[-1])
        self._wait(seq, load)

    def _wait(self, seq: Sequence, load: Load) -> None:
        if load not in seq.waits:
            seq.waits.append(load)
            load.users += 1

    def _on_disk(self, seq: Sequence, hit: Hit) -> tuple[bytes, list[bytes]]:
        """Encoded tokens and digests of the pages that the disk tier has after the hit."""
        store, size = self._store, self._store.trie.page_bytes
        end = hit.path[-1]
        at, keep = hit.pages * size, hit.pages - store.first_page(end)
        if self.disk is None:
            return b"", []
        data = encode(seq.tokens[:seq.match_limit])[at:]
        data = data[:len(data) // size * size]
        child = end.children.get(data[:size])
        if keep == len(end) and child is not None and store.lost(child):
            data = data[:common_tokens(child.data, data) // store.page_size * size]
        elif not data or (end.data[keep * size:(keep + 1) * size] == data[:size] if keep < len(end) else child is not None):
            return b"", []  # the hit was cut short
        keys = store.trie.digest(end.digests[keep - 1], data)
        count = self.disk.match(keys)
        return data[:count * size], keys[:count]

    def _worth(self, seq: Sequence, plan_id: int, hit: Hit, keys: list[bytes]) -> tuple[Hit, list[bytes]]:
        """As much of a hit and of what follows on disk as comes sooner than it is computed."""
        store, costs, size = self._store, self._store.costs, self._store.page_size
        first, runs = cold_runs(store, hit)
        runs += [(Tier.DISK, min(DISK_RUN, len(keys) - at)) for at in range(0, len(keys), DISK_RUN)]
        busy = [tier for tier in (Tier.HOST, Tier.DISK) if self._loader.under_way(tier)]
        cut = costs.best_cut(first * size, runs, len(seq.tokens), busy)
        found = sum(pages for _, pages in runs)
        store.stats.recomputed_tokens += (found - cut) * size
        part, end = hit.source, hit.pages * size
        if part and not keys and cut == found and costs.measured \
                and costs.fetch_seconds({Tier.HOST: 1}) > costs.prefill_seconds(end, end + part.tokens):
            store.stats.recomputed_tokens += part.tokens
            part = None
        if cut < found - len(keys) or hit.source and (keys or not part):
            hit = find_hit(store, seq, plan_id, Use.COMING, first + min(cut, found - len(keys)))
        return hit, keys[:max(0, cut - (found - len(keys)))]

    def _attach(self, parent: Node, data: bytes, keys: list[bytes], request: Request, load: Load) -> Node:
        """The node that pages on disk become; PROMPT if it lies within the prompt."""
        store = self._store
        size, page_size = store.trie.page_bytes, store.page_size
        pages = [pool.take_many(len(keys)) for pool in store.hbm]
        inside = parent.kind is Kind.PROMPT and parent.end + len(keys) * page_size <= len(request.prompt)
        if (node := parent.children.get(data[:size])) is None:
            node = store.attach(parent, data, Kind.PROMPT if inside else Kind.ANSWER, pages, hints.session_of(request))
        else:  # its pages were lost
            node = store.split(node, len(keys)) if len(keys) < len(node) else node
            self._tiering.refill(node, pages)
        node.load, node.saved = load, len(keys)
        load.nodes.append(node)
        load.shared += [(g, page) for g in store.windows for page in pages[g]]
        for i, key in enumerate(keys):
            tokens = memoryview(data[i * size:(i + 1) * size]).cast("i")
            load.keys.append(PageKey(key.hex(), tuple(tokens)))
            load.moves += [PageMove(g, (Tier.DISK, i), (Tier.HBM, own[i])) for g, own in enumerate(pages)]
        return node


def _path(node: Node) -> list[Node]:
    """The nodes from the root to ``node``."""
    path = [node]
    while path[-1].parent is not None:
        path.append(path[-1].parent)
    return path[::-1]

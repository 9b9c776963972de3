"""What the scheduler asks of the KV cache: a prefix to start from, room to grow, publication, release.

Owns the cache side of a ``Sequence`` (pages, path, how much of it is published). Owns no order between sequences and
no device: every effect is a page number in ``Sequence.pages`` or a ``PageMove``. The tree is in ``trie``, who holds
what in ``store``, eviction and moves in ``tiering``, the choice of a prefix in ``hit``, the start from it in ``admission``,
publication in ``publish``, what is under way while steps go on in ``prefetch`` and ``loads``, what is dropped as wrong in
``forget``.

A page is private to a running sequence until ``publish`` gives it to the trie; the sequence then pins the path (from
``Sequence.node`` up to the root) and goes on reading it. ``release`` publishes what is left and unpins: preemption is
release, coming back is a hit.

Rules for one plan, which ``take_transfers`` ends. The scheduler keeps the first two, this file the others:
  1. ``grow`` comes before a chunk; ``publish`` after ``num_scheduled`` was advanced, before the chunk copies page rows.
  2. A sequence with a chunk in the plan is not released before the plan ends.
  3. Moves run before the step, so a page that this very plan computes (``Node.born``) may be shared but not copied.
  4. A page that two sequences computed is swapped for the trie's only when an earlier plan computed it: no step writes
     a page twice.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxkv.cache import hints
from jaxkv.cache.admission import Admission
from jaxkv.cache.check import check
from jaxkv.cache.costs import Costs
from jaxkv.cache.eviction import Point
from jaxkv.cache.forget import drop_host, drop_wrong
from jaxkv.cache.loads import Loader
from jaxkv.cache.prefetch import Prefetcher
from jaxkv.cache.publish import Publisher
from jaxkv.cache.stats import CacheStats
from jaxkv.cache.store import PageStore
from jaxkv.cache.tiering import Tiering
from jaxkv.cache.trie import Trie
from jaxkv.sequence import Sequence
from jaxkv.types import Arrival, DiskIndex, Fetch, KVGroup, PageKey, PageMove, Tier


class Transfers(NamedTuple):
    """What a plan does to pages besides its step: see ``StepPlan``."""

    landings: tuple[tuple[int, bool], ...]
    moves: tuple[PageMove, ...]
    saves: tuple[PageKey, ...]
    fetches: tuple[Fetch, ...]


class CacheController:
    """Decides which KV pages are where. Sizes are in pages, one entry per KV group.

    ``root_salt`` names all that KV depends on besides tokens and namespace: model fingerprint, layout, adapter.
    ``disk``: the tier below the host's, if there is one; it gets what the others drop and, with ``save_on_reuse``, what
    was used a second time. ``fetch_pages``: most pages of a fetch, two of which are under way at once. ``watermark``: share
    of the HBM pages that is kept free by offloading cold ones to the host tier ahead of need.
    ``costs`` decides what is worth a move; None: by what it is told of steps and fetches.
    """

    def __init__(self, groups: tuple[KVGroup, ...], page_size: int, num_pages: tuple[int, ...],
                 num_host_pages: tuple[int, ...], policy: str = "lfu", root_salt: str = "",
                 enable_prefix_caching: bool = True, disk: DiskIndex | None = None, save_on_reuse: bool = True,
                 fetch_pages: int = 64, watermark: float = 1 / 32, answer_worth: int = 0,
                 costs: Costs | None = None) -> None:
        self.groups = groups
        self.page_size = page_size
        self.num_pages = num_pages
        self.num_host_pages = num_host_pages
        self.enable_prefix_caching = enable_prefix_caching
        self.trie = Trie(page_size, root_salt)
        self.store = PageStore(self.trie, groups, num_pages, num_host_pages, policy,
                               costs or Costs(page_size, fetch_pages), answer_worth)
        self._now = 0.0
        self._tiering = Tiering(self.store, disk is not None)
        self._publisher = Publisher(self.store, self._tiering)
        self._loader = Loader(self.store, fetch_pages)
        self._prefetcher = Prefetcher(self.store, self._tiering, self._loader, disk)
        self._watermark = int(watermark * min(num_pages))
        self._admission = Admission(self.store, self._tiering, save_on_reuse and disk is not None)
        self._windows = [(g, group.window) for g, group in enumerate(groups) if group.window is not None]

    # ---- what there is

    @property
    def costs(self) -> Costs:
        """What moving and computing take, to be told what steps took."""
        return self.store.costs

    @property
    def stats(self) -> CacheStats:
        return self.store.stats

    def available(self, group: int) -> int:
        """Pages of a group that are free or can be made free without touching a running sequence."""
        return self.store.available(group)

    def usage(self) -> dict[Tier, tuple[int, ...]]:
        """Pages in use per tier and group; cached pages that nobody uses count."""
        return {Tier.HBM: tuple(pool.used for pool in self.store.hbm),
                Tier.HOST: tuple(pool.used for pool in self.store.host)}

    def curves(self) -> dict[Tier, list[Point]]:
        """Page hit rates over capacities of each tier and those above together: what more memory would be worth."""
        return {tier: policy.curve() for tier, policy in self.store.policies.items()}

    @property
    def disk(self) -> DiskIndex | None:
        """The disk tier, if there is one."""
        return self._prefetcher.disk

    @disk.setter
    def disk(self, disk: DiskIndex) -> None:
        self._prefetcher.disk = disk

    @property
    def loading(self) -> bool:
        """Whether pages are under way: an ``arrived`` will follow."""
        return self._loader.busy

    @property
    def bringing(self) -> bool:
        """Whether the step of the plan under construction waits for host pages."""
        return any(move.src[0] is Tier.HOST and move.dst is not None and move.dst[0] is Tier.HBM for move in self.store.moves)

    @property
    def plans_ended(self) -> int:
        """How often ``take_transfers`` was called."""
        return self.store.plan

    def take_transfers(self) -> Transfers:
        """What the plan under construction does to pages, each kind in the order it must run. Ends the plan."""
        self._tiering.offload(self._watermark)
        landings, fetches = self._loader.take()
        moves, saves = tuple(self.store.moves), tuple(self.store.saves)
        self.store.moves.clear()
        self.store.saves.clear()
        self.store.plan += 1
        return Transfers(landings, moves, saves, fetches)

    def tick(self, now: float) -> None:
        """Time passes, for retention; seconds on the injected clock, once a plan."""
        self._now = now
        for policy in self.store.policies.values():
            policy.tick(now)

    def check(self, sequences: list[Sequence]) -> None:
        """Recompute all ownership; ``sequences``: those acquired and not released. AssertionError if it is broken."""
        check(self.store, sequences, self._loader.loads)

    @property
    def has_host_tier(self) -> bool:
        return self.store.host_capacity > 0

    def lose_host_tier(self) -> None:
        """Forget what the host tier holds and use it no more; loads that need it have failed. Then ``bury``."""
        self.store.host_capacity = 0
        self._loader.fail_host()

    def save(self, pages: int) -> None:
        """Hand up to ``pages`` pages that only memory has to the disk tier, for the end of the process."""
        for node in self.trie.nodes():
            if pages <= 0:
                return
            if self.disk is not None and not node.refs:
                before = len(self.store.saves)
                self._tiering.save(node, most=pages)
                pages -= len(self.store.saves) - before

    # ---- a sequence waits

    def keep(self, seq: Sequence, plan_id: int) -> bool:
        """Keep what HBM has of a waiting sequence's prefix until ``leave`` is called; False: nothing."""
        return self.enable_prefix_caching and seq.sound and self._prefetcher.keep(seq, plan_id)

    def prefetch(self, seq: Sequence, plan_id: int, most: list[int], spare: list[int]) -> bool | None:
        """Begin to bring the prefix of a waiting sequence to HBM if all of it, at most ``most[group]`` pages besides the
        prefix, will fit and leave ``spare[group]`` to others.

        True: the sequence has pages on the way, or kept for it, (``Sequence.waits``) until ``leave`` is called. None: there
        is no room.
        """
        return self.enable_prefix_caching and seq.sound and self._prefetcher.prefetch(seq, plan_id, most, spare)

    def leave(self, seq: Sequence) -> None:
        """A sequence that waits for pages enters, or gives up."""
        for load in seq.waits:
            self._loader.leave(load)
        seq.waits = []

    def arrived(self, arrival: Arrival) -> bool:
        """Learn how a fetch ended. False: loads have failed; whoever waits for one must ``leave``, then ``bury`` them."""
        return self._loader.arrived(arrival)

    def cancel(self) -> bool:
        """Make room by giving up what was begun last to be brought; False if there is nothing. As if it had failed."""
        return self._loader.cancel()

    def bury(self) -> None:
        """Forget the pages of failed loads, and of a host tier that was lost."""
        self._loader.bury()
        if not self.store.host_capacity:
            drop_host(self.store)

    # ---- KV that turned out wrong

    def forget(self, seq: Sequence) -> None:
        """Drop, from every tier, what holds a sequence's tokens or a page that it copied, and all below, but not what others
        see."""
        names = drop_wrong(self.store, seq)
        if self.disk is not None:
            self.disk.forget(names)

    # ---- HBM was lost

    def lose_hbm(self, since: int, seqs: list[tuple[Sequence, int]]) -> None:
        """Forget what HBM held, the host pages that were to be made of it since so many plans had ended, every transfer under
        way, and what the disk has of the sequences from a position on. Nobody uses anything or waits for pages. The other
        host pages stay (``host_pages``) and are found again, those below HBM nodes once these are computed anew."""
        self._tiering.lose(since)
        self._loader.clear()
        self.store.moves.clear()
        self.store.saves.clear()
        if self.disk is not None:
            self.disk.forget([name for seq, start in seqs for name in
                              self.trie.page_names(seq.request.namespace, seq.tokens)[start // self.page_size:]])

    def host_pages(self) -> set[tuple[int, int]]:
        """(group, page) of all that the host tier holds, while nothing is under way."""
        return {(g, page) for node in self.trie.nodes() if node.tier is Tier.HOST
                for g, pages in enumerate(node.pages) for page in pages if page >= 0}

    # ---- a sequence enters

    def acquire(self, seq: Sequence, plan_id: int, cold: bool = True) -> int:
        """Start a sequence on the longest cached prefix of its first ``match_limit`` tokens, and return its length.

        Pins the path, brings its HOST pages back in this very plan (not ``cold``: does without them), copies a partly
        matching page into a private one, and sets ``pages``, ``num_scheduled`` and ``dirty``. It never fails: where room is
        missing for the copy or for all the HOST pages the match is shorter, and a match of 0 needs no room. What the caller
        cannot ``grow`` afterwards, it releases.
        """
        seq.pages = [[] for _ in self.groups]
        seq.dirty = [0] * len(self.groups)
        seq.first = [0] * len(self.groups)
        seq.node = None
        seq.num_scheduled = seq.num_published = seq.num_matched = seq.num_settled = 0
        seq.came = (0, 0)
        return self._admission.begin(seq, plan_id, cold) if self.enable_prefix_caching and seq.sound else 0

    # ---- a sequence runs

    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Pages for positions [0, ``num_tokens``), called before every chunk; the chunk starts at ``num_scheduled``.

        Window groups let go of the pages that no position from there on sees. False: no room, and no page was taken.
        """
        start = seq.num_settled = seq.num_scheduled
        for g, window in self._windows:
            if (start - window + 1) // self.page_size > seq.first[g]:
                self._slide(seq, g, (start - window + 1) // self.page_size)
        need = -(-num_tokens // self.page_size) - len(seq.pages[0])
        if need <= 0:
            return True
        if not self._tiering.reserve([need] * len(seq.pages)):
            return False
        for pages, pool in zip(seq.pages, self.store.hbm, strict=True):
            pages += pool.take_many(need)
        return True

    def _slide(self, seq: Sequence, group: int, first: int) -> None:
        """Let go of a window group's pages before index ``first``."""
        pages, pool = seq.pages[group], self.store.window_pool(group)
        shared = -(-seq.num_published // self.page_size)
        first = min(first, len(pages))
        for i in range(seq.first[group], first):
            if i < shared:
                pool.unshare(pages[i])
            else:
                pool.give(pages[i])
            pages[i] = -1
        seq.first[group] = first

    def publish(self, seq: Sequence, plan_id: int) -> None:
        """Give the trie the full pages of known, scheduled tokens, and the last page of a prompt that is complete.

        Where the trie has a page already the sequence goes over to it. Cheap when there is nothing to give.
        """
        if self._stores(seq):
            self._publisher.publish(seq, plan_id)

    def _stores(self, seq: Sequence) -> bool:
        return self.enable_prefix_caching and not seq.request.no_store and seq.sound

    def release(self, seq: Sequence, ended: bool = False) -> None:
        """Publish everything, a partly filled last page included, and hold nothing any more.

        For the end of a sequence and an abort (``ended``) and for a preemption, but not while a chunk of it is in the
        plan under construction.
        """
        store = self.store
        if seq.node is not None and self._stores(seq):
            self._publisher.publish_all(seq)
        shared = -(-seq.num_published // self.page_size)
        for g, pages in enumerate(seq.pages):
            for page in pages[shared:]:
                if page >= 0:
                    store.hbm[g].give(page)
        for g, _ in self._windows:
            for page in reversed(seq.pages[g][seq.first[g]:shared]):
                store.window_pool(g).unshare(page)
        store.unpin(seq.node)
        hints.leave(store, seq.node, seq.request, ended, self._now)
        seq.pages, seq.first, seq.dirty, seq.node, seq.num_published = [], [], [], None, 0

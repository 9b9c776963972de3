"""Metadata-only caches that run beside a tier on a sample of its pages, to compare rankings and capacities.

Pages are sampled by digest, so a sample of 1/n of the pages in a cache of 1/n of the capacity sees 1/n of the hits
(SHARDS, Waldspurger et al., FAST 2015). A page lies in the queue of its class (see ``reuse``), by last use. Two rankings
compete, both a choice between the heads of the queues: the one used longest ago (LRU), or the one worth least. The tier
uses the one that hits more; changing over moves nothing. Other shadows have other capacities and rank as the tier does:
their hits are the curve "so much more memory = so many more hits".
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush
from math import sqrt

from jaxkv.cache.eviction.base import Point
from jaxkv.cache.eviction.reuse import CLASSES, NEVER, Cohort, ReuseModel, class_of, one_more

RECENCY, WORTH = 0, 1  # rankings
SAMPLED = 512  # pages at least that a shadow of the tier's own capacity holds, or all of them
HISTORY = 8  # times the capacity is remembered of pages that left
WINDOW = 2.0  # turnovers after which hits count half in the comparison
CERTAIN = 0.5  # standard errors that a ranking must be ahead by to be taken
REFRESH = 16  # comparisons in a turnover
CURVE = (1.0, 1.25, 1.5, 2.0, 4.0)  # capacities of the curve, in those of this tier and the ones above


class _Page:
    """A sampled page. Its queue is the one of ``cls`` in every shadow that holds it."""

    __slots__ = ("cls", "level", "clock", "cohort")

    def __init__(self) -> None:
        self.cls = -1
        self.level = NEVER
        self.clock = 0.0
        self.cohort: Cohort | None = None


class _Shadow:
    """A cache of ``capacity`` sampled pages; ``ranking`` None: that of the tier."""

    def __init__(self, capacity: float, ranking: int | None) -> None:
        self.capacity = max(1, round(capacity))
        self.ranking = ranking
        self.hits = 0.0
        self.size = 0
        self.queues: list[dict[bytes, float]] = [{} for _ in range(CLASSES)]  # digest -> clock of last use, oldest first

    def use(self, digest: bytes, before: int, cls: int, clock: float) -> None:
        if before >= 0 and self.queues[before].pop(digest, None) is not None:
            self.hits += 1.0
        else:
            self.size += 1
        self.queues[cls][digest] = clock

    def shrink(self, ranking: int, model: ReuseModel, clock: float) -> None:
        """Evict down to the capacity: ranks of the heads of the queues stand still while ``clock`` does."""
        if self.size <= self.capacity:
            return
        heads: list[tuple[float, float, int]] = []  # rank, clock of last use, class

        def enter(cls: int) -> None:
            if queue := self.queues[cls]:
                used = queue[next(iter(queue))]
                heappush(heads, (model.table[cls][model.step(clock - used)] if ranking == WORTH else 0.0, used, cls))

        for cls in range(CLASSES):
            enter(cls)
        while self.size > self.capacity:
            _, _, cls = heappop(heads)
            del self.queues[cls][next(iter(self.queues[cls]))]
            self.size -= 1
            enter(cls)


class Directory:
    """Follows the sampled pages of every request; learns, compares and reports for one tier.

    ``reach``: pages of this tier and the ones above, which exclusive tiers make one cache.
    """

    def __init__(self, reach: int) -> None:
        self.reach = reach
        self.mask = (1 << max(0, (reach // SAMPLED).bit_length() - 1)) - 1
        self.model = ReuseModel(reach)
        self.ranking = WORTH  # without observations it is recency too
        self._share = 1.0 / (self.mask + 1)
        self._pages: dict[bytes, _Page] = {}  # by last use
        own = reach * self._share
        self._arms = [_Shadow(own, RECENCY), _Shadow(own, WORTH)]
        self._curve = [_Shadow(own * factor, None) for factor in CURVE]
        self._reads = 0.0  # sampled, in the window
        self._lead = 0.0  # hits of WORTH beyond those of RECENCY, in the window
        self._spread = 0.0  # sum of the squares of these differences by request
        self._refreshed = 0.0  # clock

    def samples(self, digest: bytes) -> bool:
        return not int.from_bytes(digest[:4], "little") & self.mask

    def request(self, digests: Sequence[bytes], clock: float) -> None:
        """A request read or wrote these sampled pages, deepest first, after ``clock`` pages were inserted in all."""
        model, pages, shadows = self.model, self._pages, [*self._arms, *self._curve]
        model.age(clock)
        recency, worth = self._arms
        before_lead = worth.hits - recency.hits
        uses, mine = [], []
        for digest in digests:
            page = pages.pop(digest, None)
            if page is None:
                page = _Page()
            before = page.cls
            page.level = one_more(page.level - model.lost(clock - page.clock))
            page.clock = clock
            page.cls = class_of(page.level)
            pages[digest] = page
            for shadow in shadows:
                shadow.use(digest, before, page.cls, clock)
            uses.append((page.cls, page.cohort))
            mine.append(page)
        opened = model.use(clock, uses)
        for page in mine:
            page.cohort = opened[page.cls]
        for shadow in shadows:
            shadow.shrink(self.ranking if shadow.ranking is None else shadow.ranking, model, clock)
        self._reads += len(digests)
        lead = worth.hits - recency.hits - before_lead
        self._lead += lead
        self._spread += lead * lead
        self._forget()
        if clock - self._refreshed >= max(32.0, self.reach / REFRESH):
            turnovers = (clock - self._refreshed) / self.reach
            self._refreshed = clock
            model.refresh(turnovers)
            self._compare(turnovers)

    def _forget(self) -> None:
        """Drop what was not used for long; at most the largest shadow still holds it."""
        limit = HISTORY * self.reach * self._share + 1024
        while len(self._pages) > limit:
            digest, page = next(iter(self._pages.items()))
            del self._pages[digest]
            for shadow in (*self._arms, *self._curve):
                if shadow.queues[page.cls].pop(digest, None) is not None:
                    shadow.size -= 1

    def _compare(self, turnovers: float) -> None:
        """Change the ranking when the other one is clearly ahead; let the window move on."""
        if abs(self._lead) > CERTAIN * sqrt(self._spread):
            self.ranking = WORTH if self._lead > 0 else RECENCY
        keep = 0.5 ** (turnovers / WINDOW)
        self._reads *= keep
        self._lead *= keep
        self._spread *= keep
        for shadow in (*self._arms, *self._curve):
            shadow.hits *= keep

    def curve(self) -> list[Point]:
        """Hit rates of page reads over capacities, as of the last few turnovers; empty before the first request."""
        return [Point(round(factor * self.reach), shadow.hits / self._reads)
                for factor, shadow in zip(CURVE, self._curve) if self._reads]

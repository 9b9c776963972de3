"""What it costs to bring pages back and to compute them, learnt from what steps and fetches took.

Owns the estimates and the choices that follow from them. A fetch takes ``a * pages + b`` seconds of its link. A step takes
``c * tokens + d * positions + e``, where ``positions`` is the sum of its tokens' positions: attention over what came before
makes computing a page cost more the deeper it lies (RAGCache, Jin et al. 2024, weighs nodes so). What a step with moves
takes beyond that is the moves' doing, by page.

A page moves down if its share of being used again times what that saves is more than the move costs. The share and the
saving are those of pages that moved down before, whatever their depth: shallow ones are asked for more often, deep ones save
more, and a path is lost with its upper part.

Trying takes time too. Until prefill was measured, everything moves. Then few pages do, twice as many each time, as long
as steps do not notice, and of a tier never fetched from comes one. What the estimates speak against is tried again once it
should take less than ``TRIALS`` of what steps took since the last try: the link may have become quicker.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

from jaxkv.cache.fits import Fates, Fit
from jaxkv.types import Tier

MEMORY = 64.0  # steps
LINK_MEMORY = 8.0  # fetches, and steps with moves: links change, and are measured less often
TRAINED = 8  # steps measured before moves are blamed for anything
SURPRISE = 0.25  # share of a step that noise may explain
GROWTH = 4
FALL = 0.25  # share of what a link is remembered by, once it was found to be quicker
LINK_WEIGHT = 0.5  # of a second on a link, mostly ahead of need, against one of a step, for which others wait too
BEGIN = 1.25  # gain over cost to take up moving again; at 1 it ends: half a path in a tier is of no use
TRIALS = 0.004


class _Way:
    """A tier to move to and to fetch from."""

    def __init__(self) -> None:
        self.fetches = Fit(2, LINK_MEMORY)  # pages, 1
        self.open = False  # whether moving there was worth it when asked last
        self.budget = 0.0  # seconds for trials

    def affordable(self, pages: int, each: float, fixed: float = 0.0) -> int:
        """How many of ``pages`` to try, which should take ``fixed`` + ``each`` * pages seconds; spends them."""
        spare = self.budget - fixed
        pages = 0 if spare <= 0.0 else min(pages, int(spare / each)) if each else pages
        if pages:
            self.budget -= fixed + pages * each
        return pages


class Costs:
    """Seconds by link and of prefill. One instance per cache; what it is told decides all it says."""

    def __init__(self, page_size: int, fetch_pages: int = 64) -> None:
        self._page_size = page_size
        self._fetch_pages = fetch_pages  # most of one fetch
        self._ways = {Tier.HOST: _Way(), Tier.DISK: _Way()}
        self._steps = Fit(3, MEMORY)  # tokens, positions, 1
        self._moves = Fit(1, LINK_MEMORY)  # pages, beyond the step
        self._fates = Fates()
        self._most = 1  # pages that the next step may move to see what it takes
        self._left = 0  # of those
        self._noticed = False  # whether a step took longer for its moves

    # ---- learn

    def fetched(self, tier: Tier, pages: int, seconds: float) -> None:
        """A fetch of ``pages`` from ``tier`` kept its link busy for ``seconds``."""
        self._ways[tier].fetches.add(seconds, pages, 1.0, fall=FALL)

    def stepped(self, tokens: int, positions: int, moved: int, seconds: float) -> None:
        """A step ran ``tokens`` whose positions add up to ``positions``; its plan moved ``moved`` pages to and from HBM."""
        step, moves = self._steps(tokens, positions, tokens > 0), self._moves(moved)
        if moved:
            self._moves.add(seconds - step, moved, fall=FALL)
            self._noticed |= seconds > (1.0 + SURPRISE) * step
            self._most = min(GROWTH * self._most, GROWTH * self._fetch_pages)
        if not moved or abs(seconds - step - moves) <= SURPRISE * step:
            self._steps.add(max(0.0, seconds - moves), tokens, positions, tokens > 0)
        self._left = self._most if self._steps.count >= TRAINED else 0
        for way in self._ways.values():
            way.budget += TRIALS * seconds

    def used(self, start: int, end: int, held: int) -> None:
        """Somebody asked for positions [start, end), which the host tier has among ``held`` pages."""
        self._fates.used(self._pages(start, end), self.prefill_seconds(start, end), held)

    def lost(self, pages: int, held: int) -> None:
        """The host tier drops ``pages`` of its ``held`` ones."""
        self._fates.lost(pages, held)

    # ---- say

    @property
    def measured(self) -> bool:
        """Whether prefill was."""
        return self._steps.count > 0

    def prefill_seconds(self, start: int, end: int) -> float:
        """To compute positions [start, end), besides what a step takes anyway."""
        return self._steps(end - start, (end - start) * (start + end - 1) / 2)

    def fetch_seconds(self, pages: Mapping[Tier, int]) -> float:
        """To bring ``pages[tier]`` over idle links, one tier after the other; 0 from tiers that were not measured."""
        return sum(self._ways[tier].fetches(count, -(-count // self._fetch_pages)) for tier, count in pages.items())

    def worth_moving(self, tier: Tier, start: int, end: int, held: int) -> int:
        """How many pages of the KV of positions [start, end), which would be lost, to move to ``tier``: all, none, or the
        first few to see what it takes. ``held``: pages in the host tier."""
        pages = self._pages(start, end)
        if not self.measured:
            return pages
        if not self._noticed and self._most < GROWTH * self._fetch_pages:
            pages = min(pages, self._left)
            self._left -= pages
            return pages
        way, cost = self._ways[tier], LINK_WEIGHT * self._moves(1)
        saved = self._fates.saved(self.prefill_seconds(start, end) / pages) - LINK_WEIGHT * way.fetches(1)
        way.open = self._fates.share_used(held) * saved >= cost * (1.0 if way.open else BEGIN)
        return pages if way.open else way.affordable(pages, cost)

    def best_cut(self, start: int, runs: list[tuple[Tier, int]], length: int, busy: Container[Tier] = ()) -> int:
        """How many pages of ``runs`` (tier and pages, one after the other from position ``start``) to bring before the rest
        of ``length`` tokens is computed, so that the first token comes soonest. From a tier that was never measured at
        most one, and none while it is ``busy``."""
        if not self.measured:
            return sum(pages for _, pages in runs)
        brought = dict.fromkeys(self._ways, 0)
        at, best, cut = 0, self.prefill_seconds(start, length), 0
        for tier, pages in runs:
            few = pages if self._ways[tier].fetches.count else int(tier not in busy)
            brought[tier] += few
            at += few
            rest = self.prefill_seconds(min(start + at * self._page_size, length), length)
            if self.fetch_seconds(brought) + rest <= best:
                best, cut = self.fetch_seconds(brought) + rest, at
            if few < pages:
                break
        if runs and not cut and self._ways[runs[0][0]].fetches.count:
            way = self._ways[runs[0][0]]
            return way.affordable(runs[0][1], *way.fetches.terms)
        return cut

    def _pages(self, start: int, end: int) -> int:
        return -(-(end - start) // self._page_size)

"""What it costs to bring pages back and to compute them, learnt from what steps and fetches took.

Owns running fits and the choice between the ways. A fetch takes ``a + b * pages`` seconds per link. A step takes
``c + d * tokens + e * positions + f * pages``: ``positions`` is the sum of its tokens' positions, attention over what came
before, which is why computing a page costs more the deeper it lies (RAGCache, Jin et al. 2024, weighs nodes so), and
``pages`` are those that its plan moves between tiers. Old measurements count half after ``MEMORY`` newer ones, a link's
after ``LINK_MEMORY``.

Trying costs time too. Until prefill was measured, all is brought. Then a link is tried with one page. A way that the fits speak against is tried again once the predicted
time is at most ``TRIALS`` of what steps took since the last try: it may have become quicker.
"""

from __future__ import annotations

from collections.abc import Container, Mapping

from jaxkv.types import Tier

MEMORY = 64.0  # steps
LINK_MEMORY = 8.0  # fetches
TRIALS = 0.004
LINK_WEIGHT = 0.5  # of a second on a link against one of a step, which keeps others waiting too
BEGIN = 1.25
RESIDENT = 0.5  # chance of a page in the host tier to be used
SWEEPS = 8  # of the solver, which goes on from where it was


class _Fit:
    """y = sum(u * x), u >= 0, by decayed least squares: coordinate descent on the normal equations (Franc, Hlaváč and
    Navara 2005). What could be any term's doing goes to the first that may explain it."""

    def __init__(self, terms: int, memory: float) -> None:
        self._keep = 0.5 ** (1.0 / memory)
        self._xx = [[0.0] * terms for _ in range(terms)]
        self._xy = [0.0] * terms
        self.terms = [0.0] * terms
        self.count = 0

    def __call__(self, x: tuple[float, ...]) -> float:
        return sum(a * b for a, b in zip(self.terms, x))

    def add(self, x: tuple[float, ...], y: float) -> None:
        keep, u = self._keep, self.terms
        for i, row in enumerate(self._xx):
            self._xx[i] = [keep * old + x[i] * other for old, other in zip(row, x)]
            self._xy[i] = keep * self._xy[i] + x[i] * y
        for _ in range(SWEEPS):
            for i, row in enumerate(self._xx):
                if row[i] > 0.0:
                    u[i] = max(0.0, u[i] + (self._xy[i] - sum(a * b for a, b in zip(row, u))) / row[i])
        self.count += 1


class _Way:
    """A tier to move to and fetch from."""

    def __init__(self) -> None:
        self.fit = _Fit(2, LINK_MEMORY)  # pages, 1
        self.budget = 0.0  # seconds for tries
        self.open = True  # whether moving there was worth it when asked last

    def affordable(self, pages: int, fixed: float, each: float) -> int:
        """How many of ``pages`` to try, which should take ``fixed`` + ``each`` * pages seconds; that is spent."""
        spare = self.budget - fixed
        pages = 0 if spare <= 0.0 else min(pages, int(spare / each)) if each else pages
        if pages:
            self.budget -= fixed + pages * each
        return pages


class _Fates:
    """What became of pages in the host tier: as many fates count as it has held twice over."""

    def __init__(self) -> None:
        self.used = self.lost = 0.0  # pages
        self.saved = 0.0  # seconds, by those that were used

    def add(self, pages: int, saved: float | None, held: int) -> None:
        """``pages`` of ``held`` were used, which ``saved`` seconds, or lost (None)."""
        keep = 1.0 - pages / (2 * max(held, pages))
        self.used, self.lost, self.saved = self.used * keep, self.lost * keep, self.saved * keep
        if saved is None:
            self.lost += pages
        else:
            self.used += pages
            self.saved += saved

    def share_used(self, held: int) -> float:
        """Share of the pages moved down that are used again; of those still there, which ``held`` counts, half."""
        return (self.used + RESIDENT * (held + 1)) / (self.used + self.lost + held + 1)


class Costs:
    """Seconds by link and of prefill. One instance per cache; what it is told decides all it says."""

    def __init__(self, page_size: int, fetch_pages: int = 64) -> None:
        self._page_size = page_size
        self._fetch_pages = fetch_pages
        self._ways = {Tier.HOST: _Way(), Tier.DISK: _Way()}
        self._step = _Fit(3, MEMORY)  # tokens, positions, 1
        self._out = _Fit(1, LINK_MEMORY)  # pages
        self._fates = _Fates()
        self._tried = False  # whether a step with the first page that moves may be under way

    # ---- learn

    def fetched(self, tier: Tier, pages: int, seconds: float) -> None:
        """A fetch of ``pages`` from ``tier`` kept its link busy for ``seconds``."""
        self._ways[tier].fit.add((pages, 1.0), seconds)

    def stepped(self, tokens: int, positions: int, moved: int, seconds: float) -> None:
        """A step ran ``tokens`` whose positions add up to ``positions``; its plan moved ``moved`` pages between tiers."""
        step = (tokens, positions, float(tokens > 0))
        if moved:
            self._out.add((moved,), seconds - self._step(step))
        else:
            self._step.add(step, seconds)
        self._tried = False
        for way in self._ways.values():
            way.budget += TRIALS * seconds

    def asked_for(self, start: int, end: int, held: int) -> None:
        """The host tier, which holds ``held`` pages, gives up positions [start, end) as somebody uses them."""
        self._fates.add(-(-(end - start) // self._page_size), self.prefill_seconds(start, end), held)

    def dropped(self, pages: int, held: int) -> None:
        """The host tier, which holds ``held`` pages, drops some."""
        self._fates.add(pages, None, held)

    # ---- say

    @property
    def measured(self) -> bool:
        return self._step.count > 0

    def prefill_seconds(self, start: int, end: int) -> float:
        """To compute positions [start, end), besides what a step costs anyway."""
        return self._step((end - start, (end - start) * (start + end - 1) / 2, 0.0))

    def fetch_seconds(self, tier: Tier, pages: int) -> float:
        """To bring ``pages`` from ``tier`` over an idle link."""
        each, fixed = self._ways[tier].fit.terms
        return fixed * -(-pages // self._fetch_pages) + each * pages

    def worth_moving(self, tier: Tier, start: int, end: int, held: int) -> int:
        """How many pages of the KV of positions [start, end), which would be lost, to move to ``tier``: all if that takes
        less than it saves on average, perhaps some to see what it takes, or none. ``held``: pages in the host tier."""
        pages = -(-(end - start) // self._page_size)
        if not self.measured:
            return pages
        if not self._out.count:
            tried, self._tried = self._tried, True
            return int(not tried)
        way, out, fates = self._ways[tier], self._out((1.0,)), self._fates
        saved = fates.saved / fates.used if fates.used else self.prefill_seconds(start, end) / pages
        gain = fates.share_used(held) * (saved - LINK_WEIGHT * way.fit.terms[0])
        way.open = gain >= out * (1.0 if way.open else BEGIN)
        return pages if way.open else way.affordable(pages, 0.0, out)

    def bring_seconds(self, pages: Mapping[Tier, int]) -> float:
        """To bring ``pages[tier]`` over idle links, one tier after the other."""
        return sum(self.fetch_seconds(tier, count) for tier, count in pages.items() if count)

    def best_cut(self, start: int, runs: list[tuple[Tier, int]], length: int, busy: Container[Tier] = ()) -> int:
        """How many pages of ``runs`` (tier and pages, one after the other from position ``start``) to bring before the rest
        of ``length`` tokens is computed, so that the first token comes soonest. From a tier that was
        never measured at most one, and none while it is ``busy``."""
        if not self.measured:
            return sum(pages for _, pages in runs)
        brought = dict.fromkeys(self._ways, 0)
        at, best, cut = 0, self.prefill_seconds(start, length), 0
        for tier, pages in runs:
            most = pages if self._ways[tier].fit.count else int(tier not in busy)
            brought[tier] += most
            at += most
            seconds = self.bring_seconds(brought) + self.prefill_seconds(min(start + at * self._page_size, length), length)
            if seconds <= best:
                best, cut = seconds, at
            if most < pages:
                break
        way = self._ways[runs[0][0]] if runs else None
        if way is not None and not cut and way.fit.count:
            each, fixed = way.fit.terms
            return way.affordable(runs[0][1], fixed, each)
        return cut

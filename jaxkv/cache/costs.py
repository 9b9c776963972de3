"""What it costs to bring pages back and to compute them, learnt from what steps and fetches took.

Owns two running fits and the choice between the two ways. A fetch takes ``a + b * pages`` seconds per link; prefill of
tokens at positions p takes ``c * tokens + d * sum(p)``, the second term being attention over what came before, which is why
computing a page costs more the deeper it lies (RAGCache, Jin et al. 2024, weighs nodes so). Old measurements count half
after ``MEMORY`` newer ones. Until both sides were measured, moving is taken to be cheaper.
"""

from __future__ import annotations

from jaxkv.types import Tier

MEMORY = 64.0  # measurements


class _Fit:
    """y = u * x1 + v * x2 with u, v >= 0 by decayed least squares."""

    def __init__(self) -> None:
        self._sums = [0.0] * 5  # x1 x1, x1 x2, x2 x2, x1 y, x2 y
        self.count = 0

    def add(self, x1: float, x2: float, y: float) -> None:
        keep = 0.5 ** (1.0 / MEMORY)
        new = (x1 * x1, x1 * x2, x2 * x2, x1 * y, x2 * y)
        self._sums = [keep * old + value for old, value in zip(self._sums, new)]
        self.count += 1

    def __call__(self, x1: float, x2: float) -> float:
        a, b, c, p, q = self._sums
        det = a * c - b * b
        if det > 1e-9 * a * c:
            u, v = (p * c - q * b) / det, (q * a - p * b) / det
            if u >= 0.0 and v >= 0.0:
                return u * x1 + v * x2
        alone = ((p / a if a else 0.0) * x1, (q / c if c else 0.0) * x2)  # one term explains it all
        errors = (-p * p / a if a else 0.0, -q * q / c if c else 0.0)
        return alone[errors[1] < errors[0]]


class Costs:
    """Seconds by link and of prefill. One instance per cache; what it is told decides all it says."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._links = {Tier.HOST: _Fit(), Tier.DISK: _Fit()}
        self._prefill = _Fit()

    # ---- learn

    def fetched(self, tier: Tier, pages: int, seconds: float) -> None:
        """A fetch of ``pages`` from ``tier`` took ``seconds``."""
        self._links[tier].add(1.0, pages, seconds)

    def stepped(self, tokens: int, positions: int, seconds: float) -> None:
        """A step with prefill ran ``tokens`` whose positions add up to ``positions``."""
        self._prefill.add(tokens, positions, seconds)

    # ---- say

    @property
    def measured(self) -> bool:
        return self._prefill.count > 0

    def prefill_seconds(self, start: int, end: int) -> float:
        """To compute positions [start, end)."""
        return self._prefill(end - start, (end - start) * (start + end - 1) / 2)

    def fetch_seconds(self, tier: Tier, pages: int) -> float:
        """To bring ``pages`` from ``tier``; 0 for none, and until the link was measured."""
        return self._links[tier](1.0, pages) if pages and self._links[tier].count else 0.0

    def worth_moving(self, tier: Tier, start: int, end: int) -> bool:
        """Whether bringing the KV of positions [start, end) back from ``tier`` would beat computing it again, as a part of a
        longer prefix: what a fetch takes whatever its size does not count, or tails of a few pages would all be dropped."""
        pages = -(-(end - start) // self._page_size)
        return not self.measured or self._links[tier](0.0, pages) <= self.prefill_seconds(start, end)

    def best_cut(self, start: int, runs: list[tuple[Tier, int]], length: int) -> int:
        """How many of ``runs`` (tier and pages, one after the other from position ``start``) to bring before the rest of
        ``length`` tokens is computed, so that the first token comes soonest."""
        if not self.measured:
            return len(runs)
        pages = dict.fromkeys(self._links, 0)
        at, best, cut = start, self.prefill_seconds(start, length), 0
        for index, (tier, count) in enumerate(runs, 1):
            pages[tier] += count
            at += count * self._page_size
            seconds = sum(self.fetch_seconds(t, n) for t, n in pages.items()) + self.prefill_seconds(min(at, length), length)
            if seconds <= best:
                best, cut = seconds, index
        return cut

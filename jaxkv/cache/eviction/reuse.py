"""What a page is worth that was used n times and last so long ago: learned from a sample of all pages.

Ages are in pages inserted, divided into half-octaves around the reach (the pages of this tier and those above). A use
puts a page into the class of its decayed count and opens a *cohort*, the pages of one request in one class. A cohort
that lives through an age step adds its pages to ``at risk`` there, a page that is used again adds to ``used`` where it
was: their quotient is the chance to be used in this age step for those not used before it (Kaplan and Meier, 1958).
Classes with few observations lean on all classes together.

The worth of (class, age) is the best rate to be had by keeping such a page: chance of a use until t / expected space-time
until t, for the best t. That is Gittins' index (1979); hit density (LHD, Beckmann et al., NSDI 2018) is the same with t
infinite. More uses are never worth less. There is no half-life to choose that decides between recency and frequency: how
fast a count loses its value is what the table says, and it is forgotten by half in ``MEMORY`` turnovers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import log2

CLASSES = 16  # by log2 of the decayed count
STEPS = 28  # half-octaves of age, from reach / 2**7 to reach * 2**6
MEMORY = 8.0  # turnovers of the reach
LEAN = 3.0  # requests' worth of observations that the common curve counts
NEVER = -64.0  # log2 of a count that is as good as none
HALF_LIFE = 4.0  # turnovers of the reach, of the counts that make the classes


def one_more(level: float) -> float:
    """log2 of a count after one more use; of one use if there was none for very long."""
    return level + log2(1.0 + 2.0**-level) if level > NEVER else 0.0


def class_of(level: float) -> int:
    """The class of a page with 2**level uses."""
    return min(CLASSES - 1, int(level + 0.5))


class Cohort:
    """Pages of one class used at one time."""

    __slots__ = ("clock", "cls", "count", "step")

    def __init__(self, clock: float, cls: int) -> None:
        self.clock = clock
        self.cls = cls
        self.count = 0  # those not used since
        self.step = 0  # of age


class ReuseModel:
    """Learns when pages are used again. ``reach`` and clocks are in pages, counts in sampled pages."""

    def __init__(self, reach: int) -> None:
        self.reach = reach
        self._edges = [0.0, *(reach * 2.0 ** ((i - 14) / 2) for i in range(1, STEPS + 1))]
        self._used = [[0.0] * STEPS for _ in range(CLASSES)]
        self._risk = [[0.0] * STEPS for _ in range(CLASSES)]
        self._cohorts: list[deque[Cohort]] = [deque() for _ in range(STEPS - 1)]  # by step, oldest first
        self._request = 1.0  # pages of a request, on average
        self.table = [[1.0] * STEPS for _ in range(CLASSES)]

    # ---- look up

    def lost(self, age: float) -> float:
        """What log2 of a count loses in ``age`` pages."""
        return age / (HALF_LIFE * self.reach)

    def step(self, age: float) -> int:
        if age < self._edges[1]:
            return 0
        return min(STEPS - 1, int(2 * log2(age / self.reach) + 14))

    # ---- learn

    def use(self, clock: float, pages: Sequence[tuple[int, Cohort | None]]) -> dict[int, Cohort]:
        """A request used sampled pages: class after the use, and cohort before it. Returns the new cohort per class."""
        opened: dict[int, Cohort] = {}
        for cls, before in pages:
            if before is not None:
                before.count -= 1
                self._used[before.cls][before.step] += 1.0
            cohort = opened.get(cls)
            if cohort is None:
                cohort = opened[cls] = Cohort(clock, cls)
                self._cohorts[0].append(cohort)
            cohort.count += 1
        for cls, cohort in opened.items():
            self._risk[cls][0] += cohort.count
        self._request += (len(pages) - self._request) / 64
        return opened

    def age(self, clock: float) -> None:
        """Take cohorts over the age steps that they lived through."""
        for step, cohorts in enumerate(self._cohorts):
            limit = clock - self._edges[step + 1]
            while cohorts and cohorts[0].clock <= limit:
                cohort = cohorts.popleft()
                if cohort.count:
                    cohort.step = step + 1
                    self._risk[cohort.cls][step + 1] += cohort.count
                    if step + 2 < STEPS:
                        self._cohorts[step + 1].append(cohort)

    def refresh(self, turnovers: float) -> None:
        """Recompute the table, and forget what is due after ``turnovers`` more. O(CLASSES * STEPS)."""
        used = [sum(column) for column in zip(*self._used)]
        risk = [sum(column) for column in zip(*self._risk)]
        common = [(u + 0.02) / (r + 1.0) for u, r in zip(used, risk)]
        lean = LEAN * max(1.0, self._request)
        below = [0.0] * STEPS
        for cls, (used, risk) in enumerate(zip(self._used, self._risk)):
            if risk[0] > 0.01:
                chances = [min(0.999, (u + lean * c) / (r + lean)) for u, r, c in zip(used, risk, common)]
                below = [max(pair) for pair in zip(below, self._worths(chances))]
            self.table[cls] = below
        keep = 0.5 ** (turnovers / MEMORY)
        for table in (self._used, self._risk):
            for cls, row in enumerate(table):
                table[cls] = [x * keep for x in row]

    def _worths(self, chances: Sequence[float]) -> list[float]:
        """Gittins' index by age step, from the chance of a use in each. O(STEPS).

        Backwards: a step takes the steps after it along as long as they are better than itself, so that what is left is
        a list of blocks of falling worth. A block holds the chance of a use in it and its expected space-time.
        """
        worths = [0.0] * STEPS
        blocks: list[tuple[float, float]] = []
        for step in reversed(range(STEPS)):
            chance = chances[step]
            cost = (1.0 - chance / 2) * (self._edges[step + 1] - self._edges[step])
            while blocks and blocks[-1][0] * cost >= chance * blocks[-1][1]:
                then = blocks.pop()
                chance, cost = chance + (1.0 - chance) * then[0], cost + (1.0 - chance) * then[1]
            blocks.append((chance, cost))
            worths[step] = chance / cost
        return worths

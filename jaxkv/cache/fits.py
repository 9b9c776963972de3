"""Running estimates that costs are decided by. Owns no decision and knows no tier."""

from __future__ import annotations

SWEEPS = 8  # of the solver after every measurement; it goes on from where it was


class Fit:
    """y = sum(u * x), u >= 0, by least squares; a measurement counts half after ``memory`` newer ones.

    Coordinate descent on the normal equations with the negative parts cut off (Franc, Hlaváč and Navara 2005). What any
    of several terms may explain goes to the first of them.
    """

    def __init__(self, terms: int, memory: float) -> None:
        self._keep = 0.5 ** (1.0 / memory)
        self._xx = [[0.0] * terms for _ in range(terms)]
        self._xy = [0.0] * terms
        self.terms = [0.0] * terms  # u
        self.count = 0  # measurements

    def __call__(self, *x: float) -> float:
        return sum(u * value for u, value in zip(self.terms, x))

    def add(self, y: float, *x: float) -> None:
        keep, u = self._keep, self.terms
        for i, row in enumerate(self._xx):
            self._xx[i] = [keep * old + x[i] * value for old, value in zip(row, x)]
            self._xy[i] = keep * self._xy[i] + x[i] * y
        for _ in range(SWEEPS):
            for i, row in enumerate(self._xx):
                if row[i] > 0.0:
                    u[i] = max(0.0, u[i] + (self._xy[i] - sum(a * b for a, b in zip(row, u))) / row[i])
        self.count += 1


class Fates:
    """What became of pages in the host tier. As many fates count as it has held twice over."""

    def __init__(self) -> None:
        self._used = self._lost = self._saved = 0.0

    def used(self, pages: int, seconds: float, held: int) -> None:
        """``pages`` of the ``held`` ones were asked for; to compute them takes ``seconds``."""
        self._fade(pages, held)
        self._used += pages
        self._saved += seconds

    def lost(self, pages: int, held: int) -> None:
        """``pages`` of the ``held`` ones were dropped."""
        self._fade(pages, held)
        self._lost += pages

    def share_used(self, held: int) -> float:
        """Share of the pages that are asked for again; of the ``held`` ones, whose fate is open, half."""
        return (self._used + 0.5 * (held + 1)) / (self._used + self._lost + held + 1)

    def saved(self, otherwise: float) -> float:
        """Seconds that a page takes to compute when it is asked for; ``otherwise``: until one was."""
        return self._saved / self._used if self._used else otherwise

    def _fade(self, pages: int, held: int) -> None:
        keep = 1.0 - pages / (2 * max(held, pages))
        self._used, self._lost, self._saved = self._used * keep, self._lost * keep, self._saved * keep

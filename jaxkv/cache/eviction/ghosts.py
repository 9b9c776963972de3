"""Digests of nodes that left, for policies that learn from what comes back."""

from __future__ import annotations


class Ghosts:
    """Digests in the order they left, oldest first, with their pages."""

    def __init__(self) -> None:
        self.pages = 0
        self._sizes: dict[bytes, int] = {}

    def __contains__(self, key: bytes) -> bool:
        return key in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def put(self, key: bytes, pages: int) -> None:
        self.pages += pages
        self._sizes[key] = pages

    def pop(self, key: bytes) -> None:
        self.pages -= self._sizes.pop(key)

    def pop_oldest(self) -> None:
        self.pop(next(iter(self._sizes)))

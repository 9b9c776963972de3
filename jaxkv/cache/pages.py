"""Page numbers of one KV group in one tier: which are free, and which trie pages of a window group are in use.

Owns numbers only, no contents and no policy. Everything is deterministic: pages are handed out lowest first at the
start and last freed first later, idle pages are listed in the order of their release.

A page is free, private to one sequence, or owned by the trie. For full-attention groups the references of a trie page
are those of its node (``Node.refs``), so no page is counted. A window group lets go of pages one by one while the path
stays pinned, so ``WindowPool`` counts the running sequences per page.
"""

from __future__ import annotations

from typing import Any


class PagePool:
    """Free list over pages 0..capacity-1."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._free = list(range(capacity - 1, -1, -1))

    @property
    def free(self) -> int:
        """Pages nobody holds."""
        return len(self._free)

    @property
    def used(self) -> int:
        return self.capacity - len(self._free)

    def take(self) -> int:
        """A free page. IndexError if there is none: callers make room first."""
        return self._free.pop()

    def take_many(self, count: int) -> list[int]:
        """``count`` free pages in the order ``take`` would give them."""
        if count <= 0:
            return []
        pages = self._free[: -count - 1 : -1]
        assert len(pages) == count, f"{count} pages asked for, {len(pages)} free"
        del self._free[-count:]
        return pages

    def give(self, page: int) -> None:
        self._free.append(page)

    def free_pages(self) -> list[int]:
        """A copy of the free list, for integrity checks."""
        return list(self._free)


class WindowPool(PagePool):
    """Pool of a window group: counts how many running sequences see each page that the trie owns.

    A trie page that nobody sees is *idle*: still good for a later hit, but the first to go, oldest release first.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.users = [0] * capacity
        self.owner: dict[int, Any] = {}  # trie page -> its node
        self.idle: dict[int, None] = {}  # trie pages without users, oldest release first

    def adopt(self, page: int, node: Any, users: int) -> None:
        """The trie takes a page over; ``users`` running sequences see it."""
        self.owner[page] = node
        self.users[page] = users
        if not users:
            self.idle[page] = None

    def disown(self, page: int) -> None:
        """The page leaves the trie; the caller frees it or keeps it private."""
        del self.owner[page]
        self.users[page] = 0
        self.idle.pop(page, None)

    def share(self, page: int) -> None:
        """One more running sequence sees the page."""
        if not self.users[page]:
            del self.idle[page]
        self.users[page] += 1

    def unshare(self, page: int) -> None:
        """One running sequence less sees the page."""
        self.users[page] -= 1
        if not self.users[page]:
            self.idle[page] = None

    def oldest_idle(self) -> int:
        """The idle page that was released first."""
        return next(iter(self.idle))

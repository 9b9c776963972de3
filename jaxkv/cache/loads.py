"""Pages on their way to HBM while steps go on: which loads there are, what is fetched next, what an arrival means.

Owns the loads and the order of their fetches: first begun, first fetched, at most ``IN_FLIGHT`` fetches of
``fetch_pages`` pages at once, which is the double buffer that bounds the staging memory. Decides neither who loads nor
what. A load's nodes are HBM nodes whose pages are reserved and hold nothing yet (``Node.load``): nobody reads, copies
or evicts them. A load pins its path until all has arrived and nobody waits for it any more, so that what came for a
sequence is still there when the sequence enters; it goes on if nobody waits, as its pages are reserved anyway.

A load that fails takes its nodes out of the tree, and whoever waited computes them instead.
"""

from __future__ import annotations

from collections import Counter, deque

from jaxkv.cache.store import PageStore
from jaxkv.cache.trie import Node
from jaxkv.types import Arrival, Fetch, PageKey, PageMove, Tier

IN_FLIGHT = 2  # fetches
TOO_SLOW = 2.0  # times what computing takes, for the rest of a load to be given up


class Load:
    """What one sequence brings. Moves from DISK index ``keys``."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.moves: list[PageMove] = []
        self.keys: list[PageKey] = []
        self.end: Node | None = None  # its path is pinned
        self.shared: list[tuple[int, int]] = []  # (window group, page) kept from being reclaimed
        self.pending: list[list[PageMove]] = []  # moves of each fetch that has not arrived
        self.users = 0  # sequences that wait for it, or have not entered yet
        self.failed = False

    @property
    def done(self) -> bool:
        """Every page is in place."""
        return not self.pending

    @property
    def host_pages(self) -> list[tuple[int, int]]:
        """(group, page) of the host pages that are kept until they have arrived."""
        return [(move.group, move.src[1]) for moves in self.pending for move in moves if move.last]


class Loader:
    """Turns loads into fetches and arrivals into landings."""

    def __init__(self, store: PageStore, fetch_pages: int) -> None:
        self._store = store
        self._fetch_pages = fetch_pages
        self._queue: deque[tuple[Load, list[PageMove], list[PageKey]]] = deque()
        self._flying: dict[int, tuple[Load, list[PageMove]]] = {}
        self._landings: list[tuple[int, bool]] = []
        self._next = 0
        self.loads: list[Load] = []  # those that have not ended

    @property
    def busy(self) -> bool:
        return bool(self._queue or self._flying)

    def begin(self, load: Load, end: Node) -> None:
        """``load`` keeps the path to ``end``, which is pinned for it, and ``shared``, which are shared for it."""
        load.end = end
        self.loads.append(load)

    def fetch(self, load: Load) -> None:
        """Queue what ``load`` has collected."""
        from_host = [move for move in load.moves if move.src[0] is Tier.HOST]
        from_disk = [move for move in load.moves if move.src[0] is Tier.DISK]
        size = self._fetch_pages
        for at in range(0, len(from_host), size):
            self._queue.append((load, from_host[at:at + size], []))
        size = max(1, size // len(self._store.hbm))
        for at in range(0, len(load.keys), size):
            self._queue.append((load, [PageMove(m.group, (Tier.DISK, m.src[1] - at), m.dst) for m in from_disk
                                       if at <= m.src[1] < at + size], load.keys[at:at + size]))
        load.pending = [moves for queued, moves, _ in self._queue if queued is load]

    def take(self) -> tuple[tuple[tuple[int, bool], ...], tuple[Fetch, ...]]:
        """Landings and fetches of the plan that ends now."""
        fetches = []
        while self._queue and len(self._flying) < IN_FLIGHT:
            load, moves, keys = self._queue.popleft()
            self._flying[self._next] = load, moves
            fetches.append(Fetch(self._next, tuple(moves), tuple(keys)))
            self._next += 1
        landings, self._landings = tuple(self._landings), []
        return landings, tuple(fetches)

    def arrived(self, arrival: Arrival) -> bool:
        """Learn how a fetch ended. False: loads have failed, and whoever waits for one leaves before ``bury``."""
        load, moves = self._flying.pop(arrival.fetch_id)
        if arrival.ok:
            self._store.costs.fetched(moves[0].src[0], len(moves) // len(self._store.hbm), arrival.seconds)
        wanted = arrival.ok and not load.failed
        self._landings.append((arrival.fetch_id, wanted))
        if load.failed:
            return True
        if not wanted:
            self._store.stats.failed_loads += 1
            self._fail(load)
            return False
        for move in moves:
            if move.last:
                self._store.host[move.group].give(move.src[1])
        load.pending.remove(moves)
        if load.done:
            for node in load.nodes:
                node.load = None
            if not load.users:
                self._end(load)
        slow = [late for late in self.loads if not late.failed and self._too_slow(late)]
        for late in slow:
            if not late.failed:
                self._give_up(late)
        return not slow

    def _too_slow(self, load: Load) -> bool:
        """Whether what is to come of a load takes far longer than to compute it: the link has become slower."""
        costs, left = self._store.costs, Counter[Tier]()
        for moves in load.pending:
            left[moves[0].src[0]] += len(moves) // len(self._store.hbm)
        end, tokens = (load.nodes[-1].end, left.total() * self._store.page_size) if left else (0, 0)
        return costs.measured and costs.fetch_seconds(left) > TOO_SLOW * costs.prefill_seconds(end - tokens, end)

    def under_way(self, tier: Tier) -> bool:
        """Whether pages of ``tier`` are on their way or will be."""
        return any(moves[0].src[0] is tier for load in self.loads for moves in load.pending)

    def join(self, load: Load) -> None:
        """One more sequence waits for the load."""
        load.users += 1

    def leave(self, load: Load) -> None:
        """One sequence less waits for the load, or has not entered."""
        load.users -= 1
        if load.done and not load.failed and not load.users:
            self._end(load)

    def fail_host(self) -> None:
        """Every load that brings or keeps something of the host tier fails."""
        for load in list(self.loads):
            if not load.failed and (load.host_pages or (load.end and load.end.tier is Tier.HOST)):
                self._fail(load)

    def clear(self) -> None:
        """Forget every fetch; there are no loads any more."""
        assert not self.loads and not self._queue
        self._flying.clear()
        self._landings.clear()

    def cancel(self) -> bool:
        """Give up the load that was begun last of those under way; False if there is none. Its pages are free after
        ``bury``, its KV is lost unless the disk has it."""
        load = next((load for load in reversed(self.loads) if not load.done), None)
        if load is None:
            return False
        self._give_up(load)
        return True

    def _give_up(self, load: Load) -> None:
        self._store.stats.cancelled_loads += 1
        self._fail(load)

    def _fail(self, load: Load) -> None:
        """Mark ``load``, and every load that keeps or brings something below its nodes; their fetches will not land."""
        load.failed = True
        below = list(load.nodes)
        for node in below:
            below.extend(node.children.values())
        doomed = set(map(id, below))
        for other in self.loads:
            if not other.failed and id(other.end) in doomed:
                self._fail(other)
        for g, page in load.host_pages:
            self._store.free_host(g, page)
        load.pending = []
        self._queue = deque(item for item in self._queue if item[0] is not load)

    def bury(self) -> None:
        """Drop the nodes of failed loads, for which nobody waits any more, and everything below them."""
        failed = [load for load in self.loads if load.failed]
        nodes = [node for load in failed for node in load.nodes]
        below = set(map(id, nodes))
        for node in nodes:
            node.load = None
        for load in failed:
            self._end(load)
        for node in nodes:
            while node.parent is not None and id(node.parent) in below:
                node = node.parent
            if node.parent is not None:
                self._store.discard(node)

    def _end(self, load: Load) -> None:
        """Let go of what the load kept."""
        self.loads.remove(load)
        for g, page in load.shared:
            self._store.window_pool(g).unshare(page)
        self._store.unpin(load.end)

"""The clairvoyant optimum (Belady, IBM Systems Journal 1966) on a prefix tree: what no policy can beat.

A block is used whenever one below it is, so its next use is never later: evicting the farthest next use, deepest first
among equals, takes leaves only. What the current request reads or writes stays until its end, misses are inserted.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush

from bench.replay_trace import Line


def next_uses(lines: Sequence[Line]) -> list[list[int]]:
    """[request][block] index of the next request that reads the block; len(lines): none."""
    later: dict[int, int] = {}
    uses: list[list[int]] = []
    for i in range(len(lines) - 1, -1, -1):
        blocks = lines[i].blocks
        uses.append([later.get(block, len(lines)) for block in blocks])
        later.update(dict.fromkeys(blocks, i))
    uses.reverse()
    return uses


def optimum(lines: Sequence[Line], capacity: int) -> list[int]:
    """Blocks that each request finds in a cache of ``capacity`` blocks."""
    heap: list[tuple[int, int, int]] = []  # -next use, -depth, block; outdated items are skipped
    held: dict[int, int] = {}  # block -> its next use
    hits = []
    for line, uses in zip(lines, next_uses(lines), strict=True):
        blocks = line.blocks[:capacity]
        found = next((n for n, block in enumerate(blocks) if block not in held), len(blocks))
        hits.append(found)
        excess = len(held) + len(blocks) - found - capacity
        kept = dict.fromkeys(blocks[:found])
        while excess > 0:
            use, _, block = heappop(heap)
            if block not in kept and held.get(block) == -use:
                del held[block]
                excess -= 1
        for depth, (block, use) in enumerate(zip(blocks, uses)):
            held[block] = use
            heappush(heap, (-use, -depth, block))
        if len(heap) > 4 * capacity + 1024:
            heap = sorted(item for item in heap if held.get(item[2]) == -item[0])
    return hits

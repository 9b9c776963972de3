"""Cold pages leave ahead of need, and nothing goes out and comes in again for nothing."""

from cache_harness import Harness

from jaxkv.cache.tiering import OFFLOAD_PAGES, WINDOW
from jaxkv.types import Tier


def filled(pages: int = 64, host: int = 64) -> Harness:
    h = Harness(pages=pages, host=host)
    for base in range(0, 1000, 100):
        h.serve(range(base, base + 40))
        if h.cache.store.hbm[0].free < 12:
            return h
    raise AssertionError("the pool did not fill")


def test_the_watermark_is_kept_a_few_pages_at_a_time():
    h = filled()
    h.cache._watermark = 30
    moved = []
    for _ in range(WINDOW + 4):
        plan = h.end_plan()
        moved.append(len(plan.moves))
        assert all(m.src[0] is Tier.HBM and m.dst[0] is Tier.HOST for m in plan.moves)
        h.check()
    assert max(moved) <= OFFLOAD_PAGES and h.cache.store.hbm[0].free >= 30
    assert h.cache.stats.offloads == sum(moved) == h.cache.stats.demotions > 0 == h.cache.stats.evictions


def test_what_came_back_rests():
    h = filled()
    h.cache._watermark = 30
    while h.cache.store.hbm[0].free < 30:
        h.end_plan()
    cold = next(node for node in h.cache.trie.nodes() if node.tier is Tier.HOST)
    first = cold.parent.parent is None and cold or cold.parent
    base = int.from_bytes(first.data[:4], "little")
    h.serve(range(base, base + 40))  # brings it back
    back = h.cache.store.plan
    assert h.cache.stats.promotions > 0
    while h.cache.store.plan < back + WINDOW // 2:
        for m in h.end_plan().moves:
            node = next(n for n in h.cache.trie.nodes() if n.tier is Tier.HOST and m.dst[1] in n.pages[0])
            assert node.moved - back < 0 or not node.data.startswith(first.data[:4]), "out again within the window"


def test_what_a_waiting_sequence_keeps_stays():
    h = filled()
    node = max((n for n in h.cache.trie.nodes() if n.tier is Tier.HBM), key=lambda n: n.end)
    base = int.from_bytes(h.cache.trie.root("").order[0][:4], "little")
    waiting = h.new(range(base, base + 41))
    assert h.cache.keep(waiting, h.plan_id)
    h.cache._watermark = 64
    for _ in range(2 * WINDOW):
        h.end_plan()
    kept = [n for n in h.cache.trie.nodes() if n.tier is Tier.HBM]
    assert kept and all(n.refs for n in kept) and node is not None, "everything else left"
    h.cache.leave(waiting)
    for _ in range(2 * WINDOW):
        h.end_plan()
    assert not [n for n in h.cache.trie.nodes() if n.tier is Tier.HBM and n.refs]

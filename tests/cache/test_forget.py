"""What the tree forgets of KV that is wrong or gone."""

from cache_harness import Harness

from jaxkv.cache.forget import drop_host, drop_wrong
from jaxkv.types import Tier

A = list(range(3, 40))


def names(h: Harness, tokens: list[int]) -> list[bytes]:
    return h.cache.trie.page_names("", tokens)


def test_wrong_pages_and_all_below_them_are_dropped_and_named():
    h = Harness()
    one, *_ = h.serve(A[:12])
    h.serve([*A[:12], *[1] * 8])  # goes on from them
    other, *_ = h.serve([2] * 8)
    gone = drop_wrong(h.cache.store, one)
    h.check()
    assert {*names(h, one.tokens), *names(h, [*A[:12], *[1] * 8])} <= set(gone)
    assert not set(names(h, other.tokens)) & set(gone)
    h.known[""] = {tokens: plan for tokens, plan in h.known[""].items() if tokens[0] == 2}
    assert h.serve(A[:12])[1] == 0 and h.serve([2] * 8)[1] == 7


def test_what_a_running_sequence_uses_stays():
    h = Harness()
    one, *_ = h.serve(A[:12])
    user = h.new(A[:9])
    assert h.acquire(user) == 8
    gone = drop_wrong(h.cache.store, one)
    h.check()
    assert set(names(h, A[:12])) - set(gone) == set(names(h, A[:8])), "the third page nobody uses"


def test_a_lost_host_tier_leaves_what_the_device_has():
    h = Harness(pages=10, host=10)
    h.serve(A[:32])
    h.serve([1] * 20)
    moved, kept = h.cache.usage()[Tier.HOST][0], h.cache.usage()[Tier.HBM][0]
    assert moved > 0
    drop_host(h.cache.store)
    h.check()
    assert h.cache.usage() == {Tier.HBM: (kept,), Tier.HOST: (0,)}
    assert h.serve([1] * 20)[1] == 19

"""What a request says about its KV reaches the policies, on the simulated device."""

import pytest
from cache_harness import Harness

from jaxkv.cache.controller import CacheController
from jaxkv.cache.trie import encode
from jaxkv.params import SamplingParams
from jaxkv.sequence import Sequence
from jaxkv.types import Kind, Request

A, B, C = (list(range(n, n + 16)) for n in (100, 200, 300))


def serve(h, prompt, ended=True, **hints):
    """A request to its end; tokens matched."""
    seq = h.new(prompt)
    seq.request = Request(seq.request.id, seq.request.prompt, SamplingParams(), 64, **hints)
    matched = h.acquire(seq)
    h.decode(seq, 1)
    h.running.remove(seq)
    h.cache.release(seq, ended=ended)
    h.check()
    h.end_plan()
    return matched


def cached(h, prompt):
    """Tokens that a lookup would match, whole pages; changes nothing."""
    root = h.cache.trie.root("")
    return h.cache.trie.match(root, encode(prompt)).pages * h.page_size


@pytest.mark.parametrize("policy", ["lfu", "lru"])
@pytest.mark.parametrize("host", [0, 64])
def test_an_ended_session_leaves_first(policy, host):
    h = Harness(pages=8, host=host, policy=policy)
    serve(h, A, session_id="old")
    serve(h, B, session_id="gone", end_session=True)
    serve(h, C[:8])
    assert cached(h, A) == 16 and cached(h, B) < 16
    assert h.cache.stats.demotions == 0, "what is over is dropped, not moved"


def test_what_others_use_stays():
    h = Harness(pages=6)
    serve(h, A[:8], session_id="other")
    serve(h, A[:8] + B[:8], session_id="gone", end_session=True)
    serve(h, C)
    assert cached(h, A[:8]) == 8 and cached(h, A[:8] + B[:8]) == 8


def test_a_preempted_request_has_not_ended():
    h = Harness(pages=8, policy="lru")
    serve(h, A, ended=False, session_id="s", end_session=True)
    serve(h, B)
    serve(h, C[:8])
    assert cached(h, A) < 16 and cached(h, B) == 16


def test_who_comes_back_takes_the_end_back():
    h = Harness(pages=8, policy="lru")
    serve(h, A, session_id="s", end_session=True)
    serve(h, B)
    serve(h, A, session_id="s")
    serve(h, C[:8])
    assert cached(h, A) == 16 and cached(h, B) == 8, "plain recency again"


def test_retention_holds_for_its_time():
    for passed, kept in ((5.0, True), (15.0, False)):
        h = Harness(pages=8, policy="lru")
        h.cache.tick(100.0)
        serve(h, A, retention=10.0)
        h.cache.tick(100.0 + passed)
        serve(h, B)
        serve(h, C[:8])
        assert (cached(h, A) == 16) is kept


def test_retention_blocks_nobody():
    h = Harness(pages=8)
    serve(h, A, retention=1e9)
    serve(h, B + C[:12])
    assert h.cache.stats.evictions > 0


def test_no_store_reads_and_leaves_nothing():
    h = Harness()
    serve(h, A)
    before = {node.key for node in h.cache.trie.nodes()}
    assert serve(h, A + B, no_store=True) == 16
    assert before == {node.key for node in h.cache.trie.nodes()}
    assert serve(h, C, no_store=True) == 0 and cached(h, C) == 0


def test_answers_may_count_less():
    h = Harness(pages=64)
    h.cache.store.answer_worth = -2
    serve(h, A[:4])
    seq = h.new(B[:4])
    h.run(seq, 9)
    h.release(seq)
    policy = h.cache.store.policies[0]
    worths = {node.kind: policy._entries[node.key].worth for node in h.cache.trie.nodes()}
    assert worths == {Kind.PROMPT: 0, Kind.ANSWER: -2}


def test_priority_is_the_worth_of_a_use():
    h = Harness()
    serve(h, A, priority=-1)
    serve(h, B, priority=9)
    policy = h.cache.store.policies[0]
    assert sorted(policy._entries[node.key].worth for node in h.cache.trie.nodes() if node.kind is Kind.PROMPT) == [-4, 1]


def test_sequences_need_no_hints():
    cache = CacheController(Harness().cache.groups, 4, (8,), (0,))
    seq = Sequence(Request("r", (1, 2, 3), SamplingParams(), 1), [1, 2, 3])
    assert cache.acquire(seq, 0) == 0
    cache.release(seq)
    cache.check([])

"""Every mechanism on purpose, on the simulated device: it happened, and nobody read anything wrong."""

import pytest
from cache_harness import Harness, full, window

from jaxkv.cache.publish import RUN_PAGES
from jaxkv.types import Kind, PageMove, Tier

A = list(range(100, 140))  # distinct tokens


def nodes(h, namespace=""):
    """(tokens, kind, tier) of every node, in order of position."""
    return sorted((node.end - node.start, node.kind.name, node.tier.name) for node in h.cache.trie.nodes())


def kinds(h):
    return {kind for _, kind, _ in nodes(h)}


# ---- sharing


def test_the_second_time_only_one_token_is_computed():
    h = Harness()
    h.serve(A)
    _, matched, computed = h.serve(A)
    assert (matched, computed) == (39, 1)
    assert h.cache.stats.partial_copies == 1, "39 of 40 tokens end inside a page"


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("prompt", [A[:16], A[:18], A[:1]])
def test_children_compute_the_prompt_once(prompt, lag):
    h = Harness(lag=lag)
    first = h.new(prompt, child=0)
    h.run(first, 1)
    children = [h.new(prompt, child=i) for i in range(1, 4)]
    for child in children:  # while child 0 still runs
        assert h.acquire(child) == len(prompt) - 1
        h.chunk(child, 1)
    h.chunk(first, 1)
    h.end_plan()
    for _ in range(9):
        for seq in [first, *children]:
            h.chunk(seq, 1)
        h.end_plan()
    assert [h.sim.computed[s.request.id] for s in [first, *children]] == [len(prompt) + 10, 11 - 1, 10, 10]
    for seq in [first, *children]:
        h.release(seq)


@pytest.mark.parametrize("host", [0, 200])
def test_a_turn_computes_only_what_is_new(host):
    h = Harness(host=host, pages=(24,) if host else (64,))
    tokens = A[:7]
    for turn in range(6):
        if host:
            h.serve([turn] * 90)  # pushes everything else out
        known = len(tokens) - 1 if turn else 0
        seq, matched, computed = h.serve([*tokens, 1, 2, 3] if turn else tokens, tokens=5)
        new = len(seq.request.prompt) - known
        assert matched == known and computed == new + 4
        tokens = list(seq.tokens)
    assert not host or h.cache.stats.promotions and not h.cache.stats.evictions


def test_children_of_a_prompt_share_pages_in_the_plan_that_computes_them():
    h = Harness()
    one, two = h.new(A[:18]), h.new(A[:18])
    h.acquire(one)
    h.chunk(one, 18)
    assert h.acquire(two) == 16, "whole pages of this very plan are shared, its last page is not copied"
    h.chunk(two, 2)
    h.end_plan()
    three = h.new(A[:18])
    assert h.acquire(three) == 17
    assert h.cache.stats.partial_copies == 1


def test_namespaces_share_nothing():
    h = Harness()
    h.serve(A, namespace="a")
    assert h.serve(A, namespace="b")[1] == 0 and h.serve(A, namespace="a")[1] == 39


def test_an_empty_namespace_is_forgotten():
    h = Harness(pages=4)
    for i in range(20):
        h.serve(A[:8], namespace=str(i))
    assert len(h.cache.trie.roots) <= 3


def test_prefix_caching_off():
    h = Harness(caching=False)
    for _ in range(2):
        assert h.serve(A)[1:] == (0, 40)
    assert not list(h.cache.trie.nodes()) and h.cache.usage()[Tier.HBM] == (0,)


def test_prompt_logprobs_compute_all_but_publish():
    h = Harness()
    h.serve(A[:18])
    seq = h.new(A[:18], prompt_logprobs=1)
    assert h.acquire(seq) == 0
    h.chunk(seq, 18)
    h.end_plan()
    h.decode(seq, 3)
    assert h.cache.stats.swaps == 4, "the pages computed again are given back"
    assert h.cache.usage()[Tier.HBM] == (4 + 2,), "what is shared and its own tail, which superseded the old leaf"
    h.release(seq)


# ---- the tree


def test_split_where_prompts_part():
    h = Harness()
    h.serve(A[:16])
    _, matched, _ = h.serve(A[:8] + [1, 2, 3, 4])
    assert matched == 8 and h.cache.stats.splits == 1
    h.serve(A[:10] + [1, 2])
    assert h.cache.stats.partial_copies == 1 and h.cache.stats.hit_tokens == 8 + 10


def test_copy_from_the_middle_of_a_run():
    h = Harness()
    h.serve(A[:16])
    seq = h.new(A[:6] + [1, 2, 3])
    assert h.run(seq) == 6
    assert h.sim.num_moves["copy hbm"] == 1 and h.cache.stats.splits == 1


def test_answers_become_prompt_when_a_prompt_matches_them():
    h = Harness()
    seq, _, _ = h.serve(A[:8], tokens=13)
    assert nodes(h) == [(8, "PROMPT", "HBM"), (12, "ANSWER", "HBM")]
    h.serve(seq.tokens[:17])
    assert h.cache.stats.claims == 1
    assert (8, "PROMPT", "HBM") in nodes(h) and (4, "ANSWER", "HBM") in nodes(h), "only the matched part changes"


def test_a_page_with_prompt_and_answer_is_an_answer():
    h = Harness()
    h.serve(A[:6], tokens=5)
    assert nodes(h) == [(2, "ANSWER", "HBM"), (4, "ANSWER", "HBM"), (4, "PROMPT", "HBM")]


def test_coming_back_leaves_ones_own_answer_an_answer():
    h = Harness()
    seq = h.new(A[:8])
    h.run(seq, 12)
    h.release(seq)
    assert h.acquire(seq) == 19 and kinds(h) == {"PROMPT", "ANSWER"} and not h.cache.stats.claims


def test_a_longer_leaf_supersedes():
    h = Harness()
    h.serve(A[:6])
    assert nodes(h) == [(2, "PROMPT", "HBM"), (4, "PROMPT", "HBM")]
    h.serve(A[:7])
    assert nodes(h) == [(3, "PROMPT", "HBM"), (4, "PROMPT", "HBM")]
    h.serve(A[:8])
    assert nodes(h) == [(4, "PROMPT", "HBM"), (4, "PROMPT", "HBM")]
    assert h.cache.stats.supersedes == 2 and h.cache.usage()[Tier.HBM] == (2,)


def test_a_leaf_that_is_being_written_stays():
    h = Harness()
    writer = h.new(A[:6])
    h.run(writer, 1)
    h.serve(A[:7])
    assert (2, "PROMPT", "HBM") in nodes(h) and (3, "PROMPT", "HBM") in nodes(h)
    h.decode(writer, 6)
    h.release(writer)
    assert not h.cache.stats.supersedes


def test_pages_computed_twice_are_swapped_once_their_plan_is_over():
    h = Harness()
    one, two = h.new(A), h.new(A)
    for seq in (one, two):
        h.acquire(seq)
        h.chunk(seq, 2)
    h.end_plan()
    for _ in range(3):
        for seq in (one, two):
            h.chunk(seq, 6)
        h.end_plan()
    assert one.pages[0][:3] == two.pages[0][:3] and one.pages[0][3] != two.pages[0][3]
    assert (one.num_published, two.num_published, h.cache.stats.swaps) == (20, 12, 3), "the rest may not be written yet"
    h.release(one)
    h.release(two)
    assert h.cache.usage()[Tier.HBM] == (5,) and h.cache.stats.swaps == 5


def test_answers_extend_their_node_up_to_a_limit():
    h = Harness(page_size=1, pages=2 * RUN_PAGES + 20)
    h.serve([1], tokens=2 * RUN_PAGES + 2)
    assert sorted(n for n, kind, _ in nodes(h) if kind == "ANSWER") == [1, RUN_PAGES, RUN_PAGES]


# ---- tiers


def test_demotion_takes_tails_first_and_only_what_is_needed():
    h = Harness(pages=10, host=10)
    h.serve(A[:32])
    h.serve([1] * 12)
    assert h.cache.stats.demotions == 1 and (4, "PROMPT", "HOST") in nodes(h) and (28, "PROMPT", "HBM") in nodes(h)
    h.serve([2] * 8)
    assert h.cache.stats.demotions == 3 and not h.cache.stats.evictions


def test_promotion_is_exclusive():
    h = Harness(pages=8, host=8)
    h.serve(A[:32])
    h.serve([1] * 28)
    assert h.cache.usage()[Tier.HOST] == (7,)
    assert h.serve(A[:30])[1] == 29
    assert h.sim.num_moves["promote"] == 6 and h.sim.num_moves["copy host"] == 1
    assert h.cache.stats.host_hit_tokens == 25


def test_copy_from_the_host_leaves_the_host_page():
    h = Harness(pages=8, host=8)
    h.serve(A[:31])
    h.serve([1] * 32)
    assert h.cache.usage()[Tier.HOST] == (8,)
    seq = h.new(A[:2] + [5])
    h.acquire(seq)
    h.chunk(seq, 1)
    plan = h.end_plan()
    assert PageMove(0, (Tier.HOST, plan.moves[-1].src[1]), (Tier.HBM, seq.pages[0][0])) == plan.moves[-1]
    assert h.cache.stats.promotions == 0 and h.cache.stats.host_hit_tokens == 2


def test_no_host_tier_drops():
    h = Harness(pages=8)
    h.serve(A[:32])
    h.serve([1] * 20)
    assert h.cache.stats.evictions == 5 and not h.cache.stats.demotions and h.serve(A[:32])[1] == 12


def test_full_host_tier_drops_its_leaves():
    h = Harness(pages=8, host=3)
    h.serve(A[:32])
    h.serve([1] * 32)
    h.serve([2] * 32)
    assert h.cache.stats.evictions == 13 and h.sim.num_moves["drop"] > 0
    assert h.cache.usage() == {Tier.HBM: (8,), Tier.HOST: (3,)}


def test_a_page_number_of_the_host_is_used_again_in_the_same_plan():
    h = Harness(pages=4, host=1)
    h.serve(A[:16])
    seq = h.new([1] * 16)
    h.acquire(seq)
    h.chunk(seq, 16)
    moves = h.end_plan().moves
    assert [m.dst for m in moves].count(None) >= 1 and [m.dst for m in moves if m.dst] == [(Tier.HOST, 0)] * (
        len(moves) - [m.dst for m in moves].count(None))


def test_a_host_node_computed_again_takes_the_new_pages():
    h = Harness(pages=8, host=8)
    h.serve(A[:16])
    h.serve([1] * 32)
    seq = h.new(A[:16], prompt_logprobs=1)
    h.acquire(seq)
    h.chunk(seq, 16)
    assert seq.num_published == 16, "no need to wait: the host page is dropped, not read"
    h.end_plan()
    assert h.cache.stats.promotions == 0 and seq.node.tier is Tier.HBM and not h.sim.num_moves["promote"]
    assert h.sim.num_moves["drop"] == 4


def test_a_match_is_cut_to_the_room_there_is():
    h = Harness(pages=8, host=16)
    h.serve(A[:24])
    h.serve([1] * 32)
    other = h.new([2] * 18)
    h.run(other, 1)  # pins 5 of 8 pages
    seq = h.new(A[:24])
    assert h.acquire(seq) == 12, "three pages come back, not six"
    assert not h.cache.grow(seq, 16)
    h.release(seq)
    h.release(other)
    assert h.acquire(seq) == 23


def test_a_sequence_that_fits_alone_gets_everything():
    for policy in ("lfu", "lru", "arc"):
        for host in (0, 2, 32):
            h = Harness(pages=8, host=host, policy=policy)
            for turn in range(4):
                h.serve(A[:31], tokens=2)
                h.serve([turn] * 32)
            assert h.serve(A[:31], tokens=2)[1] in range(0, 31)


def test_preempted_work_comes_back():
    h = Harness(pages=8, host=8)
    seq = h.new(A[:10])
    h.run(seq, 8)
    before = h.sim.computed[seq.request.id]
    h.release(seq)
    h.serve([1] * 32)
    assert h.acquire(seq) == 17
    h.decode(seq, 2)
    assert h.sim.computed[seq.request.id] == before + 2


def test_grow_takes_nothing_when_there_is_no_room():
    h = Harness(pages=4)
    one, two = h.new(A[:12]), h.new([1] * 8)
    h.run(one, 1)
    h.acquire(two)
    assert not h.chunk(two, 8) and h.chunk(two, 4)
    h.end_plan()
    assert h.cache.available(0) == 0


# ---- window groups


def test_window_pages_leave_and_are_found_again():
    h = Harness((full(), window(6)), pages=(32, 32))
    seq, _, _ = h.serve(A[:20], tokens=4)
    assert h.serve(seq.tokens[:20])[1] == 19, "pages out of the window stay while nobody needs them"
    assert h.serve(A[:9])[1] == 8


def test_a_running_sequence_holds_only_its_window():
    h = Harness((full(), window(6)), pages=(32, 4))
    seq = h.new(A[:30])
    h.run(seq, 12, budget=4)
    assert [page for page in seq.pages[1] if page >= 0] == seq.pages[1][seq.first[1]:]
    assert len(seq.pages[1]) - seq.first[1] <= 3 and len(seq.pages[0]) == 11
    assert h.cache.stats.holes > 0, "its own published pages were taken for the next ones"


def test_a_hole_shortens_the_match():
    h = Harness((full(), window(6)), pages=(64, 6))
    h.serve(A[:20])
    h.serve([1] * 16)
    assert h.cache.stats.holes > 0 and not h.cache.stats.evictions
    assert h.serve(A[:20])[1] < 19


def test_holes_are_filled_by_who_computes_them():
    h = Harness((full(), window(6)), pages=(64, 6))
    h.serve(A[:20])
    h.serve([1] * 24)
    holes = [node for node in h.cache.trie.nodes() if min(node.pages[1]) < 0 <= min(node.pages[0])]
    assert holes
    h.serve(A[:20], budget=4)
    assert h.cache.stats.swaps > 0 and h.serve(A[:20])[1] == 19


def test_models_of_window_groups_only_use_the_host():
    h = Harness((window(9),), pages=8, host=16)
    h.serve(A[:24])
    h.serve([1] * 20)
    assert h.cache.stats.demotions > 0
    assert h.serve(A[:24])[1] == 23


@pytest.mark.parametrize("host", [0, 3])
def test_pages_that_a_window_left_do_not_pile_up(host):
    h = Harness((window(3),), pages=4, host=host)
    for turn in range(12):
        h.serve([turn] * 60, budget=4)
    assert h.cache.stats.holes > 0 and sum(len(node) for node in h.cache.trie.nodes()) <= 2 * 15 + host


# ---- integrity


@pytest.mark.parametrize("what", ["refs", "idle", "kind", "order", "page", "digest", "offer"])
def test_check_sees_what_is_broken(what):
    h = Harness()
    seq, _, _ = h.serve(A[:14], tokens=9)
    h.check()
    node = max(h.cache.trie.nodes(), key=len)
    if what == "refs":
        node.refs = 1
    elif what == "idle":
        h.cache.store.idle -= 1
    elif what == "kind":
        h.cache.trie.root("").kind = Kind.ANSWER
    elif what == "order":
        node.order.append(b"")
    elif what == "page":
        h.cache.store.hbm[0].give(node.pages[0][0])
    elif what == "digest":
        node.digests[-1] = b""
    elif what == "offer":
        leaf = next(n for n in h.cache.trie.nodes() if not n.children)
        h.cache.store.policies[Tier.HBM].withdraw(leaf.key)
    with pytest.raises(AssertionError):
        h.check()

"""One contract for all policies; then what is special about each."""

import random
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from jaxkv.cache.eviction import ARC, GDSF, LFU, LRU, POLICIES, DecayedLFU, TwoQueue
from jaxkv.cache.eviction.reuse import STEPS, ReuseModel
from jaxkv.config import EVICTION_POLICIES


def key(i):
    return b"%04d" % i


class PolicyMachine(RuleBasedStateMachine):
    """Two copies of a pair of tiers get the same calls; the model knows pages, offers and hints of every node."""

    make = LRU

    def __init__(self):
        super().__init__()
        self.copies = []
        for _ in range(2):
            top = self.make(10)
            self.copies.append((top, self.make(20, top)))
        self.nodes = ({}, {})  # per tier: key -> digests
        self.gone = []  # digests of nodes that left
        self.offers, self.ended, self.until = set(), set(), {}
        self.names = 0
        self.now = 0.0

    def call(self, tier, name, *args):
        one, two = (getattr(copy[tier], name)(*args) for copy in self.copies)
        return one, two

    def same(self, tier, name, *args):
        one, two = self.call(tier, name, *args)
        assert one == two, "not deterministic"
        return one

    @invariant()
    def check(self):
        for tier, nodes in enumerate(self.nodes):
            policy = self.copies[0][tier]
            offers = self.offers & nodes.keys()
            assert policy.sizes() == {name: len(digests) for name, digests in nodes.items()}
            assert policy.offered() == {name: len(nodes[name]) for name in offers}
            victim = self.same(tier, "victim")
            assert (victim in offers) if offers else victim is None
            assert victim == self.same(tier, "victim"), "victim changes something"
            if victim is not None:
                assert 1 <= self.same(tier, "tail", victim) <= len(nodes[victim])
                assert victim in self.ended or not offers & self.ended, "what has ended leaves first"
                kept = {name for name in offers - self.ended if self.until.get(name, 0.0) > self.now}
                assert victim not in kept or offers == kept, "what is retained leaves last"

    def some(self, data):
        """A tier and a node in it."""
        tier, name = data.draw(st.sampled_from(sorted((t, name) for t in (0, 1) for name in self.nodes[t])))
        return tier, name, self.nodes[tier][name]

    def any(self):
        return bool(self.nodes[0] or self.nodes[1])

    def forget(self, name):
        self.offers.discard(name)
        self.ended.discard(name)
        self.until.pop(name, None)

    def fresh(self, count):
        self.names += count
        return [key(self.names - count + i) for i in range(count)]

    @rule(data=st.data(), count=st.integers(1, 5), worth=st.integers(-2, 2))
    def add(self, data, count, worth):
        digests = self.fresh(count)
        if self.gone and data.draw(st.booleans()):  # what has been here before, or begins like it
            old = self.gone.pop(data.draw(st.integers(0, len(self.gone) - 1)))
            if not any(set(old) & set(node) for nodes in self.nodes for node in nodes.values()):
                digests = old[:data.draw(st.integers(1, len(old)))] + digests
        self.same(0, "add", digests[0], digests, data.draw(st.integers(0, 50)), worth)
        self.nodes[0][digests[0]] = list(digests)

    @precondition(lambda self: self.nodes[0])
    @rule(data=st.data(), count=st.integers(1, 3))
    def extend(self, data, count):
        name, digests = data.draw(st.sampled_from(sorted(self.nodes[0]))), self.fresh(count)
        self.same(0, "extend", name, digests)
        self.nodes[0][name] += digests

    @precondition(any)
    @rule(data=st.data(), what=st.sampled_from(["touch", "rest", "offer", "withdraw", "end", "retain"]))
    def mark(self, data, what):
        tier, name, _ = self.some(data)
        if what == "rest" and name in self.offers:
            return
        args = (self.now + 2.0,) if what == "retain" else (data.draw(st.integers(-2, 2)),) if what == "touch" else ()
        self.same(tier, what, name, *args)
        if what == "offer":
            self.offers.add(name)
        elif what == "withdraw":
            self.offers.discard(name)
        elif what == "end":
            self.ended.add(name)
            self.until.pop(name, None)
        elif what == "touch":
            self.ended.discard(name)
        elif what == "retain":
            self.until[name] = self.now + 2.0

    @rule(seconds=st.sampled_from([0.5, 2.0]))
    def tick(self, seconds):
        self.now += seconds
        for tier in (0, 1):
            self.same(tier, "tick", self.now)

    @precondition(any)
    @rule(data=st.data())
    def split(self, data):
        tier, name, digests = self.some(data)
        if len(digests) < 2:
            return
        count = data.draw(st.integers(1, len(digests) - 1))
        low = digests[-count:]
        self.same(tier, "split", name, low[0], count, 60)
        del digests[-count:]
        self.nodes[tier][low[0]] = low
        if name in self.offers:
            self.offers.remove(name)
            self.offers.add(low[0])
        if name in self.ended:
            self.ended.add(low[0])
        if name in self.until:
            self.until[low[0]] = self.until[name]

    @precondition(any)
    @rule(data=st.data(), evict=st.booleans(), move=st.booleans())
    def remove(self, data, evict, move):
        """A node is dropped, or goes to the other tier."""
        tier, name, digests = self.some(data)
        if evict and (victim := self.same(tier, "victim")):
            name, digests = victim, self.nodes[tier][victim]
        entries = self.call(tier, "remove", name)
        del self.nodes[tier][name]
        if move:
            self.offers.discard(name)
            self.nodes[1 - tier][name] = digests
            for copy, entry in zip(self.copies, entries):
                copy[1 - tier].arrive(name, entry)
        else:
            self.forget(name)
            self.gone.append(digests)

    def teardown(self):
        for policy in self.copies[0]:
            if isinstance(policy, ARC):
                self.arc(policy)
            if isinstance(policy, TwoQueue):
                assert policy._probation == sum(e.pages for e in policy._entries.values() if not e.seen)
            if isinstance(policy, LFU):
                assert len(policy._stream.past) <= policy._stream.limit
                for name, entry in policy._entries.items():
                    assert entry.digests[0] == name and len(entry.digests) == entry.pages
                    starts = [i for i, _ in entry.levels]
                    assert starts[0] == 0 and starts == sorted(set(starts)) and starts[-1] < entry.pages
                    assert entry.sampled == list(enumerate(entry.digests)), "so small a tier follows every page"

    def arc(self, policy):
        ghosts = [ghost.pages for ghost in policy._ghosts]
        assert all(ghost.pages == sum(ghost._sizes.values()) for ghost in policy._ghosts)
        live = [sum(e.pages for e in policy._entries.values() if e.seen is seen) for seen in (False, True)]
        assert policy._pages == live and 0 <= policy._target <= policy.capacity
        assert not ghosts[0] or live[0] + ghosts[0] <= policy.capacity
        assert not ghosts[1] or sum(live) + sum(ghosts) <= 2 * policy.capacity


def test_names():
    assert set(POLICIES) == set(EVICTION_POLICIES)


@pytest.mark.parametrize("name", POLICIES)
def test_contract(name):
    machine = type("Machine", (PolicyMachine,), {"make": POLICIES[name]})
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=40, deadline=None))


def order(policy):
    """Names in the order they would leave."""
    left = []
    while (name := policy.victim()) is not None:
        left.append(int(name))
        policy.remove(name)
    return left


def filled(make, count, capacity=100, **more):
    policy = make(capacity, **more)
    for i in range(count):
        policy.add(key(i), [key(i)], 0)
        policy.rest(key(i))
        policy.offer(key(i))
    return policy


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "2q"])
def test_a_used_node_outlives_the_others(name):
    policy = filled(POLICIES[name], 5)
    policy.touch(key(0))
    policy.touch(key(0))
    assert order(policy)[-1] == 0


@pytest.mark.parametrize("name", POLICIES)
def test_victim_is_cheap_among_many(name):
    policy = filled(POLICIES[name], 2000, capacity=2000)
    for i in range(20000):
        policy.touch(key(i * 7 % 2000))
    lists = [policy._order, *getattr(policy, "_orders", ()), *getattr(policy, "_lists", {}).values()]
    assert sum(len(o._heap) for o in lists) <= 2 * 2000 + 65 * len(lists), "outdated heap items pile up"
    assert len(order(policy)) == 2000


def test_lru_order_is_recency_of_use_or_release():
    policy = filled(LRU, 4)
    policy.touch(key(1))
    policy.withdraw(key(0))
    policy.rest(key(0))
    policy.offer(key(0))
    assert order(policy) == [2, 3, 1, 0]


def test_hints_stand_above_ranks():
    policy = filled(LRU, 4)
    policy.retain(key(0), 5.0)
    policy.end(key(2))
    assert policy.is_over(key(2)) and order(policy) == [2, 1, 3, 0]
    policy = filled(LRU, 3)
    policy.retain(key(0), 5.0)
    policy.end(key(2))
    policy.touch(key(2))
    policy.tick(5.0)
    assert order(policy) == [0, 1, 2], "time and use take hints back"


def test_decayed_counts_halve_after_a_half_life():
    policy = DecayedLFU(100, half_life=0.5)  # 50 pages
    policy.add(key(0), [key(0)], 0)
    for _ in range(3):
        policy.touch(key(0))  # worth 4
    for i in range(1, 100):
        policy.add(key(i), [key(i)], 0)
    entry = policy.remove(key(0))
    assert entry.level == pytest.approx(0.0, abs=0.05)  # two half-lives later worth 1, as a new one is
    entry.level = 3.0
    policy.arrive(key(0), entry)
    assert policy.remove(key(0)).level == pytest.approx(3.0, abs=0.05), "counts travel between tiers"


def test_counts_outlive_eviction():
    policy = filled(DecayedLFU, 2)
    for _ in range(5):
        policy.touch(key(0))
    policy.remove(key(0))
    policy.add(key(0), [key(0)], 0)
    policy.offer(key(0))
    assert order(policy) == [1, 0]


def test_priority_makes_a_use_count_more():
    for make in (DecayedLFU, GDSF, LFU):
        policy = make(10)
        for i, worth in enumerate([1, 0, -1]):
            policy.add(key(i), [key(i)], 0, worth)
            policy.offer(key(i))
        policy.add(key(9), [key(9)], 0)  # time passes
        assert order(policy) == [2, 1, 0], make


def test_gdsf_keeps_what_is_dear_to_recompute():
    policy = GDSF(10)
    for i, depth in enumerate([30000, 100, 60000]):
        policy.add(key(i), [key(i)], depth)
        policy.offer(key(i))
    assert order(policy) == [1, 0, 2]


def test_two_queues_take_what_came_back():
    policy = filled(TwoQueue, 4, capacity=4)
    policy.touch(key(0))
    assert policy.victim() == key(0), "a use while it waits moves nothing"
    policy.remove(key(0))
    policy.add(key(0), [key(0)], 0)
    policy.offer(key(0))
    assert order(policy) == [1, 2, 0, 3], "A1in gives until it holds a quarter"


def test_arc_adapts_to_what_comes_back():
    policy = filled(ARC, 4, capacity=4)
    policy.touch(key(0))  # T2: 0; T1: 1 2 3
    assert policy.victim() == key(1)
    policy.remove(key(1))
    before = policy._target
    policy.add(key(1), [key(1)], 0)  # a hit in B1: T1 was too small, and the node was seen twice
    policy.offer(key(1))
    assert policy._target > before and policy._entries[key(1)].seen
    policy.withdraw(key(0))
    policy.remove(key(0))
    policy.add(key(0), [key(0)], 0)  # a hit in B2
    assert policy._target == before


def test_arc_prefers_the_list_that_exceeds_its_share():
    policy = filled(ARC, 3, capacity=4)
    policy.touch(key(2))
    policy._target = 2.0
    assert policy.victim() == key(2)  # T1 holds 2 <= 2
    policy._target = 1.0
    assert policy.victim() == key(0)
    policy.withdraw(key(2))
    policy._target = 4.0
    assert policy.victim() == key(0), "the other list gives when one has no candidate"


# ---- the default


def requests(policy, paths):
    """Each path is read or written by one request, top first; full tiers give room. Pages found."""
    found = 0
    for path in paths:
        have = [k for k in path if k in policy]
        found += len(have)
        for k in have:
            policy.withdraw(k)
            policy.touch(k)
        while len(policy.sizes()) + len(path) - len(have) > policy.capacity:
            policy.remove(policy.victim())
        for depth, k in enumerate(path):
            if k not in policy:
                policy.add(k, [k], depth)
        for k in reversed(path):
            policy.rest(k)
            policy.offer(k)
    return found


def popular_and_once(count, popular=8):
    """Pages 0..popular - 1 now and then, others never again."""
    return [[key(i * 5 % popular if i % 3 == 0 else 1000 + i)] for i in range(count)]


def test_lfu_learns_what_never_comes_back():
    paths = popular_and_once(3000)
    assert requests(LFU(12), paths) > 2 * requests(LRU(12), paths) + 500


def test_lfu_goes_back_to_recency_when_it_is_better():
    rng = random.Random(0)
    paths = [[key((i // 6 * 3 + rng.randrange(4)) % 9000)] for i in range(4000)]  # each page for a short time only
    assert requests(LFU(8), paths) >= 0.98 * requests(LRU(8), paths)


def test_the_curve_is_what_a_larger_tier_gives():
    rng = random.Random(1)
    paths = [[key(int(rng.paretovariate(0.6)) % 3000)] for _ in range(12000)]
    policy = LFU(200)
    requests(policy, paths[:6000])
    points = policy.curve()
    assert [p.capacity for p in points] == [200, 250, 300, 400, 800]
    assert all(a.hit_rate <= b.hit_rate + 0.01 for a, b in pairwise(points))
    for point in points:
        larger = LFU(point.capacity)
        requests(larger, paths[:3000])
        assert requests(larger, paths[3000:6000]) / 3000 == pytest.approx(point.hit_rate, abs=0.05)


def test_lower_tiers_follow_the_requests_of_the_top():
    top = LFU(8)
    low = LFU(8, top)
    requests(top, popular_and_once(300))
    assert [p.capacity for p in low.curve()][0] == 16
    assert low.curve()[0].hit_rate >= top.curve()[0].hit_rate > 0.1


def test_a_count_speaks_for_its_part_of_the_node():
    policy = LFU(10)
    path = [key(i) for i in range(6)]
    policy.add(path[0], path[:2], 0)
    for _ in range(5):
        policy.touch(path[0])
    policy.remove(path[0])
    policy.add(path[0], path, 0)  # two pages were here before, four are new
    policy.offer(path[0])
    assert policy.victim() == path[0] and policy.tail(path[0]) == 4
    policy.split(path[0], path[2], 4, 2)
    assert policy.victim() == path[2] and policy.tail(path[0]) == 2


def test_a_page_counts_once_in_a_request_during_which_its_node_was_cut():
    policy, path = LFU(8), [key(i) for i in range(4)]
    policy.add(path[0], path, 0)
    policy.touch(path[0])
    policy.split(path[0], path[2], 2, 2)
    policy.touch(path[2])  # deeper than what was read before: the same request
    policy.touch(path[0])
    cohorts = [cohort for step in policy._directory.model._cohorts for cohort in step]
    assert sum(cohort.count for cohort in cohorts) == 4 and min(cohort.count for cohort in cohorts) >= 0


def test_gittins_index_is_the_best_rate():
    model = ReuseModel(100)
    rng = random.Random(2)
    chances = [rng.random() ** 3 for _ in range(STEPS)]
    for start, worth in enumerate(model._worths(chances)):
        left, cost, best = 1.0, 0.0, 0.0
        for chance, low, high in list(zip(chances, model._edges, model._edges[1:]))[start:]:
            cost += left * (1 - chance / 2) * (high - low)
            left *= 1 - chance
            best = max(best, (1 - left) / cost)
        assert worth == pytest.approx(best)

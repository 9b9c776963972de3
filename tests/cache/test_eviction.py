"""One contract for all policies; then what is special about each."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from jaxkv.cache.eviction import ARC, LFU, LRU, POLICIES
from jaxkv.config import EVICTION_POLICIES


def key(i):
    return b"%04d" % i


class PolicyMachine(RuleBasedStateMachine):
    """Two copies get the same calls; the model knows sizes and offers."""

    make = LRU

    def __init__(self):
        super().__init__()
        self.policies = [self.make(10), self.make(10)]
        self.sizes, self.offers, self.names = {}, set(), 0

    def call(self, name, *args):
        one, two = (getattr(policy, name)(*args) for policy in self.policies)
        assert one == two, "not deterministic"
        return one

    def check(self):
        policy = self.policies[0]
        assert policy.sizes() == self.sizes and set(policy.offered()) == self.offers
        victim = self.call("victim")
        assert (victim in self.offers) if self.offers else victim is None
        assert victim == self.call("victim"), "victim changes something"

    def some(self, data, of=None):
        return data.draw(st.sampled_from(sorted(self.sizes if of is None else of)))

    @rule(data=st.data(), pages=st.integers(1, 5), heat=st.sampled_from([None, -1.0, 0.0, 2.5]))
    def add(self, data, pages, heat):
        name = key(self.names)
        if self.names and data.draw(st.booleans()):  # one that may have been here before
            name = key(data.draw(st.integers(0, self.names - 1)))
            if name in self.sizes:
                return
        else:
            self.names += 1
        self.call("add", name, pages, data.draw(st.integers(0, 50)), heat)
        self.sizes[name] = pages
        self.check()

    @precondition(lambda self: self.sizes)
    @rule(data=st.data(), pages=st.integers(1, 3))
    def extend(self, data, pages):
        name = self.some(data)
        self.call("extend", name, pages)
        self.sizes[name] += pages
        self.check()

    @precondition(lambda self: self.sizes)
    @rule(data=st.data(), what=st.sampled_from(["touch", "rest", "offer", "withdraw"]))
    def mark(self, data, what):
        name = self.some(data)
        if what == "rest" and name in self.offers:
            return
        self.call(what, name)
        if what == "offer":
            self.offers.add(name)
        if what == "withdraw":
            self.offers.discard(name)
        self.check()

    @precondition(lambda self: any(n > 1 for n in self.sizes.values()))
    @rule(data=st.data())
    def split(self, data):
        name = self.some(data, {k for k, n in self.sizes.items() if n > 1})
        pages = data.draw(st.integers(1, self.sizes[name] - 1))
        low = key(self.names)
        self.names += 1
        self.call("split", name, low, pages, 60)
        self.sizes[name] -= pages
        self.sizes[low] = pages
        if name in self.offers:
            self.offers.remove(name)
            self.offers.add(low)
        self.check()

    @precondition(lambda self: self.sizes)
    @rule(data=st.data(), evict=st.booleans())
    def remove(self, data, evict):
        name = self.call("victim") if evict and self.offers else self.some(data)
        assert isinstance(self.call("remove", name), float)
        del self.sizes[name]
        self.offers.discard(name)
        self.check()

    def teardown(self):
        policy = self.policies[0]
        if isinstance(policy, ARC):
            ghosts = [ghost.pages for ghost in policy._ghosts]
            assert all(ghost.pages == sum(ghost._sizes.values()) for ghost in policy._ghosts)
            live = [sum(e.pages for e in policy._entries.values() if e.seen is seen) for seen in (False, True)]
            assert policy._pages == live and 0 <= policy._target <= policy.capacity
            assert not ghosts[0] or live[0] + ghosts[0] <= policy.capacity
            assert not ghosts[1] or sum(live) + sum(ghosts) <= 2 * policy.capacity
        if isinstance(policy, LFU):
            assert len(policy._past) <= policy.capacity


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
        policy.add(key(i), 1, i)
        policy.offer(key(i))
    return policy


@pytest.mark.parametrize("name", POLICIES)
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
    heaps = [o._heap for o in (policy._orders if isinstance(policy, ARC) else [policy._order])]
    assert max(map(len, heaps)) <= 2 * 2000 + 65, "outdated heap items pile up"
    assert len(order(policy)) == 2000


def test_lru_order_is_recency_of_use_or_release():
    policy = filled(LRU, 4)
    policy.touch(key(1))
    policy.withdraw(key(0))
    policy.rest(key(0))
    policy.offer(key(0))
    assert order(policy) == [2, 3, 1, 0]


def test_lfu_counts_decay_by_half_after_a_half_life():
    policy = LFU(100, half_life=0.5)  # 50 pages
    policy.add(key(0), 1, 0)
    for _ in range(3):
        policy.touch(key(0))  # worth 4
    for i in range(1, 100):
        policy.add(key(i), 1, 0)
    assert policy.remove(key(0)) == pytest.approx(0.0, abs=0.05)  # two half-lives later worth 1, as a new one is
    policy.add(key(0), 1, 0, 3.0)
    assert policy.remove(key(0)) == pytest.approx(3.0, abs=0.05), "heat travels between tiers"


def test_lfu_remembers_what_left():
    policy = filled(LFU, 2)
    for _ in range(5):
        policy.touch(key(0))
    policy.remove(key(0))
    policy.add(key(0), 1, 0)
    policy.offer(key(0))
    assert order(policy) == [1, 0]


def test_ties_leave_deepest_first():
    policy = LFU(10)
    for i, depth in enumerate([4, 9, 2]):
        policy.add(key(i), 1, depth, None if i == 0 else policy._entries[key(0)].rank - policy._now)
        policy.offer(key(i))
    assert order(policy) == [1, 0, 2]


def test_arc_adapts_to_what_comes_back():
    policy = filled(ARC, 4, capacity=4)
    policy.touch(key(0))  # T2: 0; T1: 1 2 3
    assert policy.victim() == key(1)
    policy.remove(key(1))
    before = policy._target
    policy.add(key(1), 1, 0)  # a hit in B1: T1 was too small, and the node was seen twice
    policy.offer(key(1))
    assert policy._target > before and policy._entries[key(1)].seen
    policy.withdraw(key(0))
    policy.remove(key(0))
    policy.add(key(0), 1, 0)  # a hit in B2
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

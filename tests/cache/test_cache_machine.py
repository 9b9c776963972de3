"""Random interleavings of everything a scheduler may do, on a device that remembers what it computed."""

import pytest
from cache_harness import Harness, full, window
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from jaxkv.cache.eviction import POLICIES

GROUPS = {"full": (full(),), "two full": (full(), full(2)), "full+window": (full(), window(5)), "window": (window(6),),
          "windows": (window(1), window(9)), "full+windows": (full(), window(3), window(8))}


class CacheMachine(RuleBasedStateMachine):
    groups = ("full",)
    pages = st.sampled_from([8, 12, 40])
    host = st.sampled_from([0, 3, 40])

    @initialize(data=st.data())
    def start(self, data):
        groups = GROUPS[data.draw(st.sampled_from(self.groups))]
        self.size = data.draw(st.integers(1, 4))
        self.capacity = tuple(data.draw(self.pages) for _ in groups)
        self.h = Harness(groups, self.size, self.capacity, tuple(data.draw(self.host) for _ in groups),
                         data.draw(st.sampled_from(sorted(POLICIES))), data.draw(st.sampled_from([0, 1])))
        self.waiting = []
        self.finished = []

    def limit(self):
        return min(self.capacity) * self.size

    @precondition(lambda self: len(self.waiting) < 4)
    @rule(data=st.data())
    def add(self, data):
        base = []
        namespace = data.draw(st.sampled_from(["", "", "other"]))
        if self.finished and data.draw(st.integers(0, 3)):
            base = data.draw(st.sampled_from(self.finished)).tokens
            base = base[:data.draw(st.integers(1, len(base)))]
        length = data.draw(st.integers(not base, 4 * self.size))
        tail = [data.draw(st.integers(0, 2))] * length if data.draw(st.booleans()) else \
            data.draw(st.lists(st.integers(0, 2), min_size=length, max_size=length))
        prompt = (base + tail)[:self.limit() - 1]
        logprobs = data.draw(st.sampled_from([None, None, None, 0]))
        self.waiting.append(self.h.new(prompt, namespace=namespace, prompt_logprobs=logprobs))
        self.admit(data)

    @rule(data=st.data())
    def admit(self, data):
        h = self.h
        if all(s.in_flight for s in self.waiting):
            return
        seq = data.draw(st.sampled_from([s for s in self.waiting if not s.in_flight]))
        alone = not h.running
        h.acquire(seq)
        self.waiting.remove(seq)
        left = seq.num_tokens - seq.num_scheduled
        length = data.draw(st.integers(1, left))
        if seq.owes_prompt_logprobs:
            seq.num_reported = len(seq.request.prompt)
        if not h.chunk(seq, length):
            assert not alone, "a sequence that fits alone was refused"
            h.release(seq)
            self.waiting.append(seq)

    @precondition(lambda self: self.ready())
    @rule(data=st.data())
    def step(self, data):
        seq = data.draw(st.sampled_from(self.ready()))
        if not self.h.chunk(seq, data.draw(st.integers(1, seq.num_tokens - seq.num_scheduled))):
            assert len(self.h.running) > 1, "a sequence that is alone cannot grow"

    def ready(self):
        h = self.h
        return [s for s in h.running if s not in h.scheduled and s.num_scheduled < s.num_tokens < self.limit()]

    def idle(self):
        return [s for s in self.h.running if s not in self.h.scheduled]

    @precondition(lambda self: self.idle())
    @rule(data=st.data())
    def preempt(self, data):
        seq = data.draw(st.sampled_from(self.idle()))
        self.h.release(seq)
        (self.waiting if seq.num_tokens <= self.limit() else self.finished).append(seq)

    @precondition(lambda self: self.idle())
    @rule(data=st.data())
    def finish(self, data):
        seq = data.draw(st.sampled_from(self.idle()))
        self.h.release(seq)
        self.finished.append(seq)

    @rule(steps=st.integers(1, 6))
    def step_all(self, steps):
        for _ in range(steps):
            for seq in self.ready():
                self.h.chunk(seq, seq.num_tokens - seq.num_scheduled)
            self.h.end_plan()

    @rule()
    def end_plan(self):
        self.h.end_plan()

    @invariant()
    def counts(self):
        if hasattr(self, "h"):
            assert len(self.h.cache.trie.roots) <= 2

    def teardown(self):
        if not hasattr(self, "h"):
            return
        self.h.end_plan()
        for seq in list(self.h.running):
            self.h.release(seq)
        self.h.end_plan()


@pytest.mark.parametrize("groups", list(GROUPS))
def test_machine(groups):
    machine = type("Machine", (CacheMachine,), {"groups": (groups,)})
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=40, deadline=None))

"""Drives a CacheController and a SimDevice together, the way the rules in the controller's head ask for.

A tiny scheduler without any policy: tests decide what happens, the harness keeps the rules, checks integrity after
every call, and compares what was matched with a dict of prefixes.
"""

from __future__ import annotations

from jaxkv.cache.controller import CacheController
from jaxkv.params import SamplingParams
from jaxkv.sequence import Sequence
from jaxkv.types import Admit, Chunk, KVGroup, Request, StepPlan, Tier
from tests.sim_device import SimDevice


def full(layers: int = 1) -> KVGroup:
    return KVGroup(tuple(range(layers)), 1, 4, "float32")


def window(tokens: int) -> KVGroup:
    return KVGroup((0,), 1, 4, "float32", tokens)


FULL = (full(),)


class Harness:
    """``lag``: plans between a step and its commit (0: synchronous, 1: overlap)."""

    def __init__(self, groups=FULL, page_size=4, pages=64, host=0, policy="lfu", lag=0, caching=True) -> None:
        count = len(groups)
        num = pages if isinstance(pages, tuple) else (pages,) * count
        num_host = host if isinstance(host, tuple) else (host,) * count
        self.cache = CacheController(groups, page_size, num, num_host, policy, "model", caching)
        self.sim = SimDevice(groups, page_size, num, num_host, vocab_size=3)
        self.lag = lag
        self.page_size = page_size
        self.running: list[Sequence] = []
        self.plan_id = 0
        self.chunks: list[Chunk] = []
        self.scheduled: list[Sequence] = []  # those with a chunk in the open plan
        self.admits: list[Admit] = []
        self.uncommitted: list[tuple[list[Sequence], list[Chunk], tuple]] = []
        self.known: dict[str, dict[tuple[int, ...], int]] = {}  # namespace -> prefix -> plan that computed it last
        self.names = 0
        self.slots = 0

    # ---- one call each

    def new(self, prompt, max_tokens=64, namespace="", child=0, name="", **params) -> Sequence:
        self.names += 1
        request = Request(name or f"r{self.names}", tuple(prompt), SamplingParams(**params), max_tokens, child=child,
                          namespace=namespace)
        self.sim.add(request)
        return Sequence(request, list(prompt))

    def acquire(self, seq: Sequence) -> int:
        limit, known = seq.match_limit, self.known.get(seq.request.namespace, {})
        expected = next((n for n in range(limit, 0, -1) if tuple(seq.tokens[:n]) in known), 0)
        free = [pool.free for pool in self.cache.store.hbm]
        got = self.cache.acquire(seq, self.plan_id)
        assert got == seq.num_scheduled <= limit and (got <= expected)
        store, stats = self.cache.store, self.cache.stats
        lost = stats.evictions or stats.holes or store.windows or not self.cache.enable_prefix_caching
        if not lost and all(n > expected // self.page_size * bool(stats.demotions) for n in free):
            whole = expected - expected % self.page_size
            fresh = self.plan_id in known.values()
            assert got == expected or (fresh and got >= whole), f"matched {got} of {expected}"
        self.running.append(seq)
        self.slots += 1
        seq.slot = self.slots
        self.admits.append(Admit(seq.slot, seq.request.id, seq.request.params, 0, seq.request.child,
                                 len(seq.request.prompt), (), ()))
        self.check()
        return got

    def chunk(self, seq: Sequence, length: int) -> bool:
        """Grow and schedule ``length`` tokens; False if there is no room."""
        cache, start = self.cache, seq.num_scheduled
        assert seq not in self.scheduled and 0 < length <= seq.num_tokens - start
        need = -(-(start + length) // self.page_size) - len(seq.pages[0])
        before, moves = [list(pages) for pages in seq.pages], len(cache.store.moves)
        if not cache.grow(seq, start + length):
            assert any(need > cache.available(g) for g in range(len(cache.groups))), "room was there"
            assert [len(pages) for pages in seq.pages] == [len(pages) for pages in before]
            assert len(cache.store.moves) == moves
            self.check()
            return False
        seq.num_scheduled = end = start + length
        cache.publish(seq, self.plan_id)
        self._learn(seq, self.plan_id)
        self.check()
        tokens = tuple(seq.tokens[start:end]) or (-1,)
        logits = int(end == seq.num_tokens)
        seq.in_flight += logits
        rows = tuple((first, tuple(pages[first:])) for first, pages in zip(seq.dirty, seq.pages, strict=True))
        seq.dirty = [len(pages) for pages in seq.pages]
        self.chunks.append(Chunk(seq.request.id, seq.slot, start, tokens, logits, rows))
        self.scheduled.append(seq)
        return True

    def release(self, seq: Sequence) -> None:
        assert seq not in self.scheduled
        done = min(len(seq.tokens), seq.num_scheduled)
        self.running.remove(seq)
        self.cache.release(seq)
        seq.num_scheduled = 0
        if self.cache.enable_prefix_caching:
            self._note(seq, done, -1)
        self.check()

    def end_plan(self) -> StepPlan:
        """Run the open plan on the device, commit what is due."""
        plan = StepPlan(self.plan_id, *self.cache.take_transfers(), tuple(self.admits), tuple(self.chunks))
        result = self.sim.apply(plan)
        for g, host in enumerate(self.sim.host):
            assert len(host) == self.cache.usage()[Tier.HOST][g], "the tiers disagree about host pages"
        self.uncommitted.append((self.scheduled, self.chunks, result.tokens))
        self.plan_id += 1
        self.scheduled, self.chunks, self.admits = [], [], []
        while len(self.uncommitted) > self.lag:
            self.commit()
        return plan

    def commit(self) -> None:
        seqs, _, sampled = self.uncommitted.pop(0)
        for seq, tokens in zip(seqs, sampled, strict=True):
            seq.in_flight -= len(tokens)
            seq.tokens += tokens
            if seq in self.running:
                self.cache.publish(seq, self.plan_id - 1)
                self._learn(seq, self.plan_id - 1)
        self.check()

    def check(self) -> None:
        self.cache.check(self.running)

    # ---- the dict of prefixes

    def _learn(self, seq: Sequence, plan_id: int) -> None:
        """What ``publish`` must have made known: full pages, and a prompt that is complete."""
        if not self.cache.enable_prefix_caching:
            return
        self._note(seq, seq.num_published, plan_id)

    def _note(self, seq: Sequence, length: int, plan_id: int) -> None:
        known = self.known.setdefault(seq.request.namespace, {})
        for n in range(1, length + 1):
            known.setdefault(tuple(seq.tokens[:n]), plan_id)

    # ---- whole stories

    def run(self, seq: Sequence, tokens: int = 1, budget: int = 1 << 30) -> int:
        """Admit ``seq`` alone, compute its prompt in chunks of ``budget``, sample ``tokens``; tokens matched."""
        matched = self.acquire(seq)
        self.decode(seq, tokens, budget)
        return matched

    def decode(self, seq: Sequence, tokens: int, budget: int = 1 << 30) -> None:
        target = len(seq.tokens) + tokens
        while len(seq.tokens) < target:
            if (left := seq.num_tokens - seq.num_scheduled) and seq.num_tokens < target:
                assert self.chunk(seq, min(left, budget)), "no room"
            self.end_plan()

    def serve(self, prompt, tokens: int = 1, budget: int = 1 << 30, **more) -> tuple[Sequence, int, int]:
        """Run a request to its end; the sequence, tokens matched and tokens computed."""
        seq = self.new(prompt, **more)
        matched = self.run(seq, tokens, budget)
        self.release(seq)
        return seq, matched, self.sim.computed[seq.request.id]

"""KV that turned out wrong: its sequence ends with an error, and nobody else ever gets it, in any tier, by share or by copy."""

from __future__ import annotations

import random
from dataclasses import replace
from unittest.mock import patch

import pytest
from sched_driver import FULL, FULL_AND_WINDOW, Driver, children, request

from jaxkv.params import SamplingParams
from jaxkv.types import Chunk, StepPlan, StepResult, Tier
from tests.sim_device import SimDevice

NAN = -7  # content of a position
MODEL_LEN = 48
TEXTS = ([1] * 60, [1] * 6 + [2] * 54, [1, 2, 3, 4, 5, 6, 7] * 9, list(range(20, 80)))


class Faulty(SimDevice):
    """In steps whose plan is in ``lost`` the memory runs out after some of the moves, and nothing runs until ``restore``; in
    steps whose plan is in ``broken`` one sequence computes NaN, which spreads to whoever reads it."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.lost: set[int] = set()
        self.broken: set[int] = set()
        self.void = False
        self.victims: set[str] = set()
        self.touched: set[str] = set()  # read NaN at some time
        self._dead: set[str] = set()  # sampled NaN and were not admitted again

    def apply(self, plan: StepPlan) -> StepResult:
        self._dead -= {admit.request_id for admit in plan.admits}
        if plan.id in self.lost and not self.void:
            super().apply(replace(plan, moves=plan.moves[:plan.id % 4], fetches=(), chunks=()))
            self.victims |= {chunk.request_id for chunk in plan.chunks}
            self.void = True
        if self.void:
            return StepResult((), failed=True)
        alive = [chunk for chunk in plan.chunks if chunk.request_id not in self._dead]
        self._victim = alive[plan.id % len(alive)].request_id if plan.id in self.broken and alive else None
        self.victims |= {self._victim} - {None}
        result = super().apply(replace(plan, chunks=tuple(alive)))
        tokens = dict(zip([chunk.request_id for chunk in alive], result.tokens))
        return StepResult(tuple(tokens.get(chunk.request_id, (-1,) * chunk.num_logits) for chunk in plan.chunks))

    def restore(self, host_pages: set[tuple[int, int]]) -> None:
        super().restore(host_pages)
        self.void = False

    def _write(self, chunks: tuple[Chunk, ...]) -> None:
        super()._write(chunks)
        for chunk in chunks:
            if chunk.request_id == self._victim:
                for position in range(chunk.start, chunk.start + len(chunk.tokens)):
                    for g, rows in enumerate(self._slots[chunk.slot].rows):
                        self.hbm[g][rows[position // self.page_size]][position % self.page_size] = NAN

    def _read(self, chunk: Chunk) -> None:
        end = chunk.start + len(chunk.tokens)
        for g, group in enumerate(self.groups):
            start = 0 if group.window is None else max(0, chunk.start - group.window + 1)
            for position in range(start, end):
                page = self._slots[chunk.slot].rows[g][position // self.page_size]
                if self.hbm[g][page][position % self.page_size] == NAN:
                    self._dead.add(chunk.request_id)
                    self.touched.add(chunk.request_id)
                    for at in range(chunk.start, end):  # what is computed from NaN is NaN
                        for h, rows in enumerate(self._slots[chunk.slot].rows):
                            self.hbm[h][rows[at // self.page_size]][at % self.page_size] = NAN
                    return
        super()._read(chunk)

    def _sampled(self, chunk: Chunk) -> tuple[int, ...]:
        return (-1,) * chunk.num_logits if chunk.request_id in self._dead else super()._sampled(chunk)


def run(seed: int, fault: str) -> Driver:
    """Random arrivals and aborts with two faults among them, to the end; then every prompt again, on the cache that is left.

    NaN of a sequence that was aborted before its first logits is found by who reads it next, and by nobody after that.
    """
    rng = random.Random(f"{fault} {seed}")
    driver = Driver(
        Faulty, pages=rng.choice([14, 24, 100]), host_pages=rng.choice([0, 8, 40]), disk=rng.random() < 0.5,
        policy=rng.choice(["lfu", "lru", "arc"]), groups=rng.choice([FULL, FULL_AND_WINDOW]), max_num_seqs=rng.randint(1, 6),
        budget=rng.choice([8, 16, MODEL_LEN]), overlap=rng.randint(0, 1), fetch_pages=rng.choice([1, 64]),
        delay=rng.randint(1, 4), max_model_len=MODEL_LEN)
    driver.lost_late = rng.random() < 0.6
    getattr(driver.device, fault).update(rng.sample(range(2, 40), 2))
    aborts = rng.choice([0, 0, 0.1])
    for index in range(14):
        length = rng.randint(1, MODEL_LEN - 2)
        tokens = rng.randint(1, min(20, MODEL_LEN - length))
        params = SamplingParams(prompt_logprobs=rng.choice([None, None, 0]))
        driver.add(*children(f"r{index}", rng.choice(TEXTS)[:length], rng.choice([1, 1, 3]), tokens, params=params))
        for _ in range(rng.randint(0, 5)):
            driver.step()
            for name in [name for name in driver.requests if name not in driver.reasons and rng.random() < aborts]:
                driver.abort(name)
    driver.run()
    driver.check_outputs()
    failed = {name for name, reason in driver.reasons.items() if reason == "error"}
    assert driver.device.victims <= set(driver.reasons), "nobody is lost"
    driver.device.lost.clear()
    driver.device.broken.clear()
    for again in range(4 if aborts and fault == "broken" else 1):
        for name in [name for name in driver.requests if name.startswith("r")]:
            one = driver.requests[name]
            driver.add(*children(f"again {again} {name}", one.prompt, 1, one.max_tokens, params=SamplingParams()))
        driver.run()
        driver.check_outputs()
    late = {name for name, reason in driver.reasons.items() if reason == "error"} - failed
    assert not {name for name in late if name.startswith(f"again {again}")}
    assert all(driver.inner.cache.available(g) == driver.settings.pages for g in range(len(driver.settings.groups)))
    assert driver.replayed(driver.log) == driver.plans
    return driver


@pytest.mark.parametrize("seed", range(40))
def test_nan_is_never_hit(seed):
    driver = run(seed, "broken")
    failed = {name for name, reason in driver.reasons.items() if reason == "error"}
    assert driver.device.touched and failed <= driver.device.touched, "an error is for who read NaN"


@pytest.mark.parametrize("seed", range(40))
def test_a_lost_step_fails_its_sequences_only(seed):
    driver = run(seed, "lost")
    failed = {name for name, reason in driver.reasons.items() if reason == "error"}
    assert failed == driver.device.victims


def test_who_shares_lost_kv_computes_it_again():
    """The second request waits for the first one's pages when the step that computes them is lost."""
    driver = Driver(Faulty, pages=40, overlap=1, budget=64, max_num_seqs=1, disk=True)
    prompt = list(range(20, 40))
    driver.device.lost.add(1)
    driver.add(*children("first", prompt, 1, 8), *children("second", prompt + [3], 1, 8))
    driver.run()
    assert driver.reasons == {"first.0": "error", "second.0": "length"}
    assert driver.device.computed["second.0"] == len(prompt) + 8
    driver.check_outputs()


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("late", [False, True])
def test_host_pages_below_lost_ones_are_found_again(late, disk):
    """What prompts share is in HBM, their tails are in the host tier, when HBM is lost. The next one computes what they share,
    or brings it from the disk; then a tail comes from the host tier as before."""
    driver = Driver(Faulty, pages=24, host_pages=60, overlap=1, max_num_seqs=1, disk=disk, delay=1)
    driver.lost_late = late
    shared = list(range(40))
    with patch("jaxkv.cache.costs.TRAINED", 10**9):  # what is found is brought
        for index in range(6):
            driver.add(request(f"{index}", shared + [50 + index] * 16, 2))
            driver.run()
        cache = driver.inner.cache
        tails = [n for n in cache.trie.nodes() if n.tier is Tier.HOST]
        kept = sum(map(len, tails))
        assert tails and all(n.start >= len(shared) for n in tails)
        driver.device.lost.add(len(driver.plans))
        driver.add(request("victim", [90] * 8, 8))
        driver.run()
        assert driver.reasons["victim"] == "error" and cache.usage()[Tier.HOST] == (kept,)
        assert all(node.tier is Tier.HOST for node in cache.trie.nodes())
        tail_token = next(node.data[0] for node in tails if node.start == len(shared))
        for name, tail in (("one", [3] * 8), ("two", [tail_token] * 16)):
            driver.add(request(name, shared + tail, 2))
            driver.run()
    computed = driver.device.computed
    assert computed["two"] < 10 and driver.cached_below["two"][0] >= 12
    assert computed["one"] < 20 if disk else computed["one"] >= len(shared)
    driver.check_outputs()


def test_nan_of_a_sequence_that_was_aborted_is_never_hit():
    driver = Driver(Faulty, pages=60, overlap=1)
    driver.device.broken.add(0)
    driver.add(*children("first", range(1, 10), 1, 8))
    driver.step()
    driver.abort("first.0")
    driver.run()
    for index, prompt in enumerate([range(1, 10), [1, 2, 30, 4, 5], range(1, 10)]):
        driver.add(*children(f"{index}", prompt, 1, 4))
        driver.run()
    assert driver.reasons == {"first.0": "abort", "0.0": "length", "1.0": "length", "2.0": "length"}


def test_who_copies_nan_computes_again_and_drops_it():
    """Nobody knows of the NaN of a prompt that is aborted halfway; the first that copies a part of its page finds it."""
    driver = Driver(Faulty, pages=60, overlap=1, budget=8)
    driver.device.broken.add(0)
    driver.add(*children("first", range(1, 20), 1, 8))
    driver.step()
    driver.abort("first.0")
    driver.run()
    for index in range(3):
        driver.add(*children(f"{index}", [1, 2, 30 + index, 4, 5, 6, 7], 1, 4))
        driver.run()
    assert driver.reasons == {"first.0": "abort", "0.0": "length", "1.0": "length", "2.0": "length"}
    assert driver.inner.num_preemptions == 1
    driver.check_outputs()


def test_nan_restarts_nobody_else():
    """Requests whose last token is NaN, one after the other, beside one that shares their first page."""
    class Cursed(Faulty):
        def _write(self, chunks):
            super()._write(chunks)
            for chunk in chunks:
                if chunk.request_id.startswith("bad"):
                    at = chunk.start + len(chunk.tokens) - 1
                    self.hbm[0][self._slots[chunk.slot].rows[0][at // self.page_size]][at % self.page_size] = NAN

    driver = Driver(Cursed, pages=200, overlap=1, budget=16)
    driver.add(*children("good", [1, 2, 3, 4, *range(10, 42)], 1, 20))
    for index in range(30):
        driver.step()
        if index > 3:
            driver.add(*children(f"bad{index}", [1, 2, 3, 4, 90], 1, 4))
    driver.run()
    assert {name[:3]: reason for name, reason in driver.reasons.items()} == {"goo": "length", "bad": "error"}
    assert driver.inner.num_preemptions == len(driver.reasons) - 1 and driver.device.computed["good.0"] == 55
    driver.check_outputs()

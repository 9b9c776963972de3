"""KV that turned out wrong: its sequence ends with an error, and nobody else ever gets it, in any tier, by share or by copy."""

from __future__ import annotations

import random
from dataclasses import replace
from unittest.mock import patch

import pytest
from sched_driver import FULL, FULL_AND_WINDOW, WINDOWS, Driver, children, request

from jaxkv.params import SamplingParams
from jaxkv.types import Chunk, StepPlan, StepResult, Tier
from tests.sim_device import SimDevice

MODEL_LEN = 48
GROUPS = (FULL, FULL_AND_WINDOW, WINDOWS, WINDOWS[:1], WINDOWS[1:])
TEXTS = ([1] * 60, [1] * 6 + [2] * 54, [1, 2, 3, 4, 5, 6, 7] * 9, list(range(20, 80)))


class Nan(int):
    """What a position holds (a prefix id) when its KV is NaN, from layer ``layer`` of its group on."""

    layer: int


class Faulty(SimDevice):
    """In steps whose plan is in ``lost`` the memory runs out after some of the moves, and nothing runs until ``restore``; in
    steps whose plan is in ``broken`` one sequence computes NaN.

    NaN spreads as in a model: who sees it in a layer has NaN among its logits and computes NaN for the layers above that one,
    so it does not come further than the windows of all layers together. What is computed of a token that was sampled from NaN
    is nobody's KV.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.lost: set[int] = set()
        self.broken: set[int] = set()
        self.void = False
        self.victims: set[str] = set()
        self.touched: set[str] = set()  # read NaN at some time
        self.found: set[str] = set()  # had it among their logits
        self._wild: set[str] = set()  # sampled from NaN and were not admitted again
        self._nan: set[str] = set()  # have NaN among the logits of this step

    def apply(self, plan: StepPlan) -> StepResult:
        self._wild -= {admit.request_id for admit in plan.admits}
        self._nan.clear()
        if plan.id in self.lost and not self.void:
            super().apply(replace(plan, moves=plan.moves[:plan.id % 4], fetches=(), chunks=()))
            self.victims |= {chunk.request_id for chunk in plan.chunks}
            self.void = True
        if self.void:
            return StepResult((), failed=True)
        alive = [chunk.request_id for chunk in plan.chunks if chunk.request_id not in self._wild]
        self._victim = alive[plan.id % len(alive)] if plan.id in self.broken and alive else None
        self.victims |= {self._victim} - {None}
        result = super().apply(plan)
        self._wild |= {chunk.request_id for chunk, tokens in zip(plan.chunks, result.tokens) if -1 in tokens}
        self.found |= self._wild
        return result

    def restore(self, host_pages: set[tuple[int, int]]) -> None:
        super().restore(host_pages)
        self.void = False

    def _breaks(self, chunk: Chunk) -> range:
        """Positions that the chunk's own computation makes NaN."""
        return range(chunk.start, chunk.start + len(chunk.tokens) if chunk.request_id == self._victim else chunk.start)

    def _write(self, chunks: tuple[Chunk, ...]) -> None:
        alive = [chunk for chunk in chunks if chunk.request_id not in self._wild]
        super()._write(tuple(alive))
        for chunk in chunks:
            if chunk.request_id in self._wild:
                for g, (first, pages) in enumerate(chunk.pages):
                    row = self._slots[chunk.slot].rows[g]
                    row[first:] = pages
                    self.hbm[g][row[chunk.start // self.page_size]][chunk.start % self.page_size] = None
        for chunk in alive:
            for position in self._breaks(chunk):
                self._spoil(chunk, position, -1)
        while any([self._spread(chunk) for chunk in alive]):  # one may see what another one computes
            pass

    def _spread(self, chunk: Chunk) -> bool:
        """Make NaN what is computed from NaN; whether anything was changed."""
        changed, rows = False, self._slots[chunk.slot].rows
        for position in range(chunk.start, chunk.start + len(chunk.tokens)):
            seen = [self.hbm[g][rows[g][at // self.page_size]][at % self.page_size] for g, group in enumerate(self.groups)
                    for at in range(max(0, position - (group.window or MODEL_LEN) + 1), position + 1)]
            layers = [content.layer for content in seen if isinstance(content, Nan)]
            if layers:
                changed |= self._spoil(chunk, position, min(layers))
                self.touched.add(chunk.request_id)
                if position == chunk.start + len(chunk.tokens) - 1:
                    self._nan.add(chunk.request_id)
        return changed

    def _spoil(self, chunk: Chunk, position: int, layer: int) -> bool:
        """A position's KV of the layers above ``layer`` is NaN; whether it was not."""
        changed = False
        for g, group in enumerate(self.groups):
            page = self.hbm[g][self._slots[chunk.slot].rows[g][position // self.page_size]]
            content, above = page[position % self.page_size], [other for other in group.layers if other > layer]
            if above and not (isinstance(content, Nan) and content.layer <= min(above)):
                page[position % self.page_size] = nan = Nan(content)
                nan.layer = min(above)
                changed = True
        return changed

    def _read(self, chunk: Chunk) -> None:
        if chunk.request_id not in self._wild:
            super()._read(chunk)

    def _sampled(self, chunk: Chunk) -> tuple[int, ...]:
        return (-1,) * chunk.num_logits if chunk.request_id in self._wild | self._nan else super()._sampled(chunk)


def run(seed: int, fault: str) -> Driver:
    """Random arrivals and aborts with two faults among them, to the end; then every prompt again, on the cache that is left, at
    first all at once, then one after the other.

    NaN that no logits have seen, as its sequence was aborted or it fell out of the windows, is found by who reads it next,
    and by nobody after that.
    """
    rng = random.Random(f"{fault} {seed}")
    driver = Driver(
        Faulty, pages=rng.choice([14, 24, 100]), host_pages=rng.choice([0, 8, 40]), disk=rng.random() < 0.5,
        policy=rng.choice(["lfu", "lru", "arc"]), groups=rng.choice(GROUPS), max_num_seqs=rng.randint(1, 6),
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
    for again in range(3 if fault == "broken" else 1):
        for name in [name for name in driver.requests if name.startswith("r")]:
            one = driver.requests[name]
            driver.add(*children(f"again {again} {name}", one.prompt, 1, one.max_tokens, params=SamplingParams()))
            if again:
                driver.run()
        driver.run()
        driver.check_outputs()
    late = {name for name, reason in driver.reasons.items() if reason == "error"} - failed
    assert not {name for name in late | driver.device.found if name.startswith(f"again {again}")}
    assert all(driver.inner.cache.available(g) == driver.settings.pages for g in range(len(driver.settings.groups)))
    assert driver.replayed(driver.log) == driver.plans
    return driver


@pytest.mark.parametrize("seed", range(40))
def test_nan_is_never_hit(seed):
    driver = run(seed, "broken")
    failed = {name for name, reason in driver.reasons.items() if reason == "error"}
    assert driver.device.touched and failed <= driver.device.found, "an error is for who read NaN"


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


def test_nan_out_of_the_windows_of_those_who_hold_it_is_dropped():
    """Only windows: NaN early in a prompt is in no logits, and who goes on from the end of that prompt does not find it. A
    short prompt does, once, though all the while the other one holds its prefix."""
    driver = Driver(Faulty, groups=WINDOWS[1:], pages=60, overlap=1, budget=8, disk=True)
    driver.device.broken.add(0)
    driver.add(request("first", range(1, 40), 2))
    driver.run()
    driver.add(request("holder", range(1, 40), 24))
    for index in range(3):
        driver.add(request(f"{index}", range(1, 8), 4))
        for _ in range(6):
            driver.step()
    assert "holder" not in driver.reasons and driver.cached["holder"] == 38
    driver.run()
    assert driver.device.touched == {"first", "0"} and driver.inner.num_preemptions == 1
    assert [driver.cached[name] for name in "012"] == [6, 0, 4], "what was dropped is there again"
    assert set(driver.reasons.values()) == {"length"}
    driver.check_outputs()


def test_nan_restarts_nobody_else():
    """Requests whose last token is NaN, one after the other, beside one that shares their first page."""
    class Cursed(Faulty):
        def _breaks(self, chunk):
            end = chunk.start + len(chunk.tokens)
            return range(end - 1, end) if chunk.request_id.startswith("bad") else range(0)

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

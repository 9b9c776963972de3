"""KV that turned out wrong: its sequence ends with an error, and nobody else ever gets it, in any tier, by share or by copy."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from sched_driver import FULL, FULL_AND_WINDOW, Driver, children

from jaxkv.types import Chunk, SamplingParams, StepPlan, StepResult
from tests.sim_device import SimDevice

NAN = -7  # content of a position
MODEL_LEN = 48
TEXTS = ([1] * 60, [1] * 6 + [2] * 54, [1, 2, 3, 4, 5, 6, 7] * 9, list(range(20, 80)))


class Faulty(SimDevice):
    """Steps whose plan is in ``lost`` do not run; in steps whose plan is in ``broken`` one sequence computes NaN, which
    spreads to whoever reads it. What a step says that was submitted before a loss was read is worth nothing."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.lost: set[int] = set()
        self.broken: set[int] = set()
        self.unread_loss = False
        self.victims: set[str] = set()
        self._dead: set[str] = set()  # sampled NaN and were not admitted again

    def apply(self, plan: StepPlan) -> StepResult:
        self._dead -= {admit.request_id for admit in plan.admits}
        if plan.id in self.lost or self.unread_loss:
            super().apply(replace(plan, chunks=()))
            if plan.id in self.lost:
                self.unread_loss = True
                self.victims |= {chunk.request_id for chunk in plan.chunks}
                return StepResult((), failed=True)
            return StepResult(tuple((5,) * chunk.num_logits for chunk in plan.chunks))
        alive = [chunk for chunk in plan.chunks if chunk.request_id not in self._dead]
        self._victim = alive[plan.id % len(alive)].request_id if plan.id in self.broken and alive else None
        self.victims |= {self._victim} - {None}
        result = super().apply(replace(plan, chunks=tuple(alive)))
        tokens = dict(zip([chunk.request_id for chunk in alive], result.tokens))
        return StepResult(tuple(tokens.get(chunk.request_id, (-1,) * chunk.num_logits) for chunk in plan.chunks))

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
                    for at in range(chunk.start, end):  # what is computed from NaN is NaN
                        for h, rows in enumerate(self._slots[chunk.slot].rows):
                            self.hbm[h][rows[at // self.page_size]][at % self.page_size] = NAN
                    return
        super()._read(chunk)

    def _sampled(self, chunk: Chunk) -> tuple[int, ...]:
        return (-1,) * chunk.num_logits if chunk.request_id in self._dead else super()._sampled(chunk)


class Watching(Driver):
    """Tells the device when a loss was read."""

    def read(self) -> None:
        failed = self._unread[0][1].failed
        super().read()
        if failed:
            self.device.unread_loss = False


def run(seed: int, fault: str) -> Watching:
    """Random arrivals with two faults among them, to the end; then every prompt once more, on the cache that is left."""
    rng = random.Random(f"{fault} {seed}")
    driver = Watching(
        Faulty, pages=rng.choice([14, 24, 100]), host_pages=rng.choice([0, 8, 40]), disk=rng.random() < 0.5,
        policy=rng.choice(["lfu", "lru", "arc"]), groups=rng.choice([FULL, FULL_AND_WINDOW]), max_num_seqs=rng.randint(1, 6),
        budget=rng.choice([8, 16, MODEL_LEN]), overlap=rng.randint(0, 1), fetch_pages=rng.choice([1, 64]),
        delay=rng.randint(1, 4), max_model_len=MODEL_LEN)
    getattr(driver.device, fault).update(rng.sample(range(2, 40), 2))
    for index in range(14):
        length = rng.randint(1, MODEL_LEN - 2)
        tokens = rng.randint(1, min(20, MODEL_LEN - length))
        params = SamplingParams(prompt_logprobs=rng.choice([None, None, 0]))
        driver.add(*children(f"r{index}", rng.choice(TEXTS)[:length], rng.choice([1, 1, 3]), tokens, params=params))
        for _ in range(rng.randint(0, 5)):
            driver.step()
    driver.run()
    driver.check_outputs()
    failed = {name for name, reason in driver.reasons.items() if reason == "error"}
    assert driver.device.victims & set(driver.reasons) == driver.device.victims
    driver.device.lost.clear()
    driver.device.broken.clear()
    for name, one in list(driver.requests.items()):
        driver.add(*children(f"again {name}", one.prompt, 1, one.max_tokens, params=SamplingParams()))
    driver.run()
    driver.check_outputs()
    assert {name for name, reason in driver.reasons.items() if reason == "error"} == failed
    assert all(driver.inner.cache.available(g) == driver.settings.pages for g in range(len(driver.settings.groups)))
    return driver


@pytest.mark.parametrize("seed", range(40))
def test_nan_is_never_hit(seed):
    driver = run(seed, "broken")
    failed = {name for name, reason in driver.reasons.items() if reason == "error"}
    assert failed or not driver.device.victims
    assert driver.device.victims <= failed | {name for name in driver.reasons if driver.reasons[name] != "error"}


@pytest.mark.parametrize("seed", range(40))
def test_a_lost_step_fails_its_sequences_only(seed):
    driver = run(seed, "lost")
    failed = {name for name, reason in driver.reasons.items() if reason == "error"}
    reporting = {name for name, one in driver.requests.items() if one.params.prompt_logprobs is not None}
    assert driver.device.victims <= failed <= driver.device.victims | reporting and driver.device.victims


def test_who_shares_wrong_kv_computes_it_again():
    """The second request sits on the first one's prompt when that turns out wrong, and answers all the same."""
    driver = Watching(Faulty, pages=40, overlap=1, budget=64)
    prompt = list(range(20, 40))
    driver.add(*children("first", prompt, 1, 8, params=SamplingParams()))
    driver.device.lost.add(1)
    driver.step()
    driver.step()
    driver.add(*children("second", prompt + [3], 1, 8, params=SamplingParams()))
    driver.run()
    assert driver.reasons == {"first.0": "error", "second.0": "length"} and driver.inner.num_preemptions == 1
    driver.check_outputs()

"""Any arrivals, aborts, priorities, children, stop ids, pools and budgets: what must hold holds, and all ends well."""

import json
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st
from sched_driver import FULL, FULL_AND_WINDOW, Driver, children

from jaxkv.config import EVICTION_POLICIES
from jaxkv.params import SamplingParams
from jaxkv.types import StepPlan

MODEL_LEN = 48
ENGINES = st.fixed_dictionaries({
    "pages": st.sampled_from([12, 13, 15, 18, 100]), "host_pages": st.sampled_from([0, 5, 40]),
    "policy": st.sampled_from(EVICTION_POLICIES), "groups": st.sampled_from([FULL, FULL_AND_WINDOW]),
    "max_num_seqs": st.integers(1, 5), "budget": st.sampled_from([5, 7, 16, MODEL_LEN]),
    "overlap": st.integers(0, 2), "caching": st.sampled_from([True, True, True, False]), "disk": st.booleans(),
    "fetch_pages": st.sampled_from([1, 3, 64]), "delay": st.integers(1, 5), "failures": st.sampled_from([0, 0, 2, 3])})
# prompts are prefixes of few texts, so that they share, diverge and end inside pages
TEXTS = ([1] * 60, [1] * 6 + [2] * 54, [1, 2, 3, 4, 5, 6, 7] * 9, list(range(20, 80)))
ARRIVALS = st.fixed_dictionaries({
    "text": st.sampled_from(TEXTS), "length": st.integers(1, MODEL_LEN - 1),
    "max_tokens": st.sampled_from([1, 2, 9, 20, MODEL_LEN]),
    "priority": st.integers(-1, 1), "n": st.sampled_from([1, 1, 1, 2, 4]), "stops": st.sampled_from([0, 0, 0, 3, 20]),
    "min_tokens": st.sampled_from([0, 0, 3]), "namespace": st.sampled_from(["", "", "x"]),
    "report": st.sampled_from([None, None, None, 0])})
ACTIONS = st.one_of(ARRIVALS, ARRIVALS, st.integers(1, 5), st.tuples(st.integers(0, 40)))  # arrive, run, abort


def play(driver: Driver, actions: list) -> None:
    names: list[str] = []
    for index, action in enumerate(actions):
        if isinstance(action, int):
            for _ in range(action):
                driver.step()
        elif isinstance(action, tuple):
            if names:
                driver.abort(names[action[0] % len(names)])
        else:
            max_tokens = min(action["max_tokens"], MODEL_LEN - action["length"])
            params = SamplingParams(prompt_logprobs=action["report"], min_tokens=min(action["min_tokens"], max_tokens),
                                    max_tokens=max_tokens)
            requests = children(f"r{index}", action["text"][:action["length"]], action["n"], max_tokens,
                                params=params, priority=action["priority"], arrival=float(index // 2),
                                namespace=action["namespace"], stop_ids=tuple(range(action["stops"])))
            driver.add(*requests)
            names += [one.id for one in requests]


@settings(max_examples=120)
@given(ENGINES, st.booleans(), st.sampled_from([3, 64]), st.lists(ACTIONS, min_size=1, max_size=20))
def test_everything_finishes_and_is_right(engine, whole, measured, actions):
    """``measured``: tokens that a step needs for its time to count; with 64 none does, and all is brought."""
    with patch("jaxkv.sched.scheduler.MEASURED_TOKENS", measured), patch("jaxkv.cache.costs.TRAINED", measured):
        check_run(engine, whole, actions)


def check_run(engine: dict, whole: bool, actions: list) -> None:
    chunked = not whole or engine["budget"] < MODEL_LEN
    driver = Driver(**engine, chunked=chunked, max_model_len=MODEL_LEN)
    play(driver, actions)
    driver.run()
    driver.check_outputs()
    assert driver.inner.num_running == driver.inner.num_waiting == 0
    assert [driver.inner.cache.available(g) for g in range(len(engine["groups"]))] == \
        [engine["pages"]] * len(engine["groups"])

    plans = driver.replayed(json.loads(json.dumps(driver.log)))
    assert [p.to_dict() for p in plans] == [p.to_dict() for p in driver.plans]
    assert [StepPlan.from_dict(json.loads(json.dumps(p.to_dict()))) for p in plans] == driver.plans

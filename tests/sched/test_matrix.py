"""Every pool size, policy, chunking and loop gives the tokens that each request gets when it runs alone."""

import pytest
from sched_driver import FULL, FULL_AND_WINDOW, Driver, children, request

from jaxkv.config import EVICTION_POLICIES

MODEL_LEN = 96


def first_round(driver: Driver) -> None:
    """Prompts with shared and own parts, children, priorities, arrivals over time."""
    shared = list(range(21))
    driver.add(*(request(f"s{i}", [*shared, 60 + i, 50 + i], 14 + i, arrival=driver.clock) for i in range(3)))
    driver.add(*children("n", range(30, 49), 3, max_tokens=18, arrival=driver.clock))
    for _ in range(3):
        driver.step()
    driver.add(*(request(f"u{i}", [70 + i] * (9 + 12 * i), 20, arrival=driver.clock, priority=i % 2 - 1)
                 for i in range(4)))
    driver.run()


def second_round(driver: Driver) -> None:
    """The next turns of every conversation; the oldest prefixes have been evicted meanwhile if pages are scarce."""
    turns = [request(f"{name}+", [*one.prompt, *driver.tokens[name], 5, 6, 7], 6, arrival=driver.clock)
             for name, one in driver.requests.items()]
    driver.add(*turns)
    driver.run()


@pytest.mark.parametrize("groups", [FULL, FULL_AND_WINDOW], ids=["full", "full+window"])
@pytest.mark.parametrize("overlap", [0, 1], ids=["sync", "overlap"])
@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("policy", EVICTION_POLICIES)
@pytest.mark.parametrize("pool", ["roomy", "tight", "tight+host"])
def test_tokens_do_not_depend_on_the_schedule(pool, policy, chunked, overlap, groups):
    driver = Driver(pages=600 if pool == "roomy" else 26, host_pages=40 if pool == "tight+host" else 0, policy=policy,
                    chunked=chunked, budget=12 if chunked else MODEL_LEN, overlap=overlap, groups=groups,
                    max_num_seqs=6, max_model_len=MODEL_LEN)
    first_round(driver)
    second_round(driver)
    driver.check_outputs()

    moves, stats = driver.device.num_moves, driver.inner.cache.stats
    prompt_chunks = [sum(c.start < len(driver.requests[c.request_id].prompt) for c in plan.chunks)
                     for plan in driver.plans]
    split = {c.request_id for p in driver.plans for c in p.chunks if not c.num_logits}
    assert max(prompt_chunks) > 1 and stats.hit_tokens > 0
    assert bool(split) == chunked
    assert (driver.submitted_before_read > 0) == bool(overlap)
    assert (driver.holes > 0) == (groups is FULL_AND_WINDOW)
    if pool == "roomy":
        assert driver.inner.num_preemptions == 0 and stats.evictions == 0
        assert moves["copy hbm"] > 0
    else:
        assert driver.inner.num_preemptions > 0
        assert stats.evictions > 0
        assert (moves["demote"] > 0 and moves["promote"] + moves["fetch host"] > 0) == (pool == "tight+host")
        assert not overlap or driver.preemptions_while_in_flight > 0

"""Who runs when, how much is computed, and what each request is told."""

import pytest
from sched_driver import Driver, request, scheduled

from jaxkv.config import ConfigError, SchedConfig
from jaxkv.params import SamplingParams
from jaxkv.sched.scheduler import Scheduler
from jaxkv.types import Tier


def admitted(driver: Driver) -> list[str]:
    return [a.request_id for p in driver.plans for a in p.admits]


# ---- order

def test_first_come_first_served_within_priorities():
    driver = Driver(max_num_seqs=1)
    driver.add(request("late", [1] * 5, arrival=3.0), request("b", [2] * 5, arrival=1.0),
               request("c", [3] * 5, arrival=1.0), request("urgent", [4] * 5, arrival=9.0, priority=-1),
               request("idle", [5] * 5, arrival=0.0, priority=2))
    driver.run()
    assert admitted(driver) == ["urgent", "b", "c", "late", "idle"]
    driver.check_outputs()


def test_the_victim_is_last_in_priority_then_in_arrival_and_comes_back_first():
    driver = Driver(pages=16, page_size=4, max_model_len=64)
    driver.add(request("low", range(12), 30, priority=1, arrival=0.0), request("old", range(20, 32), 30, arrival=1.0),
               request("new", range(40, 52), 30, arrival=2.0), request("next", range(60, 72), 4, arrival=3.0))
    running = lambda: [s.request.id for s in driver.inner._roster.running]  # noqa: E731
    waiting = lambda: [s.request.id for s in driver.inner._roster.waiting]  # noqa: E731
    while not driver.inner.num_preemptions:
        driver.step()
    assert waiting()[-1] == "low"
    while driver.inner.num_preemptions < 2:
        driver.step()
        assert "old" in running() or "old" in driver.reasons
    assert "old" in running() and "low" not in running()
    driver.run()
    driver.check_outputs()
    assert [name for name in driver.reasons if name != "next"] == ["old", "new", "low"]


def test_nobody_is_preempted_to_admit():
    driver = Driver(pages=16)
    driver.add(request("low", range(40), 20, priority=5))
    driver.step()
    driver.add(request("urgent", range(50, 90), 20, priority=0))
    driver.run()
    assert driver.inner.num_preemptions == 0
    assert list(driver.reasons) == ["low", "urgent"]


# ---- budget

def test_a_long_prompt_does_not_stall_decodes():
    driver = Driver(budget=8, max_num_seqs=4)
    driver.add(*(request(f"d{i}", [i, 7], 12) for i in range(3)))
    driver.step()
    driver.add(request("long", range(10, 50), 2))
    chunks = []
    while "long" not in driver.reasons:
        plan = driver.step()
        chunks += [len(c.tokens) for c in plan.chunks if c.request_id == "long"]
        if "d0" not in driver.reasons:
            assert [len(c.tokens) for c in plan.chunks if c.request_id[0] == "d"] == [1, 1, 1]
    assert chunks[:8] == [5] * 8  # 8 minus three decodes
    driver.run()
    driver.check_outputs()


@pytest.mark.parametrize("chunked", [True, False])
def test_logits_only_where_a_prompt_ends(chunked):
    driver = Driver(budget=16 if chunked else 64, chunked=chunked)
    driver.add(request("a", range(40), 3))
    driver.run()
    assert [(c.start, len(c.tokens), c.num_logits) for p in driver.plans for c in p.chunks] == \
        ([(0, 16, 0), (16, 16, 0), (32, 8, 1)] if chunked else [(0, 40, 1)]) + [(40, 1, 1), (41, 1, 1)]


def test_whole_prompts_wait_for_a_budget_that_holds_them():
    driver = Driver(chunked=False, budget=64, max_num_seqs=4)
    driver.add(request("a", range(40), 3), request("b", range(50, 90), 3), request("c", range(10), 3))
    assert [c.request_id for c in driver.step().chunks] == ["a"]  # and c does not overtake b
    assert [c.request_id for c in driver.step().chunks] == ["a", "b", "c"]
    driver.run()
    driver.check_outputs()


def test_rows_are_sent_as_deltas():
    driver = Driver()
    driver.add(request("a", range(9), 12))
    driver.run()
    rows = [c.pages[0] for p in driver.plans for c in p.chunks]
    assert [(first, len(pages)) for first, pages in rows] == \
        [(0, 3), (3, 0), (3, 0), (3, 0), (3, 1), (4, 0), (4, 0), (4, 0), (4, 1), (5, 0), (5, 0), (5, 0)]


# ---- overlap

def test_tokens_on_the_device_are_minus_one_and_nothing_runs_past_max_tokens():
    driver = Driver(overlap=1)
    driver.add(request("a", range(5), 3))
    driver.run()
    assert [c.tokens for p in driver.plans for c in p.chunks] == [tuple(range(5)), (-1,), (-1,)]
    assert driver.submitted_before_read == 2
    driver.check_outputs()


def test_a_token_after_a_stop_id_is_discarded():
    driver = Driver(overlap=1)
    probe = request("probe", range(5), 8)
    driver.device.add(probe)
    stop = driver.device.reference(probe)[2]
    driver.add(request("a", range(5), 8, stop_ids=(stop,)))
    driver.run()
    assert len(driver.tokens["a"]) == 3 and driver.reasons["a"] == "stop"
    assert driver.events[-1].stop_token == stop
    assert scheduled(driver, "a") == 5 + 3  # the third decode was already submitted


def test_stop_ids_count_from_min_tokens_on():
    driver = Driver()
    probe = request("probe", range(5), 8)
    driver.device.add(probe)
    stops = tuple(driver.device.reference(probe)[:6])
    driver.add(request("a", range(5), 8, stop_ids=stops, params=SamplingParams(min_tokens=4)))
    driver.run()
    assert len(driver.tokens["a"]) == 4 and driver.reasons["a"] == "stop"


def test_an_id_can_be_used_again_while_its_tokens_are_in_flight():
    driver = Driver(overlap=1)
    driver.add(request("a", range(5), 8))
    driver.step()
    driver.abort("a")
    del driver.reasons["a"]
    driver.add(request("a", range(30, 37), 8))
    driver.run()
    driver.check_outputs()


# ---- what is computed

def test_a_turn_computes_only_what_is_new():
    driver = Driver()
    prompt = list(range(13))
    for turn in range(4):
        driver.add(request(f"t{turn}", prompt, 5))
        driver.run()
        prompt = [*prompt, *driver.tokens[f"t{turn}"], 50 + turn, 51 + turn]
    driver.check_outputs()
    # the last answer token was never computed; then 2 new ones; 4 answer tokens follow in single steps
    assert [scheduled(driver, f"t{i}") for i in range(4)] == [13 + 4, *[1 + 2 + 4] * 3]


def test_a_shared_prefix_is_computed_once_by_requests_that_arrive_together():
    driver = Driver(max_num_seqs=24, budget=256)
    driver.add(*(request(f"r{i}", [*range(32), 60 + i, 61 + i], 3) for i in range(24)))
    plan = driver.step()
    assert len(plan.chunks) == 24 and plan.num_tokens == 34 + 23 * 2
    driver.run()
    driver.check_outputs()


def test_coming_back_is_a_prefix_hit():
    driver = Driver(pages=16, host_pages=64)
    driver.add(request("a", range(20), 28), request("b", range(30, 50), 28))
    driver.run()
    driver.check_outputs()
    assert driver.inner.num_preemptions > 0
    assert any(m.src[0] is Tier.HOST for p in driver.plans for fetch in p.fetches for m in fetch.moves)
    assert scheduled(driver, "a") == 20 + 27
    assert scheduled(driver, "b") <= 20 + 27 + 2 * driver.inner.num_preemptions


# ---- prompt log-probabilities

@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("length", [1, 2, 30])
def test_prompt_logprobs_are_complete_though_the_prompt_is_cached(overlap, length):
    driver = Driver(overlap=overlap, budget=8)
    driver.add(request("warm", range(30)))
    driver.run()
    driver.add(request("a", range(length), 3, params=SamplingParams(prompt_logprobs=1)))
    driver.run()
    driver.check_outputs()
    assert scheduled(driver, "a") == length + 2
    reported = [x for e in driver.events for x in e.prompt_logprobs]
    assert [(x.rank, x.token_id) for x in reported] == [(i, i) for i in range(1, length)]


@pytest.mark.parametrize("overlap", [0, 1])
def test_prompt_logprobs_come_once_through_preemptions(overlap):
    driver = Driver(overlap=overlap, budget=6, pages=16, max_num_seqs=4)
    driver.add(*(request(f"r{i}", range(10 * i, 10 * i + 4), 40) for i in range(2)))
    for _ in range(3):
        driver.step()
    driver.add(request("a", range(40, 80), 3, params=SamplingParams(prompt_logprobs=1)))
    midway = 0
    while driver.scheduler.has_work:
        before = {s.request.id: s.num_scheduled for s in driver.inner._roster.running}
        driver.step()
        midway += 0 < before.get("a", 0) < 40 and all(s.request.id != "a" for s in driver.inner._roster.running)
    driver.run()
    driver.check_outputs()
    assert midway > 0
    reported = [x for e in driver.events for x in e.prompt_logprobs]
    assert [(x.rank, x.token_id) for x in reported] == [(i - 40, i) for i in range(41, 80)]


# ---- bad input

def test_what_cannot_be_served_is_refused():
    driver = Driver(max_model_len=64)
    driver.add(request("a", range(60), 4))
    for bad, match in ((request("a", [1]), "already in use"), (request("b", []), "prompt"),
                       (request("b", range(60), 5), "max_model_len"), (request("b", [1], 0), "max_tokens")):
        with pytest.raises(ValueError, match=match):
            driver.inner.add(bad)
    assert not driver.inner.abort("nobody") and not driver.inner.finish("nobody", "stop")
    driver.run()
    driver.check_outputs()


def test_settings_that_could_deadlock_are_refused():
    cache = Driver(pages=16).inner.cache
    with pytest.raises(ConfigError, match=r"16 pages.*needs 17"):
        Scheduler(SchedConfig(), cache, 65)
    with pytest.raises(ConfigError, match="max_num_batched_tokens"):
        Scheduler(SchedConfig(4, 63, enable_chunked_prefill=False), cache, 64)


def test_an_engine_that_cannot_go_on_says_so(monkeypatch):
    driver = Driver()
    driver.add(request("a", range(5), 4))
    monkeypatch.setattr(driver.inner.cache, "grow", lambda seq, num_tokens: False)
    with pytest.raises(RuntimeError, match="'a' does not fit"):
        driver.step()


def test_finish_with_a_reason_of_the_caller():
    driver = Driver()
    driver.add(request("a", range(5), 30), request("b", range(9), 4))
    driver.step()
    assert driver.scheduler.finish("a", "stop")
    driver.reasons["a"] = "stop"
    driver.run()
    assert len(driver.tokens["b"]) == 4 and len(driver.tokens["a"]) == 1

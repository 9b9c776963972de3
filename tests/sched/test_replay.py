"""Recorded inputs, replayed through a fresh scheduler and cache, give the identical plans."""

import json

import pytest
from sched_driver import FULL_AND_WINDOW, Driver, children, request

from jaxkv.params import SamplingParams, Structured
from jaxkv.sched.replay import Recorder, replay
from jaxkv.sched.scheduler import Scheduler
from jaxkv.types import Request, StepPlan

FULL_OF_FEATURES = SamplingParams(n=2, temperature=0.5, top_k=3, logit_bias=((3, 1.5), (4, -2.0)), logprobs=2, seed=7,
                                  stop=("x", "yz"), stop_token_ids=(1, 2), min_tokens=2, presence_penalty=0.5,
                                  structured=Structured("choice", '["a", "b"]'))


@pytest.mark.parametrize("overlap", [0, 1])
def test_replay_is_identical(overlap):
    driver = Driver(pages=17, host_pages=20, overlap=overlap, budget=24, groups=FULL_AND_WINDOW)
    driver.add(*children("n", range(18), 3, max_tokens=20, params=FULL_OF_FEATURES, stop_ids=(1, 2)),
               request("p", range(30, 50), 30, params=SamplingParams(prompt_logprobs=2)))
    for _ in range(4):
        driver.step()
    driver.add(*(request(f"r{i}", [*range(9), i], 25, arrival=2.5 + i, priority=i % 3 - 1) for i in range(6)))
    for _ in range(6):
        driver.step()
    driver.abort("n.1")
    driver.abort("r1")
    driver.run()
    driver.check_outputs()
    assert driver.inner.num_preemptions > 0 and any(p.moves for p in driver.plans)

    def fresh() -> list[StepPlan]:
        return replay(events, driver.settings.scheduler())

    events = driver.log
    assert fresh() == driver.plans
    events = [json.loads(line) for line in map(json.dumps, driver.log)]
    assert [p.to_dict() for p in fresh()] == [p.to_dict() for p in driver.plans]


def test_pages_written_at_the_end_are_replayed():
    driver = Driver(pages=60, host_pages=20, disk=True)
    driver.add(request("a", range(30), 8))
    driver.run()
    while (plan := driver.scheduler.plan_saves(4, driver.clock)) is not None:
        driver.plans.append(plan)
        driver.scheduler.commit(plan, driver.device.apply(plan), driver.clock)
    driver.add(request("b", range(30), 8))
    driver.run()
    driver.check_outputs()
    assert sum(bool(plan.saves) and not plan.chunks for plan in driver.plans) > 1
    assert driver.replayed([json.loads(line) for line in map(json.dumps, driver.log)]) == driver.plans


def test_every_call_that_changes_a_scheduler_is_recorded():
    calls = {name for name, value in vars(Scheduler).items() if name[0] != "_" and not isinstance(value, property)}
    assert calls - set(vars(Recorder)) == {"check"}


def test_values_survive_json():
    one = request("a", range(5), 3, params=FULL_OF_FEATURES, stop_ids=(1,), arrival=0.1, namespace="x", priority=-2)
    assert Request.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    driver = Driver(pages=16, host_pages=9)
    driver.add(one, request("b", range(40), 20), request("c", range(40, 60), 40))
    driver.run()
    driver.check_outputs()
    assert {m.dst is None for p in driver.plans for m in p.moves} == {False, True}
    assert [StepPlan.from_dict(json.loads(json.dumps(p.to_dict()))) for p in driver.plans] == driver.plans


def test_an_unknown_event_is_refused():
    with pytest.raises(ValueError, match="event"):
        replay([{"event": "dance"}], Driver().inner)

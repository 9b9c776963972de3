"""Host work per step: plan and commit of running decodes."""

from time import process_time, sleep
from timeit import timeit

import pytest
from sched_driver import FULL_AND_WINDOW, Driver, request

from jaxkv.types import StepResult


@pytest.mark.parametrize(("running", "limit"), [(1, 40e-6), (64, 400e-6)])
def test_host_work_per_step(running, limit):
    """The best of many short runs of CPU time: other work on the machine must not fail the test."""
    driver = Driver(pages=8192, page_size=16, max_num_seqs=64, budget=2048, max_model_len=1200, groups=FULL_AND_WINDOW)
    scheduler = driver.inner
    for i in range(running):
        scheduler.add(request(f"r{i}", [i] * 20, 1100))
    result = StepResult(((5,),) * running)

    def step() -> None:
        plan = scheduler.plan(0.0)
        scheduler.commit(plan, result, 0.0)

    step()
    best = 1.0
    for attempt in range(60):
        best = min(best, timeit(step, timer=process_time, number=16) / 16)
        if best > limit and attempt > 10:
            sleep(0.1)
    print(f"{running} running: {best * 1e6:.0f} us per step")
    assert scheduler.num_running == running
    assert best < limit

"""Host work per step: plan and commit of running decodes. What it takes in time, ``bench.engine`` measures."""

import sys

import pytest
from sched_driver import FULL_AND_WINDOW, Driver, request

from jaxkv.types import StepResult

STEPS = 16  # one new page for every sequence


@pytest.mark.parametrize(("running", "limit"), [(1, 100), (64, 3000)])
def test_host_work_per_step(running, limit):
    """Calls of functions, Python's and C's: the same on every machine."""
    driver = Driver(pages=8192, page_size=16, max_num_seqs=64, budget=2048, max_model_len=1200, groups=FULL_AND_WINDOW)
    scheduler = driver.inner
    for i in range(running):
        scheduler.add(request(f"r{i}", [i] * 20, 1100))
    result, calls = StepResult(((5,),) * running), 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event in ("call", "c_call")

    def step() -> None:
        plan = scheduler.plan(0.0)
        scheduler.commit(plan, result, 0.0)

    step()
    sys.setprofile(count)
    try:
        for _ in range(STEPS):
            step()
    finally:
        sys.setprofile(None)
    assert scheduler.num_running == running
    assert calls / STEPS < limit

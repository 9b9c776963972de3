"""Sequences that need their last token are never planned while it is on the device; the others are not held up."""

import json
import random

import pytest
from sched_driver import Driver, request

from jaxkv.types import Request


@pytest.mark.parametrize("pages", [400, 17], ids=["roomy", "preempted"])
@pytest.mark.parametrize("overlap", [0, 1, 3])
def test_outputs_are_exact(overlap, pages):
    draw = random.Random(overlap)
    driver = Driver(pages=pages, overlap=overlap, budget=24)
    driver.add(*(request(f"r{i}", range(draw.randrange(1, 20)), draw.randrange(1, 25), needs_last_token=i % 2 == 0,
                         arrival=float(i), stop_ids=(draw.randrange(97),)) for i in range(12)))
    driver.run()
    driver.check_outputs()
    assert driver.inner.num_preemptions > 0 or pages == 400
    log = [json.loads(line) for line in map(json.dumps, driver.log)]
    assert driver.replayed(log) == driver.plans


def test_only_they_wait():
    driver = Driver(overlap=1)
    driver.add(request("free", range(5), 20), request("held", range(7), 20, needs_last_token=True))
    driver.run()
    driver.check_outputs()
    planned = [[chunk.request_id for chunk in plan.chunks] for plan in driver.plans]
    assert all("free" in names for names in planned[:20])
    assert all(("held" in names) == (i % 2 == 0) for i, names in enumerate(planned[:20])), "every other step"


def test_alone_it_runs_without_overlap():
    driver = Driver(overlap=1)
    driver.add(request("held", range(7), 5, needs_last_token=True))
    driver.run()
    driver.check_outputs()
    assert len(driver.plans) == 5 and driver.submitted_before_read == 0


def test_the_flag_survives_json():
    one = request("held", range(3), needs_last_token=True)
    assert Request.from_dict(json.loads(json.dumps(one.to_dict()))) == one

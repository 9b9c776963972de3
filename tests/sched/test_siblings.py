"""The children of one request compute its prompt once."""

import pytest
from sched_driver import FULL_AND_WINDOW, Driver, children, request, scheduled

from jaxkv.params import SamplingParams
from jaxkv.sched.siblings import Siblings
from jaxkv.sequence import Sequence


def test_whom_the_others_wait_for():
    first, second = (Sequence(one, list(one.prompt)) for one in children("p", range(8), 2))
    siblings = Siblings()
    siblings.add(second.request)
    assert not siblings.wait(second), "child 0 has not come"
    siblings.add(first.request)
    assert siblings.wait(second) and not siblings.wait(first)
    siblings.prompt_ends(first.request)
    assert siblings.wait(second), "the plan that computes the prompt is not made yet"
    siblings.begin()
    assert not siblings.wait(second)
    siblings.add(first.request)
    siblings.gone(second.request)
    assert siblings.wait(second)
    siblings.gone(first.request)
    assert not siblings.wait(second)


def test_who_runs_the_whole_prompt_anyway_waits_for_nobody():
    first, second = children("p", range(8), 2, params=SamplingParams(prompt_logprobs=1))
    siblings = Siblings()
    siblings.add(first)
    assert not siblings.wait(Sequence(second, list(second.prompt)))


@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("groups", [None, FULL_AND_WINDOW], ids=["full", "window"])
@pytest.mark.parametrize(("length", "budget"), [(16, 64), (18, 64), (18, 8), (18, 17)])
def test_children_compute_the_prompt_once(overlap, groups, length, budget):
    driver = Driver(overlap=overlap, budget=budget, **({"groups": groups} if groups else {}))
    driver.add(*children("p", range(length), 4, max_tokens=5))
    driver.run()
    driver.check_outputs()
    assert scheduled(driver, "p.0") == length + 4
    assert [scheduled(driver, f"p.{i}") for i in (1, 2, 3)] == [1 + 4] * 3
    assert [driver.cached[f"p.{i}"] for i in range(4)] == [0, *[length - 1] * 3]


def test_siblings_do_not_wait_for_a_first_child_that_is_gone():
    driver = Driver(budget=8)
    driver.add(*children("p", range(40), 3))
    driver.step()
    driver.abort("p.0")
    driver.run()
    driver.check_outputs()
    driver = Driver(budget=8)
    _, *others = children("p", range(40), 3)
    driver.add(*others)  # the first never comes
    driver.run()
    driver.check_outputs()


def test_a_waiting_sibling_does_not_block_others():
    driver = Driver()
    driver.add(*children("p", range(20), 3), request("other", range(50, 60)))
    assert [c.request_id for c in driver.step().chunks] == ["p.0", "other"]
    assert {c.request_id for c in driver.step().chunks} == {"p.0", "other", "p.1", "p.2"}

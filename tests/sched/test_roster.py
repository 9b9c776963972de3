"""Where every sequence is."""

import pytest
from sched_driver import Driver, request


def test_lowest_free_slot_first():
    driver = Driver(max_num_seqs=3)
    driver.add(*(request(f"r{i}", [i] * 5, max_tokens=2 + i) for i in range(5)))
    driver.run()
    assert [(a.request_id, a.slot) for p in driver.plans for a in p.admits] == \
        [("r0", 0), ("r1", 1), ("r2", 2), ("r3", 0), ("r4", 1)]


def test_check_finds_a_sequence_that_is_nowhere_and_a_lost_slot():
    driver = Driver(max_num_seqs=2)
    driver.add(*(request(f"r{i}", [i] * 5) for i in range(3)))
    driver.step()
    roster = driver.inner._roster
    assert [len(roster.waiting), len(roster.running), len(roster.sequences)] == [1, 2, 3]
    roster.check()
    lost = roster.waiting.pop()
    with pytest.raises(AssertionError, match="nowhere"):
        roster.check()
    roster.waiting.append(lost)
    roster.slots.append(0)
    with pytest.raises(AssertionError, match="slots"):
        roster.check()

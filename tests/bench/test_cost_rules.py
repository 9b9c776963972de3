"""Measured costs against fixed rules in a virtual clock: a small cut of the sweep, and that the choice is what made it."""

from dataclasses import replace

import pytest

from bench.cost_rules import MACHINES, PAGE_SIZE, Case, play

H100, CPU = MACHINES
FIXED = ("always", "never", "host only", ">= 512")


def case(machine: str, host: float, disk: float = 0.0, later: float | None = None, **fields) -> Case:
    """Rates as shares of the one at which bringing a token takes as long as computing it."""
    m = MACHINES[machine]
    even = m.page_bytes / PAGE_SIZE / m.per_token
    return Case(machine, even * host, even * disk, later and (even * later, 0.0), conversations=80,
                host_tokens=40960 if disk else 131072, **fields)


@pytest.mark.parametrize("machine,host,disk", [
    (H100, 0.01, 0), (H100, 1.0, 0), (H100, 10.0, 0), (CPU, 0.1, 0), (CPU, 1.0, 0), (CPU, 100.0, 0), (H100, 16.0, 0.01),
    (CPU, 16.0, 3.0)])
def test_never_much_worse_than_the_best_fixed_rule(machine, host, disk):
    one = case(machine, host, disk)
    best = min(play(one, rule)["sum"] for rule in FIXED)
    assert play(one, "measured")["sum"] <= 1.05 * best


def test_pages_are_brought_over_a_fast_link_and_computed_behind_a_slow_one():
    fast, slow = play(case(H100, 16.0), "measured"), play(case(H100, 0.1), "measured")
    always, never = play(case(H100, 16.0), "always"), play(case(H100, 0.1), "never")
    assert fast["loads"] > 0.8 * always["loads"] > 20 and fast["recomputed_tokens"] < 0.02 * fast["host_hit_tokens"]
    assert slow["demotions"] < 0.02 * fast["demotions"] and slow["host_hit_tokens"] < 0.02 * fast["host_hit_tokens"]
    assert fast["hit"] > never["hit"] + 0.1 > slow["hit"]


def test_what_a_slow_disk_has_is_computed():
    slow, fast = (play(replace(case(H100, 16.0, disk), host_tokens=8192), "measured") for disk in (0.01, 10.0))
    assert slow["recomputed_tokens"] > 10_000 and slow["disk_hit_tokens"] < 100
    assert fast["disk_hit_tokens"] > 10_000 and fast["recomputed_tokens"] < 0.1 * fast["disk_hit_tokens"]


@pytest.mark.parametrize("before,after", [(20.0, 0.3), (1.0, 30.0)])
def test_a_link_that_changes_is_followed(before, after):
    """Every fixed rule is wrong in one half; so would be what was learnt in the first half only."""
    one = case(H100, before, later=after)
    assert play(one, "measured")["sum"] < min(play(one, rule)["sum"] for rule in ("always", "never"))


def test_the_virtual_clock_repeats():
    assert play(case(CPU, 1.0), "measured") == play(case(CPU, 1.0), "measured")

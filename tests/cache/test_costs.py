"""Measured costs: fits recover what they are told, choices follow from them, and a link that changed is tried again."""

import random
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxkv.cache.costs import TRAINED, TRIALS, Costs
from jaxkv.cache.fits import Fates, Fit
from jaxkv.types import Tier

PAGE = 16
HOST, DISK = Tier.HOST, Tier.DISK


def trained(base=5e-3, token=4e-5, position=1e-9, host=1e-4, disk=1e-3, latency=1e-4, move=0.0, seed=0) -> Costs:
    """Costs that have seen steps, fetches of ``host`` and ``disk`` seconds a page, and moves of ``move`` seconds a page."""
    costs, rng = Costs(PAGE), random.Random(seed)
    for _ in range(60):
        start, n = rng.randrange(8000), rng.randrange(64, 2048)
        positions = n * (2 * start + n - 1) // 2
        costs.stepped(n, positions, 0, base + token * n + position * positions)
    for pages in (1, 64, 7, 30, 64, 12):
        costs.fetched(HOST, pages, latency + host * pages)
        costs.fetched(DISK, pages, latency + disk * pages)
        for _ in range(2):
            costs.stepped(512, 512 * 511 // 2, pages, base + token * 512 + position * 512 * 511 / 2 + move * pages)
    return costs


@given(st.floats(0, 1e-2), st.floats(1e-6, 1e-3), st.floats(0, 1e-7), st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_the_fit_of_steps_recovers_what_made_them(base, token, position, seed):
    costs = trained(base, token, position, seed=seed)
    for start, end in ((0, 2048), (4000, 6048), (7000, 9000)):
        want = token * (end - start) + position * (end - start) * (start + end - 1) / 2
        assert costs.prefill_seconds(start, end) == pytest.approx(want, rel=0.1, abs=0.3 * base)


@given(st.floats(0, 1e-2), st.floats(1e-6, 1e-1))
@settings(max_examples=25, deadline=None)
def test_the_fit_of_a_link_recovers_latency_and_rate(latency, page):
    costs = trained(host=page, latency=latency)
    for pages in (16, 64, 640):
        want = page * pages + latency * -(-pages // 64)
        assert costs.fetch_seconds({HOST: pages, DISK: 0}) == pytest.approx(want, rel=0.05)


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100), st.floats(-10, 10)), min_size=1, max_size=40))
@settings(max_examples=50, deadline=None)
def test_no_term_is_ever_negative(points):
    fit = Fit(3, 8.0)
    for x1, x2, y in points:
        fit.add(y, x1, x2, 1.0)
        assert min(fit.terms) >= 0.0


def test_a_link_that_changes_is_followed():
    costs = trained(host=1e-4)
    for n in (32, 64, 5, 64, 20, 64, 64, 10) * 3:
        costs.fetched(HOST, n, 1e-4 + 5e-3 * n)
    assert costs.fetch_seconds({HOST: 64}) == pytest.approx(64 * 5e-3, rel=0.2)


def test_slow_moves_are_not_taken_for_slow_steps():
    costs = trained(move=0.0)
    before = costs.prefill_seconds(0, 2048)
    for _ in range(10):
        costs.stepped(2048, 2048 * 2047 // 2, 128, 10.0)
    assert costs.prefill_seconds(0, 2048) == pytest.approx(before)
    assert costs.worth_moving(HOST, 0, 2048, held=100) < 2048 // PAGE


# ---- bring or compute

RUNS = st.lists(st.tuples(st.sampled_from([HOST, DISK]), st.integers(1, 80)), max_size=6)


@given(st.integers(0, 100), RUNS, st.integers(1, 500), st.floats(1e-5, 2e-2), st.floats(1e-5, 2e-2))
@settings(max_examples=100, deadline=None)
def test_best_cut_is_the_quickest_of_all_cuts(first, runs, rest, host, disk):
    costs = trained(host=host, disk=disk)
    start = first * PAGE
    length = start + sum(pages for _, pages in runs) * PAGE + rest

    def seconds(cut: int) -> float:
        pages = {tier: sum(n for t, n in runs[:cut] if t is tier) for tier in (HOST, DISK)}
        return costs.fetch_seconds(pages) + costs.prefill_seconds(start + sum(pages.values()) * PAGE, length)

    costs._ways[HOST].budget = costs._ways[DISK].budget = 0.0  # no trials
    best = min(range(len(runs) + 1), key=lambda cut: (seconds(cut), -cut))
    assert costs.best_cut(start, runs, length) == [0, *accumulate(n for _, n in runs)][best]


def test_everything_is_brought_until_prefill_was_measured():
    costs = Costs(PAGE)
    assert costs.best_cut(0, [(HOST, 5), (DISK, 9)], 300) == 14
    assert costs.worth_moving(DISK, 160, 320, held=0) == 10


def test_one_page_is_fetched_of_what_was_never_measured():
    costs = Costs(PAGE)
    costs.stepped(1000, 500_000, 0, 0.1)
    assert costs.best_cut(0, [(HOST, 50)], 900) == 1
    assert costs.best_cut(0, [(HOST, 50)], 900, busy=[HOST]) == 0
    costs.fetched(HOST, 1, 1e-5)
    assert costs.best_cut(0, [(HOST, 50), (DISK, 3)], 900) == 51


def test_a_refused_link_is_tried_again_for_a_small_share_of_the_time():
    costs = trained(host=0.5, latency=0.0)
    costs._ways[HOST].budget = 0.0
    tried, clock = 0, 0.0
    while clock < 1000.0:
        tried += costs.best_cut(0, [(HOST, 50)], 900)
        costs.stepped(1000, 500_000, 0, 0.1)
        clock += 0.1
    assert 0 < tried * 0.5 <= TRIALS * clock + 0.5
    for _ in range(12):
        costs.fetched(HOST, 1, 1e-4)
    assert costs.best_cut(0, [(HOST, 50)], 900) == 50


# ---- move down or drop

@pytest.mark.parametrize("move,all_of_it", [(1e-5, True), (1e-2, False)])
def test_pages_move_down_if_that_costs_less_than_it_saves(move, all_of_it):
    costs = trained(move=move)  # a page takes 0.64 ms to compute, 0.1 ms to bring
    costs._ways[HOST].budget = 0.0
    assert costs.worth_moving(HOST, 0, 640, held=1000) == 40 * all_of_it


def test_pages_that_nobody_asks_for_again_are_not_worth_it():
    costs = trained(move=1e-4)
    assert costs.worth_moving(HOST, 0, 640, held=500) == 40
    for _ in range(200):
        costs.lost(50, held=500)
    costs._ways[HOST].budget = 0.0
    assert costs.worth_moving(HOST, 0, 640, held=0) == 0
    for _ in range(200):
        costs.used(0, 50 * PAGE, held=500)
    assert costs.worth_moving(HOST, 0, 640, held=500) == 40


def test_a_slow_disk_gets_nothing_though_the_host_does():
    costs = trained(host=1e-5, disk=0.1, move=1e-5)
    costs._ways[DISK].budget = 0.0
    assert costs.worth_moving(HOST, 0, 640, held=500) == 40
    assert costs.worth_moving(DISK, 0, 640, held=500) == 0


def test_the_first_moves_are_few_until_steps_do_not_notice_them():
    costs = Costs(PAGE)
    for _ in range(TRAINED):
        assert costs.worth_moving(HOST, 0, 6400, held=0) == (0 if costs.measured else 400)
        costs.stepped(1000, 500_000, 0, 0.1)
    moved = []
    while len(moved) < 20 and (not moved or moved[-1] < 400):
        moved.append(costs.worth_moving(HOST, 0, 6400, held=0))
        costs.stepped(1000, 500_000, moved[-1], 0.1)
    assert moved == [1, 4, 16, 64, 400]


def test_shares_of_fates():
    fates = Fates()
    assert fates.share_used(1000) == 0.5 and fates.saved(7.0) == 7.0
    for _ in range(100):
        fates.used(30, 0.3, held=100)
        fates.lost(10, held=100)
    assert fates.share_used(0) == pytest.approx(0.75, abs=0.05)
    assert fates.saved(7.0) == pytest.approx(0.01)

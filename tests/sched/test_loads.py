"""Cold prefixes come back while others run: nobody waits for pages of somebody else, and pages that fail are computed."""

from dataclasses import replace

import pytest
from sched_driver import FULL, FULL_AND_WINDOW, Driver, request

from jaxkv.cache.hit import Use, find_hit
from jaxkv.types import Tier

LONG = {name: [base + i % 30 for i in range(40)] for name, base in (("a", 0), ("b", 100), ("c", 200), ("d", 300))}


def crowd(driver: Driver) -> None:
    """Four conversations that do not fit together, then another sequence that decodes."""
    for name, prompt in LONG.items():
        driver.add(request(name, prompt, 4, arrival=driver.clock))
        driver.run()
    driver.add(request("busy", [400], 60, arrival=driver.clock))
    for _ in range(3):
        driver.step()


def chat(driver: Driver) -> None:
    """Their second turns while the other one decodes."""
    crowd(driver)
    for name, prompt in LONG.items():
        driver.add(request(f"{name}+", [*prompt, *driver.tokens[name], 7], 3, arrival=driver.clock))
    driver.run()
    driver.check_outputs()


@pytest.mark.parametrize("groups", [FULL, FULL_AND_WINDOW], ids=["full", "full+window"])
@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("tier", ["host", "disk", "host+disk"])
def test_decodes_go_on_while_pages_come(tier, overlap, groups):
    pages, host_pages = {"host": (40, 60), "disk": (40, 0), "host+disk": (30, 14)}[tier]
    driver = Driver(pages=pages, host_pages=host_pages, disk="disk" in tier, overlap=overlap, groups=groups,
                    max_model_len=96, delay=3)
    chat(driver)
    moves, stats = driver.device.num_moves, driver.inner.cache.stats
    assert stats.loads > 0 and not stats.failed_loads and driver.decodes_while_fetching > 3
    assert (moves["fetch host"] > 0) == ("host" in tier)
    assert (moves["fetch disk"] > 0) == (moves["save"] > 0) == (stats.disk_hit_tokens > 0) == ("disk" in tier)
    # while "busy" runs, no step brings pages from below itself
    busy = [plan for plan in driver.plans if any(c.request_id == "busy" for c in plan.chunks)]
    assert not [m for plan in busy[1:] for m in plan.moves if m.src[0] is not Tier.HBM and m.dst and m.last]
    # and "busy" has a token in every plan with chunks from its first to its last
    first, last = (next(i for i in order if busy[0 if order.step == 1 else -1] is driver.plans[i])
                   for order in (range(len(driver.plans)), range(len(driver.plans) - 1, -1, -1)))
    assert all(plan in busy for plan in driver.plans[first:last])
    assert sum(driver.cached[f"{name}+"] for name in LONG) > 100


@pytest.mark.parametrize("tier", ["host", "disk", "host+disk"])
def test_each_prompt_knows_from_which_tier_its_tokens_came(tier):
    pages, host_pages = {"host": (30, 60), "disk": (30, 0), "host+disk": (30, 14)}[tier]
    driver = Driver(pages=pages, host_pages=host_pages, disk="disk" in tier, max_model_len=96)
    for turn in range(3):
        for name, prompt in LONG.items():
            before = driver.device.num_moves.copy()
            driver.add(request(f"{name}{turn}", [*prompt, turn], 3, arrival=driver.clock))
            driver.run()
            moved = {kind: count - before[kind] for kind, count in driver.device.num_moves.items()}
            host, disk = driver.cached_below[f"{name}{turn}"]
            assert disk == 4 * moved["fetch disk"], "pages of 4 tokens"
            assert 0 <= host - 4 * (moved["fetch host"] + moved["promote"]) <= 3 * moved["copy host"]
            assert host + disk <= driver.cached[f"{name}{turn}"] <= 40
    came = [sum(below[i] for below in driver.cached_below.values()) for i in (0, 1)]
    assert [n > 0 for n in came] == ["host" in tier, "disk" in tier]
    stats = driver.inner.cache.stats
    assert came == [stats.host_hit_tokens, stats.disk_hit_tokens]
    assert sum(driver.cached.values()) == stats.hit_tokens


@pytest.mark.parametrize("overlap", [0, 1])
def test_who_comes_together_does_not_wait_for_the_pages_of_the_other(overlap):
    driver = Driver(pages=30, host_pages=60, max_model_len=96, delay=3, overlap=overlap)
    for name, prompt in LONG.items():
        driver.add(request(name, prompt, 4, arrival=driver.clock))
        driver.run()
    before = len(driver.plans)
    driver.add(request("a+", [*LONG["a"], 7], 3), request("new", [450, 451], 3), request("b+", [*LONG["b"], 7], 3))
    driver.run()
    driver.check_outputs()
    plans = driver.plans[before:]
    assert [c.request_id for c in plans[0].chunks] == ["new"] and driver.cached["a+"] == driver.cached["b+"] == 40
    assert not [m for plan in plans if len(plan.chunks) > 1 for m in plan.moves if m.src[0] is Tier.HOST and m.dst]


@pytest.mark.parametrize("groups", [FULL, FULL_AND_WINDOW], ids=["full", "full+window"])
@pytest.mark.parametrize("overlap", [0, 1])
@pytest.mark.parametrize("cut", [41, 18], ids=["a leaf", "within a run"])
def test_a_part_of_a_page_comes_from_the_host_while_others_run(cut, overlap, groups):
    driver = Driver(pages=24, host_pages=80, max_model_len=96, overlap=overlap, groups=groups)
    crowd(driver)
    copies = driver.inner.cache.stats.partial_copies
    driver.add(request("a+", [*LONG["a"], *driver.tokens["a"]][:cut] + [7, 8], 3, arrival=driver.clock))
    driver.run()
    driver.check_outputs()
    assert driver.cached["a+"] == cut and cut % 4 and driver.cached_below["a+"] == (cut, 0)
    assert driver.inner.cache.stats.partial_copies == copies + 1
    assert not [m for plan in driver.plans if len(plan.chunks) > 1 for m in plan.moves if m.src[0] is Tier.HOST and m.dst]


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_pages_that_fail_are_computed(tier):
    driver = Driver(pages=40, host_pages=60 * (tier == "host"), disk=tier == "disk", max_model_len=96, failures=1)
    chat(driver)
    stats = driver.inner.cache.stats
    assert stats.failed_loads > 0 and driver.device.num_moves[f"fetch {tier}"] == 0
    assert driver.cached["a+"] < 40


@pytest.mark.parametrize("aborted", [False, True])
def test_a_load_is_given_up_when_its_link_becomes_slow(aborted):
    driver = Driver(pages=150, host_pages=300, max_model_len=400, budget=256, fetch_pages=8, delay=0)
    prompts = {name: [base + i % 30 for i in range(300)] for name, base in (("a", 0), ("b", 100), ("c", 200))}
    for _ in range(4):
        for name, prompt in prompts.items():
            driver.add(request(f"{name}{driver.clock}", [*prompt, int(driver.clock)], 2, arrival=driver.clock))
            driver.run()
    stats = driver.inner.cache.stats
    assert stats.loads > 2 and not stats.cancelled_loads
    driver.add(request("a", [*prompts["a"], 999], 2, arrival=driver.clock))
    driver.step()
    assert driver.inner.cache.loading
    driver.settings = replace(driver.settings, delay=30)  # of what is not on its way
    if aborted:
        driver.abort("a")
    driver.run()
    driver.add(request("again", [*prompts["a"], 998], 2, arrival=driver.clock))
    driver.run()
    driver.check_outputs()
    assert stats.cancelled_loads == 1 and not stats.failed_loads
    assert aborted or driver.cached["a"] < 300


def test_an_abort_leaves_nothing_behind():
    driver = Driver(pages=40, host_pages=60, max_model_len=96, delay=5)
    for name, prompt in LONG.items():
        driver.add(request(name, prompt, 4, arrival=driver.clock))
        driver.run()
    driver.add(request("busy", [400], 30, arrival=driver.clock), request("a+", [*LONG["a"], 9], 3, arrival=driver.clock + 1))
    while not driver.inner.cache.loading:
        driver.step()
    driver.abort("a+")
    driver.run()
    assert driver.inner.cache.available(0) == 40 and driver.reasons["busy"] == "length"


def test_two_sequences_wait_for_the_same_pages():
    driver = Driver(pages=40, host_pages=60, max_model_len=96, delay=4)
    for name, prompt in LONG.items():
        driver.add(request(name, prompt, 4, arrival=driver.clock))
        driver.run()
    before = driver.device.num_moves["fetch host"] + driver.device.num_moves["promote"]
    driver.add(request("busy", [400], 30, arrival=driver.clock))
    driver.step()
    driver.add(*(request(f"a{i}", [*LONG["a"], 90 + i], 3, arrival=driver.clock) for i in range(3)))
    driver.run()
    driver.check_outputs()
    assert driver.device.num_moves["fetch host"] + driver.device.num_moves["promote"] - before <= 11
    assert [driver.cached[f"a{i}"] for i in range(3)] == [40, 40, 40]


def test_another_process_finds_the_disk_warm():
    one = Driver(pages=40, disk=True, max_model_len=96)
    chat(one)
    two = Driver(pages=40, disk=True, max_model_len=96)
    two.device.disk, two.device._prefixes, two.device._roots = one.device.disk, one.device._prefixes, one.device._roots
    two.add(request("a", [*LONG["a"], 5], 3))
    two.run()
    two.check_outputs()
    assert two.cached["a"] == 40
    two.add(request("other tenant", LONG["a"], 3, namespace="x"))
    two.run()
    assert two.cached["other tenant"] == 0


def test_the_host_tier_can_be_lost():
    driver = Driver(pages=40, host_pages=60, max_model_len=96, delay=3)
    for name, prompt in LONG.items():
        driver.add(request(name, prompt, 4, arrival=driver.clock))
        driver.run()
    driver.add(request("busy", [400], 30, arrival=driver.clock))
    driver.step()
    driver.add(*(request(f"{name}+", [*prompt, 9], 3, arrival=driver.clock) for name, prompt in LONG.items()))
    while not driver.inner.cache.loading:
        driver.step()
    driver.scheduler.lose_host_tier()
    driver.check()
    demoted = driver.device.num_moves["demote"]
    driver.run()
    driver.check_outputs()
    assert driver.device.num_moves["demote"] == demoted > 0 and not driver.device.host[0]
    assert driver.replayed(driver.log) == driver.plans


def test_a_lost_host_tier_leaves_nothing_behind():
    """Prefixes that are wholly in the host tier hang below the root."""
    driver = Driver(pages=24, host_pages=80, max_model_len=96)
    for name, prompt in LONG.items():
        driver.add(request(name, prompt, 4, arrival=driver.clock))
        driver.run()
    nodes = driver.inner.cache.trie.nodes
    assert any(node.tier is Tier.HOST and not node.start for node in nodes())
    driver.scheduler.lose_host_tier()
    driver.check()
    assert all(node.tier is Tier.HBM for node in nodes())
    driver.add(request("a+", [*LONG["a"], 7], 3, arrival=driver.clock))
    driver.run()
    driver.check_outputs()
    assert not driver.device.host[0]


@pytest.mark.parametrize("page_seconds, brought", [(0.010, 0), (0.0001, 1)])
def test_a_part_of_a_page_is_worth_the_tokens_that_it_saves(page_seconds, brought, monkeypatch):
    """One token that matches takes 1 ms to compute."""
    monkeypatch.setattr("jaxkv.sched.scheduler.MEASURED_TOKENS", 10**9)  # the costs are those below
    driver = Driver(pages=40, host_pages=200, max_model_len=256, page_size=16, budget=256, delay=3)
    base, one = range(1000, 1100), 49
    driver.add(request("a", base, 4))
    driver.run()
    for i in range(6):
        driver.add(request(f"f{i}", range(5000 + 300 * i, 5150 + 300 * i), 4, arrival=driver.clock))
        driver.run()
    driver.add(request("a2", base[:one - 1], 1, arrival=driver.clock))  # the whole pages are in HBM again
    driver.run()
    driver.add(request("busy", [9], 60, arrival=driver.clock))
    for _ in range(3):
        driver.step()
    cache = driver.inner.cache
    for i in range(40):
        n, start = 64 + i * 37 % 150, i * 53 % 90
        cache.costs.stepped(n, n * start + n * n // 2, 0, 0.001 * n + 0.002)
        cache.costs.fetched(Tier.HOST, 1 + i % 3, page_seconds * (1 + 0.05 * (i % 3)))
    loads = cache.stats.loads
    driver.add(request("b", [*base[:one], 7, 8], 3, arrival=driver.clock))
    driver.run()
    driver.check_outputs()
    assert cache.stats.loads - loads == brought and driver.cached["b"] == one - 1 + brought


def test_what_is_kept_of_a_window_is_enough_without_the_part_of_a_page():
    """The part in the host tier is not kept in HBM, so that the start without it must be."""
    driver = Driver(pages=40, host_pages=80, groups=FULL_AND_WINDOW)
    prompt = list(range(100, 126))
    driver.add(request("a", prompt, 1))
    driver.run()
    cache, store = driver.inner.cache, driver.inner.cache.store
    while not any(node.tier is Tier.HOST for node in cache.trie.nodes()):
        cache._tiering._evict(1)
    driver.add(request("b", [*prompt, 7, 7], 4, arrival=driver.clock))
    seq = driver.inner._roster.sequences["b"]
    part = find_hit(store, seq, -5, Use.COMING)
    assert part.pages == 6 and part.source.tokens == 2 and cache.keep(seq, -5)
    while store.window_pool(1).idle:
        cache._tiering._reclaim(1)
    assert find_hit(store, seq, -5, Use.HOT).pages == 6

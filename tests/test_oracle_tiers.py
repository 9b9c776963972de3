"""Pages that come from the disk, or fail to, change nothing in the tokens: the oracle of test_oracle.py below the host tier."""

import threading
import time

import pytest

pytest.importorskip("xxhash", reason="the disk tier needs xxhash")

from jaxkv.cache.costs import Costs
from jaxkv.runtime.disk import DiskStore
from jaxkv.types import Tier
from tests.engine_harness import disk_store, engine, executor, greedy, run_all
from tests.test_oracle import assert_greedy, follow_ups, requests


def play(run, windows: bool) -> dict:
    first = run_all(run, requests(1))
    assert run.executor.tiers.disk.flush(30)
    second = run_all(run, follow_ups(first, 2))
    mismatches = [0, 0]
    assert_greedy(windows, first | second, mismatches)
    assert mismatches[1] > 150 and mismatches[0] <= 0.001 * mismatches[1]
    return first | second


@pytest.mark.parametrize("overlap", [False, True], ids=["sync", "overlap"])
@pytest.mark.parametrize("host_pages", [0, 12], ids=["disk", "host and disk"])
@pytest.mark.parametrize("devices, windows", [(1, False), (1, True), (2, False), (4, True)])
def test_pages_from_disk(devices, windows, host_pages, overlap, highest_precision, tmp_path):
    run = executor(windows, devices)
    with_disk = engine(run, pages=20, host_pages=host_pages, overlap=overlap, disk=disk_store(tmp_path, run, refresh_s=0.01))
    play(with_disk, windows)
    moved, stats = run.tiers.bytes_moved, with_disk.scheduler.cache.stats
    assert stats.saves > 0 and moved[Tier.DISK, Tier.HBM] > 0 and stats.disk_hit_tokens > 0
    assert (moved[Tier.HBM, Tier.HOST] > 0) == bool(host_pages)
    with_disk.close()

    again = engine(run, pages=60, disk=disk_store(tmp_path, run))  # the next process
    results = run_all(again, requests(1))
    mismatches = [0, 0]
    assert_greedy(windows, results, mismatches)
    assert again.scheduler.cache.stats.disk_hit_tokens > 0 and run.tiers.bytes_moved[Tier.DISK, Tier.HBM] > 0
    assert [e for e in again.events if e[0] == "arrived"] and not [e for e in again.events if e[0] == "failed"]
    again.close()


def test_two_engines_share_a_disk(highest_precision, tmp_path):
    run = executor(False)
    theirs, mine = (disk_store(tmp_path, run, refresh_s=0.01) for _ in range(2))
    prompts = requests(1)
    writer = engine(run, pages=60, disk=theirs)
    run_all(writer, prompts)
    while plan := writer.scheduler.plan_saves(1000, 0.0):
        writer.scheduler.commit(plan, writer.executor.submit(plan).read(), 0.0)
    assert theirs.flush(30)
    deadline = time.monotonic() + 10
    while mine.stats().pages < theirs.stats().pages and time.monotonic() < deadline:
        time.sleep(0.02)
    reader = engine(run, pages=60, disk=mine)
    results = run_all(reader, prompts)
    assert_greedy(False, results, [0, 0])
    cached = {name: max(d.num_cached_tokens for d in r.deltas) for name, r in results.items()}
    assert all(cached[name] >= (len(prompt) - 1) // 4 * 4 for name, (prompt, _) in prompts.items() if name in cached), cached
    for store in (theirs, mine):
        store.close()


@pytest.mark.parametrize("writers, readers", [(4, 1), (1, 4), (4, 2)])
def test_any_mesh_reads_what_another_wrote(writers, readers, highest_precision, tmp_path):
    """On 4 devices each of the model's 2 KV heads stands twice in a page; on disk once."""
    writer = executor(False, writers)
    one = engine(writer, pages=160, disk=disk_store(tmp_path, writer))
    run_all(one, requests(1))
    one.close()
    reader = executor(False, readers)
    other = engine(reader, pages=160, disk=disk_store(tmp_path, reader))
    mismatches = [0, 0]
    assert_greedy(False, run_all(other, requests(1)), mismatches)
    assert mismatches[1] > 50 and mismatches[0] <= 0.001 * mismatches[1]
    assert other.scheduler.cache.stats.disk_hit_tokens > 50 and not other.scheduler.cache.stats.failed_loads
    other.close()


@pytest.mark.parametrize("fault", ["corrupt", "late"])
def test_pages_that_do_not_come_are_computed(fault, highest_precision, tmp_path, monkeypatch):
    monkeypatch.setattr(Costs, "measured", False)  # always bring: on a busy machine computing may look quicker
    run = executor(False)
    store = disk_store(tmp_path, run)
    with_disk = engine(run, pages=20, disk=store)
    first = run_all(with_disk, requests(1))
    store.flush(30)
    if fault == "late":
        monkeypatch.setattr("jaxkv.runtime.fetches.LIMIT_S", -1.0)
    else:
        for path in tmp_path.rglob("*"):
            if path.is_file() and path.stat().st_size > 8192:
                raw = bytearray(path.read_bytes())
                raw[4096 + 300::97] = bytes(b ^ 0xFF for b in raw[4096 + 300::97])  # the header stays
                path.write_bytes(raw)
    second = run_all(with_disk, follow_ups(first, 2))
    mismatches = [0, 0]
    assert_greedy(False, first | second, mismatches)
    stats = with_disk.scheduler.cache.stats
    assert stats.failed_loads > 0 and [e for e in with_disk.events if e[0] == "failed"]
    assert fault == "late" or store.stats().corrupt > 0
    with_disk.close()


def test_pages_under_way_are_let_go_when_nobody_waits_for_them(highest_precision, tmp_path, monkeypatch):
    """An abort while the disk is slow, and no request after it."""
    monkeypatch.setattr(Costs, "measured", False)  # as above
    run = executor(False)
    store = disk_store(tmp_path, run)
    with_disk = engine(run, pages=40, disk=store)
    prompts = [[(7 * i + 11 * j) % 60 + 1 for i in range(50)] for j in range(6)]
    for prompt in prompts:
        run_all(with_disk, {"r": (prompt, greedy(3))})
    assert store.flush(30)
    read, go = DiskStore._read, threading.Event()
    monkeypatch.setattr(DiskStore, "_read", lambda *args: go.wait(10) and read(*args))
    with_disk.add_request("gone", prompts[0], greedy(3))
    with_disk.step()
    with_disk.abort("gone")
    for _ in range(3):
        assert with_disk.has_work and not with_disk.step()
    assert with_disk.metrics.device.pages_active > 0
    go.set()
    while with_disk.has_work:
        assert not with_disk.step()
    assert with_disk.metrics.device.pages_active == 0 and run.tiers.fetches.host_bytes_held() == 0
    with_disk.check()
    with_disk.close()


def test_host_memory_that_runs_out_costs_the_tier_only(highest_precision, monkeypatch, caplog):
    run = executor(False)
    with_host = engine(run, pages=20, host_pages=40)
    to_host, calls = run.tiers._to_host, []

    def fails_later(gathered, count):
        calls.append(count)
        if len(calls) > 3:
            raise MemoryError("pinned allocation failed")
        return to_host(gathered, count)

    monkeypatch.setattr(run.tiers, "_to_host", fails_later)
    first = run_all(with_host, requests(1))
    second = run_all(with_host, follow_ups(first, 2))
    mismatches = [0, 0]
    assert_greedy(False, first | second, mismatches)
    assert len(calls) >= 4 and not with_host.scheduler.cache.has_host_tier and not run.tiers.host
    assert caplog.text.count("going on without the host KV tier") == len(calls) - 3
    assert with_host.metrics.host.pages_used == 0

"""The tier benchmark on a small random model: its workloads, its watch over the event log, one run with each kind of tier."""

from collections import deque
from types import SimpleNamespace

import pytest

from bench.tiers import WORKLOADS, Watched, Workload, fresh, measure, options, summary, table
from bench.workloads import conversations, questions
from jaxkv.types import PageMove, StepPlan, Tier
from tests.engine_harness import disk_store, engine, executor

SMALL = Workload(lambda vocab, seed: conversations(6, 3, 20, 6, 4, 0.002, vocab, seed), 6 * 44, 500.0)


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)
def test_workloads_have_the_footprint_they_say(workload):
    jobs = workload.jobs(4096, 1)
    assert jobs == workload.jobs(4096, 1) and jobs != workload.jobs(4096, 2)
    starts = {tuple(job.prompt[:512]): len(job.prompt) for job in jobs if job.after is None}
    if any(job.after for job in jobs):
        tokens = sum(len(job.prompt) + job.max_new for job in jobs)
    else:  # one prefix for each start
        tokens = sum(n - 32 for n in starts.values()) + sum(32 + job.max_new for job in jobs)
    assert tokens == workload.tokens and len(starts) == 16


def test_questions_and_conversations():
    jobs = questions(8, 2, 10, 3, 5, 100, 0)
    assert {len(job.prompt) for job in jobs} == {13} and len({tuple(job.prompt[:10]) for job in jobs}) == 2
    jobs = conversations(2, 3, 10, 4, 5, 0.5, 100, 0)
    assert [(job.id, job.after, len(job.prompt)) for job in jobs[:3]] == [
        ("0.0", None, 10), ("0.1", "0.0", 4), ("0.2", "0.1", 4)]
    assert all(job.think > 0 for job in jobs)


def test_the_watch_counts_who_is_held_up():
    log = iter([[("submit", 1), ("fetch", 7)], [], [("submit", 2), ("read", 1)], [("arrived", 7), ("read", 2)], []])
    fake = SimpleNamespace(events=deque(), add_request=None, executor=SimpleNamespace(submit=lambda plan: plan.id),
                           scheduler=SimpleNamespace(num_running=1), step=lambda: fake.events.extend(next(log)))
    watched = Watched(fake)
    for _ in range(5):
        watched.step()
    assert (watched.while_flying, watched.held_up, watched.flying) == (3, 1, set())
    bring = PageMove(0, (Tier.HOST, 1), (Tier.HBM, 2), last=True)
    assert [watched.submit(StepPlan(i, moves=(bring,), chunks=(None,) * i)) for i in (1, 2)] == [1, 2]
    assert watched.shared == 1


def test_options():
    assert options("host int8", 1, 2, "")["kv_codec"] == "int8" and options("host", 1, 2, "")["host_kv_memory"] == 2
    assert options("recompute", 1, 2, "")["host_kv_memory"] == options("disk", 1, 2, "d")["host_kv_memory"] == 0


def test_cells_in_small(tmp_path):
    run = executor(False)
    cells = {"recompute": engine(run, pages=20), "host": engine(run, pages=20, host_pages=64),
             "disk": engine(run, pages=20, disk=disk_store(tmp_path, run, refresh_s=0.01))}
    runs = {}
    for name, built in cells.items():
        run.tiers.host_bytes, run.tiers.disk = 66 * 4096, built.scheduler.cache.disk
        run.tiers.fetches.disk = run.tiers.disk
        runs[name] = [measure(fresh(built, f"{name} {seed}"), SMALL, seed) for seed in range(2)]
    rows = [{"workload": "small", **summary(name, runs[name], runs["recompute"])} for name in cells]
    for row in rows:
        assert row["same_tokens"] == 1.0 and row["held_up"] == row["shared"] == 0 and 0 < row["ttft_p50_s"] <= row["ttft_p90_s"]
    shares = [row["hit_share"] for row in rows]
    assert shares[0]["host"] == shares[0]["disk"] == shares[1]["disk"] == shares[2]["host"] == 0 < shares[1]["host"]
    assert rows[0]["gain_p50"] == 1.0 and "| small | host |" in table({"rows": rows, "decode": {}})

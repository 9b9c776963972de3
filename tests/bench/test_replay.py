"""The replay of traces: what it counts, what it is compared with, and a frozen table."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.replay import main, replay
from bench.replay_optimum import optimum
from bench.replay_speed import touches_per_second
from bench.replay_trace import BLOCK, SYNTHETIC, Line, distinct_blocks, load, mark_last, synthetic
from jaxkv.cache.eviction import POLICIES


def lines(*paths):
    return mark_last(Line(float(i), "s", tuple(path), BLOCK * len(path)) for i, path in enumerate(paths))


def plain_lru(trace, capacity):
    """An independent LRU over blocks: a dict in order of use, the deepest block of a request used first."""
    held, hits = {}, []
    for line in trace:
        blocks = line.blocks[:capacity]
        hits.append(next((n for n, b in enumerate(blocks) if b not in held), len(blocks)))
        for block in blocks:
            held.pop(block, None)
        while len(held) + len(blocks) > capacity:
            del held[next(iter(held))]
        held.update(dict.fromkeys(reversed(blocks)))
    return hits


@pytest.mark.parametrize("name", SYNTHETIC)
@pytest.mark.parametrize("share", [0.02, 0.2])
def test_lru_is_lru_and_nothing_beats_the_optimum(name, share):
    trace = synthetic(name, 300)
    capacity = int(share * distinct_blocks(trace))
    assert replay(trace, "lru", capacity).hits == plain_lru(trace, capacity)
    best = sum(optimum(trace, capacity))
    assert best >= max(sum(replay(trace, policy, capacity).hits) for policy in ("lru", "lfu", "arc"))


def test_tiers_are_one_cache_as_far_as_recompute_goes():
    trace = synthetic("chats", 300)
    both = replay(trace, "lru", 60, 200)
    assert sum(both.hits) == pytest.approx(sum(replay(trace, "lru", 260).hits), rel=0.02)
    assert 0 < both.host_hits < sum(both.hits) and both.moved > both.host_hits


def test_the_optimum_keeps_what_is_needed_next():
    trace = lines([0, 1], [2, 3], [0, 1], [2, 3])
    assert optimum(trace, 4) == [0, 0, 2, 2] and optimum(trace, 3) == [0, 0, 1, 1]


def test_a_prompt_larger_than_the_cache_leaves_its_head():
    trace = lines(range(10), range(10))
    for policy in ("lru", "arc", "lfu"):
        assert replay(trace, policy, 4).hits == optimum(trace, 4) == [0, 4]


def test_only_full_blocks_count(tmp_path):
    path = tmp_path / "t.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for t in (0, 1500):
            file.write(json.dumps({"timestamp": t, "input_length": 2 * BLOCK + 9, "hash_ids": [7, 8, 9], "session": 4}) + "\n")
    first, last = load(path)
    assert first == Line(0.0, "4", (7, 8), 2 * BLOCK + 9) and last == Line(1.5, "4", (7, 8), 2 * BLOCK + 9, True)


def test_the_command(tmp_path, capsys):
    out, figure = tmp_path / "out.json", tmp_path / "out.png"
    assert main(["synthetic:agents", "--policy", "lru,arc", "--capacity", "0.1", "--host-capacity", "0,0.1", "--session-hints",
                 "--json", str(out), "--plot", str(figure)]) == 0
    assert "ORACLE" in capsys.readouterr().out and figure.stat().st_size > 1000
    rows = json.loads(out.read_text())["rows"]
    assert [(r["policy"], r["host_capacity"]) for r in rows] == [(p, h) for h in (0, 0.1) for p in ("lru", "arc", "optimum")]
    assert all(0 <= r["hbm_hit_rate"] <= r["token_hit_rate"] <= 1 and 0 <= r["prefill_saved"] <= 1 for r in rows)
    assert all((r["bytes_moved"] > 0) == (r["host_capacity"] > 0) for r in rows if r["policy"] != "optimum")


@pytest.mark.parametrize("args", [["missing.jsonl"], ["synthetic:x"], ["synthetic:agents", "--policy", "best"],
                                  ["synthetic:agents", "--capacity", "2"]])
def test_bad_arguments_end_the_command(args, capsys):
    with pytest.raises(SystemExit):
        main(args)
    assert "error" in capsys.readouterr().err


def test_a_bad_line_is_named(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"timestamp": 0, "input_length": 512, "hash_ids": [1]}\n{"timestamp": 0}\n')
    with pytest.raises(ValueError, match="t.jsonl:2"):
        load(path)


def test_the_replay_starts_without_jax():
    code = "import sys, bench.replay; print([m for m in ('jax', 'numpy', 'flax') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# ---- the frozen table: block ids and token hit rates in % that must not change unnoticed

FROZEN = Path(__file__).with_name("frozen_trace.jsonl.gz")
SHARES = (0.02, 0.1, 0.3)
TABLE = {
    "lfu": (15.54, 52.35, 64.87),
    "lru": (10.09, 50.37, 64.95),
    "lfu-plain": (17.19, 31.09, 44.34),
    "lfu-decayed": (10.17, 51.37, 65.13),
    "arc": (14.27, 52.12, 64.56),
    "2q": (14.09, 50.88, 64.97),
    "gdsf": (11.19, 50.8, 64.91),
    "optimum": (34.39, 65.27, 67.02),
}


@pytest.mark.parametrize("policy", TABLE)
def test_frozen_table(policy):
    trace = load(FROZEN)
    total, blocks = sum(line.tokens for line in trace), distinct_blocks(trace)
    for share, rate in zip(SHARES, TABLE[policy]):
        capacity = int(share * blocks)
        hits = optimum(trace, capacity) if policy == "optimum" else replay(trace, policy, capacity).hits
        assert 100 * BLOCK * sum(hits) / total == pytest.approx(rate, abs=0.05), f"{policy} at {share}"


def test_the_table_has_every_policy():
    assert TABLE.keys() == {*POLICIES, "optimum"}


def test_session_ends_help_on_the_frozen_trace():
    trace = load(FROZEN)
    for share in SHARES:
        capacity = int(share * distinct_blocks(trace))
        for policy in ("lfu", "lru"):
            assert sum(replay(trace, policy, capacity, hints=True).hits) > sum(replay(trace, policy, capacity).hits)


def test_speed_counts_block_touches():
    assert touches_per_second("lfu", nodes=2000, requests=50) > 0

"""The engine's one oracle: whatever the pool, policy, chunking, overlap, mesh and groups, greedy float32 tokens are those
of a dense forward. A token may differ only where the dense top-2 gap is below 1e-4; then the comparison goes on along the
engine's tokens, and more than 0.1 % of such positions fail. Every cell proves that its mechanism happened.
"""

import re
from itertools import pairwise

import numpy as np
import pytest

from jaxkv.params import SamplingParams, Structured
from jaxkv.runtime.tokenizer import load_tokenizer
from jaxkv.types import Tier
from tests.engine_harness import POOL, engine, executor, greedy, model, run_all
from tests.oracle import DenseOracle
from tests.text_models import write_characters

NEAR_TIE = 1e-4
POOLS = {"roomy": (POOL, 0), "tight": (20, 0), "tight and host": (20, 40)}


def requests(seed: int) -> dict:
    """Prompts that share prefixes of many lengths, most not at a page border, and one with two children."""
    rng = np.random.default_rng(seed)
    base = rng.integers(1, 67, 40).tolist()
    out = {}
    for i in range(9):
        shared, own = int(rng.integers(0, 23)), int(rng.integers(1, 18))
        out[f"r{i}"] = (base[:shared] + rng.integers(1, 67, own).tolist(), greedy(int(rng.integers(12, 30))))
    out["twins"] = (base[:17], greedy(8, n=2))
    return out


def follow_ups(results: dict, seed: int) -> dict:
    """The next turn of every conversation: prompt, answer and a few new tokens."""
    rng = np.random.default_rng(seed)
    return {f"{name}+": (r.prompt + r.tokens + rng.integers(1, 67, 3).tolist(), greedy(5))
            for name, r in results.items() if len(r.prompt) + len(r.tokens) < 50}


def assert_greedy(windows: bool, results: dict, counts: list[int]) -> None:
    spec, params, _ = model(windows)
    oracle = DenseOracle(spec, params)
    for name, r in results.items():
        expected, gaps = oracle.teacher_forced(r.prompt, r.tokens)
        wrong = expected != np.array(r.tokens)
        assert (gaps[wrong] < NEAR_TIE).all(), f"{name}: {r.tokens} but dense {expected.tolist()}, gaps {gaps}"
        counts[0] += int(wrong.sum())
        counts[1] += len(r.tokens)


@pytest.mark.parametrize("overlap", [False, True], ids=["sync", "overlap"])
@pytest.mark.parametrize("chunked", [False, True], ids=["whole", "chunked"])
@pytest.mark.parametrize("policy", ["lfu", "lru", "arc"])
@pytest.mark.parametrize("pool", list(POOLS))
@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("windows", [False, True], ids=["one group", "full and window"])
def test_matrix(pool, policy, chunked, overlap, devices, windows, highest_precision):
    pages, host_pages = POOLS[pool]
    run = engine(executor(windows, devices), pages=pages, host_pages=host_pages, policy=policy,
                 budget=12 if chunked else 64, chunked=chunked, overlap=overlap)
    chunks: dict[str, int] = {}
    submit = run.executor.submit

    def counting_submit(plan, masks):
        for c in plan.chunks:
            chunks[c.request_id] = chunks.get(c.request_id, 0) + (c.num_logits == 0)
        return submit(plan, masks)

    run.executor.submit = counting_submit
    try:
        first = run_all(run, requests(1))
        second = run_all(run, follow_ups(first, 2))
    finally:
        del run.executor.submit
    mismatches = [0, 0]
    assert_greedy(windows, first | second, mismatches)
    assert mismatches[1] > 150 and mismatches[0] <= 0.001 * mismatches[1]

    m, stats = run.metrics, run.scheduler.cache.stats
    assert stats.partial_copies > 0 and stats.hit_tokens > 0
    assert (max(chunks.values()) > 0) == chunked, "prompts split over steps"
    ahead = any(a[0] == b[0] == "submit" for a, b in pairwise(run.events))
    assert ahead == overlap, "submit(n + 1) before read(n)"
    if pool == "roomy":
        assert m.preemptions == stats.evictions == 0
        answers = sum(len(r.tokens) - 1 for r in first.values())
        reused = sum(d.num_cached_tokens for r in second.values() for d in r.deltas[:1])
        assert reused >= answers, "a follow-up turn computes only what is new"
    else:
        assert m.preemptions > 0
        assert stats.evictions > 0 or stats.demotions > 0
    if host_pages:
        moved = run.executor.tiers.bytes_moved
        assert m.evictions["demoted"] > 0 and m.promotions > 0
        assert moved[Tier.HBM, Tier.HOST] > 0 and moved[Tier.HOST, Tier.HBM] > 0


@pytest.mark.parametrize("devices, overlap, host_pages", [(1, True, 0), (2, False, 16), (4, True, 16)])
def test_a_window_group_that_loses_pages(devices, overlap, host_pages, highest_precision):
    """The window group has fewer pages than the full one: it gives up those that nobody sees, which shortens later hits."""
    run = engine(executor(True, devices), pages=(100, 26), host_pages=host_pages, overlap=overlap)
    first = run_all(run, requests(1))
    second = run_all(run, follow_ups(first, 2))
    mismatches = [0, 0]
    assert_greedy(True, first | second, mismatches)
    assert mismatches[1] > 150 and mismatches[0] <= 0.001 * mismatches[1]
    stats = run.scheduler.cache.stats
    assert stats.holes > 0 and stats.hit_tokens > 0


def test_structured_output_on_a_mesh(tmp_path, highest_precision):
    """Masks are whole on every device, logits may not be."""
    tokenizer = load_tokenizer(write_characters(tmp_path))
    run = engine(executor(True, 2), tokenizer=tokenizer, eos_ids=(0,))
    choice = SamplingParams(temperature=1.5, max_tokens=20, n=2, structured=Structured("regex", "[a-f]{2,6}-[0-9]{1,9}"))
    free = requests(1)
    results = run_all(run, {"word": ([5, 9, 2], choice), **free})
    for name in ("word/0", "word/1"):
        assert re.fullmatch(choice.structured.value, "".join(d.text for d in results.pop(name).deltas))
    assert_greedy(True, results, [0, 0])
    run.grammars.close()

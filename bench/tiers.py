"""What the tiers below HBM give: TTFT of conversations and of questions on documents whose KV is four times the HBM pool.

    python -m bench.tiers                    the built-in model
    python -m bench.tiers --model DIR        another model, with random token ids

The same requests, arrival times and think times for each cell, cells in turn, ``--repeat`` times, each time with new tokens
and an empty cache:

    recompute   no tier below HBM: what HBM has dropped is computed again
    host        a host tier that holds all; "host int8" with the KV codec
    disk        a disk tier that holds all, no host tier

TTFT counts from the arrival, over all requests, those that nobody could have helped (first of their prefix) included.
Nobody may wait for pages of others, and the run ends with an AssertionError if one does: the event log must show a step
submitted or read in every iteration in which some sequence ran while pages were under way (``held_up``), and no plan may bring
host pages right before a step that has chunks of other requests (``shared``).
Decode: 4 streams, and a prefix of 512 tokens that comes back every 4 steps, from HBM ("still") or from the tier ("moving").
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from bench.engine import drive, percentile
from bench.report import add_json, earlier, write
from bench.workloads import Job, conversations, questions
from jaxkv import SamplingParams
from jaxkv.cache.controller import CacheController
from jaxkv.cli import engine_config
from jaxkv.device.batch import step_sizes
from jaxkv.device.models import spec_from_config
from jaxkv.device.spec import kv_groups
from jaxkv.runtime.engine import Engine
from jaxkv.runtime.memory import FETCH_PAGES, STAGING_PAGES
from jaxkv.runtime.outputs import Delta
from jaxkv.runtime.startup import build_engine
from jaxkv.runtime.weights import find_model, read_config, resolve_dtype
from jaxkv.sched.scheduler import Scheduler
from jaxkv.types import StepPlan, Tier

SHARE = 4  # footprint over HBM pool
MAX_LEN = 2048
PAGE = 16
CELLS = ("recompute", "host", "host int8", "disk")
STREAMS, PREFIX, EVERY, HITS = 4, 512, 4, 48


class Workload(NamedTuple):
    jobs: Callable[[int, int], list[Job]]  # of vocabulary and seed
    tokens: int  # distinct ones, answers included
    rate: float  # arrivals per second of the jobs that come after no other


WORKLOADS = {
    "multi-turn": Workload(lambda vocab, seed: conversations(16, 8, 1024, 96, 32, 3.0, vocab, seed),
                           16 * (1024 + 7 * 96 + 8 * 32), 16 / 3.0),
    "shared prefix": Workload(lambda vocab, seed: questions(96, 16, 1536, 32, 32, vocab, seed), 16 * 1536 + 96 * 64, 4.0),
}


class Watched:
    """Stands in for an engine in ``drive``; follows its event log and its plans."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._submit = engine, engine.executor.submit
        self.add_request = engine.add_request
        self.flying: set[int] = set()  # fetches
        self.busy_s = 0.0
        self.while_flying = self.held_up = self.shared = 0  # iterations, iterations, plans

    @property
    def has_work(self) -> bool:
        return self._engine.has_work

    def submit(self, plan: StepPlan, *masks: Any) -> Any:
        brings = any(m.src[0] is Tier.HOST and m.dst and m.dst[0] is Tier.HBM for m in plan.moves)
        self.shared += brings and len(plan.chunks) > 1
        return self._submit(plan, *masks)

    def step(self) -> list[Delta]:
        engine, watching = self._engine, self._engine.scheduler.num_running > 0 and bool(self.flying)
        engine.events.clear()
        start = time.perf_counter()
        deltas = engine.step()
        self.busy_s += time.perf_counter() - start
        self.while_flying += watching
        self.held_up += watching and not any(kind in ("submit", "read") for kind, _ in engine.events)
        for kind, number in engine.events:
            if kind == "fetch":
                self.flying.add(number)
            elif kind in ("arrived", "failed"):
                self.flying.discard(number)
        return deltas


def options(cell: str, pool: int, size: int, folder: str) -> dict[str, Any]:
    """Engine options of a cell; bytes of the HBM pool and of the tier below, more on disk, where all runs share it."""
    below: dict[str, Any] = {"host_kv_memory": 0}
    if cell.startswith("host"):
        below = {"host_kv_memory": size, "kv_codec": cell.removeprefix("host").strip() or "exact"}
    elif cell == "disk":
        below |= {"disk_kv_path": folder, "disk_kv_memory": 16 * size}
    return {"skip_tokenizer_init": True, "max_model_len": MAX_LEN, "max_num_seqs": 8, "max_num_batched_tokens": 512,
            "page_size": PAGE, "kv_cache_memory": pool, **below}


def fresh(engine: Engine, salt: str) -> Engine:
    """An engine with an empty cache on the executables of ``engine``; pages on disk under another ``salt`` are not found."""
    run, old, cache = engine.executor, engine.scheduler.cache, engine.config.cache
    run.tiers.clear()
    controller = CacheController(old.groups, old.page_size, old.num_pages, old.num_host_pages, cache.eviction_policy, salt,
                                 disk=run.tiers.disk, fetch_pages=FETCH_PAGES)
    scheduler = Scheduler(engine.config.sched, controller, engine.max_model_len, step_sizes=step_sizes(run.shapes))
    return Engine(engine.config, scheduler, run, model_name=engine.model_name, max_model_len=engine.max_model_len,
                  vocab_size=engine.vocab_size, capacity=engine.capacity)


def measure(engine: Engine, workload: Workload, seed: int) -> dict[str, Any]:
    """One run of a workload on an engine with an empty cache; raises AssertionError if somebody waited for pages of others."""
    watched = Watched(engine)
    engine.executor.submit = watched.submit  # type: ignore[method-assign]
    wall, clock = drive(watched, workload.jobs(engine.vocab_size, seed), workload.rate, seed)
    del engine.executor.submit
    engine.check()
    assert not watched.held_up and not watched.shared, f"{watched.held_up} held up, {watched.shared} shared"
    m, ttft = engine.metrics, [times[0] - clock.arrival[i] for i, times in clock.times.items()]
    return {"ttft_p50_s": percentile(ttft, 0.5), "ttft_p90_s": percentile(ttft, 0.9), "ttft_mean_s": statistics.mean(ttft),
            "busy": watched.busy_s / wall, "wall_s": wall, "prompt_tokens": m.prompt_tokens, "hit_tokens": dict(m.hit_tokens),
            "loads": m.loads, "failed_loads": m.failed_loads, "cancelled_loads": m.cancelled_loads,
            "recomputed_tokens": m.recomputed_tokens, "page_waits": m.page_waits, "page_wait_s": m.page_wait_seconds,
            "preemptions": m.preemptions, "bytes_moved": dict(m.bytes_moved), "steps": m.steps,
            "iterations_while_fetching": watched.while_flying, "held_up": watched.held_up, "shared": watched.shared,
            "tokens": clock.tokens}


def decode_rate(engine: Engine, prefixes: int, seed: int) -> float:
    """Tokens per second of the streams while ``HITS`` requests for one token come, one every ``EVERY`` steps, on ``prefixes``
    in turn, each of which was computed once before."""
    rng = random.Random(f"decode {prefixes} {seed}")
    ids = lambda n: [rng.randrange(300, engine.vocab_size) for _ in range(n)]  # noqa: E731
    one = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
    prompts = [ids(PREFIX + 1) for _ in range(prefixes)]
    for i, prompt in enumerate(prompts):
        engine.add_request(f"w{i}", prompt, one)
        while engine.has_work:
            engine.step()
    for i in range(STREAMS):
        engine.add_request(f"s{i}", ids(64), SamplingParams(temperature=0.0, max_tokens=MAX_LEN - 64, ignore_eos=True))
    while engine.metrics.generation_tokens < prefixes + 16 * STREAMS:
        engine.step()
    steps = tokens = hits = 0
    start = time.perf_counter()
    while hits < HITS:
        if steps % EVERY == 0 and steps < HITS * EVERY:
            engine.add_request(f"h{steps}", prompts[steps // EVERY % prefixes], one)
        steps += 1
        for delta in engine.step():
            if delta.request_id.startswith("h"):
                hits += 1
            else:
                tokens += len(delta.token_ids)
    seconds = time.perf_counter() - start
    for i in range(STREAMS):
        engine.abort(f"s{i}")
    while engine.has_work:
        engine.step()
    return tokens / seconds


def decode_rates(engine: Engine, repeat: int) -> dict[str, Any]:
    """Decode throughput while pages of others stay and while they move, by turns; [tokens/s] each."""
    pool = min(engine.capacity.num_pages) * engine.config.cache.page_size
    sets = {"still": 2, "moving": 2 * pool // PREFIX}
    rates: dict[str, list[float]] = {name: [] for name in sets}
    moved = 0
    for number in range(repeat):
        for name, prefixes in sets.items():
            cell = fresh(engine, f"decode {name} {number}")
            rates[name].append(decode_rate(cell, prefixes, number))
            moved += cell.metrics.loads if name == "moving" else 0
    return {**rates, "loads": moved, "ratio": statistics.median(rates["moving"]) / statistics.median(rates["still"])}


def summary(cell: str, runs: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the runs of a cell. ``gain``: median over the runs of recompute's median TTFT over the cell's."""
    same = [(a == b) for run, other in zip(runs, base) for i, tokens in run["tokens"].items()
            for a, b in zip(tokens, other["tokens"][i])]
    middle = {key: statistics.median(run[key] for run in runs) for key, value in runs[0].items()
              if isinstance(value, (int, float))}
    gains = {f"gain_{q}": statistics.median(other[f"ttft_{q}_s"] / run[f"ttft_{q}_s"] for run, other in zip(runs, base))
             for q in ("p50", "p90")}
    prompts = sum(run["prompt_tokens"] for run in runs)
    hits = {tier: sum(run["hit_tokens"][tier] for run in runs) / prompts for tier in runs[0]["hit_tokens"]}
    return {"cell": cell, **middle, **gains, "hit_share": hits, "same_tokens": statistics.mean(same),
            "ttft_p50_runs_s": [run["ttft_p50_s"] for run in runs]}


def table(report: dict[str, Any]) -> str:
    head = ("workload", "cell", "TTFT p50 ms", "p90", "gain p50", "gain p90", "hits HBM/host/disk %", "loads", "waits, mean ms",
            "recomputed", "busy", "decode still/moving tok/s", "same tokens")
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "--:|" * (len(head) - 2)]
    for r in report["rows"]:
        decode = report["decode"].get(r["cell"])
        rates = [f"{statistics.median(decode[k]):.0f}" for k in ("still", "moving")] if decode else ["-"]
        lines.append("| " + " | ".join((
            r["workload"], r["cell"], f"{1e3 * r['ttft_p50_s']:.1f}", f"{1e3 * r['ttft_p90_s']:.1f}", f"{r['gain_p50']:.2f}x",
            f"{r['gain_p90']:.2f}x", "/".join(f"{100 * x:.0f}" for x in r["hit_share"].values()), f"{r['loads']:.0f}",
            f"{r['page_waits']:.0f}, {1e3 * r['page_wait_s'] / max(1, r['page_waits']):.1f}", f"{r['recomputed_tokens']:.0f}",
            f"{r['busy']:.0%}", "/".join(rates), f"{r['same_tokens']:.2%}")) + " |")
    return "\n".join(lines)


def build(model: str | None, cells: list[str], tokens: int, folder: str) -> dict[str, Engine]:
    """Engines whose pool holds 1 / ``SHARE`` of ``tokens`` and whose tier below, if any, holds them all and a tenth more."""
    loaded = read_config(find_model(model))
    dtype = resolve_dtype("auto", jax.default_backend(), loaded, {})
    size = sum(group.page_bytes(PAGE) for group in kv_groups(spec_from_config(loaded, dtype), 1, dtype))
    pool, below = tokens // SHARE // PAGE * size, (tokens * 11 // 10 // PAGE + STAGING_PAGES) * size
    return {cell: build_engine(engine_config({"model": model, **options(cell, pool, below, folder)})) for cell in cells}


def compare(model: str | None, cells: list[str], workloads: Mapping[str, Workload], repeat: int) -> dict[str, Any]:
    """All cells, the first being the one to beat, on all workloads; decode rates with the first workload's engines."""
    rows: list[dict[str, Any]] = []
    decode: dict[str, Any] = {}
    for name, workload in workloads.items():
        with tempfile.TemporaryDirectory() as folder:
            engines = build(model, cells, workload.tokens, folder)
            runs: dict[str, list[dict[str, Any]]] = {cell: [] for cell in cells}
            for seed in range(repeat):
                for cell, engine in engines.items():
                    runs[cell].append(measure(fresh(engine, f"{name} {seed}"), workload, seed))
                    print(f"{name}, {cell}: TTFT {1e3 * runs[cell][-1]['ttft_p50_s']:.1f} ms", flush=True)
            decode = decode or {cell: decode_rates(engine, repeat) for cell, engine in engines.items() if cell != cells[0]}
            for engine in engines.values():
                engine.close()
        rows += [{"workload": name, **summary(cell, runs[cell], runs[cells[0]])} for cell in cells]
    return {"rows": rows, "decode": decode}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory (default: the built-in model)")
    parser.add_argument("--cells", default=",".join(CELLS), help="with commas; the first is the one to beat")
    parser.add_argument("--workloads", default=",".join(WORKLOADS), help="with commas; the JSON keeps the others")
    parser.add_argument("--repeat", type=int, default=3)
    add_json(parser)
    args = parser.parse_args()
    wanted = {name: WORKLOADS[name] for name in args.workloads.split(",")}
    report = compare(args.model, args.cells.split(","), wanted, args.repeat)
    kept = [row for row in earlier(args.json).get("rows", []) if row["workload"] not in wanted]
    report["rows"] = kept + report["rows"]
    print(table(report))
    write(args.json, report)


if __name__ == "__main__":
    main()

"""Throughput, TTFT, time per output token, host work per step, cache hits and memory of the engine, in one table.

    python -m bench.engine                                  the built-in model
    python -m bench.engine --model DIR --dtype float32      a checkpoint (its weights, random token ids)
    python -m bench.engine --shape small                    random weights of a named shape
    python -m bench.engine --profile --shape llama-3-8b     steps of the engine beside their floors: bench.step_profile
    python -m bench.engine --model DIR --peers ../shared/peers --size small --peer openvino,vllm
                                                            and other engines on the same workloads in the same run

Offline: all requests of a workload at once (conversations turn by turn). Online: Poisson arrivals at ``--rate``.
Every figure is the median over ``--repeat`` runs with new token ids each; ``--json FILE`` gets all of them. Products: what the
matrix products of a run's steps take by themselves (``bench.products``), the limit that it works against. A start is a process
of its own, from its launch to a first token. Executables that were compiled are those that the compile cache did not have.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from typing import Any

from bench import first_token
from bench.report import add_json, write
from bench.workloads import Job, make

SHAPES = {  # hidden, layers, heads, kv heads, head_dim, mlp, vocab
    "tiny": (256, 4, 8, 2, 32, 704, 8192),
    "small": (768, 12, 12, 4, 64, 2048, 32000),
    "llama-3-8b": (4096, 32, 32, 8, 128, 14336, 128256),
}


def config_dir(shape: str, **changes: Any) -> str:
    """A directory with the config of a named Llama shape and ``changes`` to it, for ``--load-format dummy``."""
    hidden, layers, heads, kv_heads, head_dim, mlp, vocab = SHAPES[shape]
    folder = tempfile.mkdtemp(prefix=f"jaxkv-{shape}-")
    config = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=hidden, num_hidden_layers=layers,
                  num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, intermediate_size=mlp,
                  vocab_size=vocab, max_position_embeddings=4096, rms_norm_eps=1e-5, rope_theta=10000.0,
                  hidden_act="silu", tie_word_embeddings=shape == "tiny", torch_dtype="bfloat16")
    Path(folder, "config.json").write_text(json.dumps(config | changes))
    return folder


class Clock:
    """Arrival, first token and token times of the requests of one run."""

    def __init__(self) -> None:
        self.arrival: dict[str, float] = {}
        self.times: dict[str, list[float]] = {}
        self.tokens: dict[str, list[int]] = {}


def drive(engine: Any, jobs: list[Job], rate: float | None, seed: int) -> tuple[float, Clock]:
    """Runs the jobs to their end; returns wall seconds and the record. ``rate``: arrivals per second of jobs that come after no
    other, None: all at once. A job arrives when it is due, even if a step is under way then."""
    from jaxkv import SamplingParams

    clock, rng = Clock(), random.Random(seed)
    start = time.perf_counter()
    due = {}
    at = start
    for job in jobs:
        if job.after is None:
            at += rng.expovariate(rate) if rate else 0.0
            due[job.id] = at
    history: dict[str, list[int]] = {}
    waiting = {job.id: job for job in jobs}
    while waiting or engine.has_work:
        now = time.perf_counter()
        for job in [j for j in waiting.values() if due.get(j.id, float("inf")) <= now]:
            del waiting[job.id]
            history[job.id] = (history[job.after] + clock.tokens[job.after] if job.after else []) + job.prompt
            clock.arrival[job.id], clock.times[job.id], clock.tokens[job.id] = due[job.id], [], []
            engine.add_request(job.id, history[job.id],
                               SamplingParams(temperature=0.0, max_tokens=job.max_new, ignore_eos=True))
        if not engine.has_work:
            time.sleep(max(0.0, min(due[j] for j in waiting if j in due) - time.perf_counter()))
            continue
        for delta in engine.step():
            now = time.perf_counter()
            clock.times[delta.request_id] += [now] * len(delta.token_ids)
            clock.tokens[delta.request_id] += delta.token_ids
            if delta.finish_reason:
                due |= {j.id: now + j.think for j in waiting.values() if j.after == delta.request_id}
    wall = time.perf_counter() - start
    wrong = [job.id for job in jobs if len(clock.tokens[job.id]) != job.max_new]
    assert not wrong, f"wrong number of tokens: {wrong}"
    return wall, clock


def percentile(values: list[float], q: float) -> float:
    values = sorted(values)
    return values[min(len(values) - 1, round(q * (len(values) - 1)))] if values else 0.0


def host_work(engine: Any, before: dict[str, float], steps: int) -> dict[str, float]:
    """Microseconds per step and stage since ``before``; waiting for the device is not host work."""
    after = dict(engine.metrics.stage_seconds)
    return {stage: 1e6 * (after[stage] - before[stage]) / max(1, steps) for stage in after if stage != "wait"}


def measure(engine: Any, name: str, vocab: int, seed: int, rate: float | None) -> dict[str, Any]:
    """One run of a workload."""
    before = deepcopy(engine.metrics)
    wall, clock = drive(engine, make(name, vocab, seed + (1000 if rate else 0)), rate, seed)
    after = engine.metrics
    ttft = [t[0] - clock.arrival[i] for i, t in clock.times.items()]
    tpot = [(t[-1] - t[0]) / (len(t) - 1) for t in clock.times.values() if len(t) > 1]
    queries = after.prefix_query_tokens - before.prefix_query_tokens
    outputs = sum(map(len, clock.tokens.values()))
    stages = host_work(engine, before.stage_seconds, after.steps - before.steps)
    return {"wall_s": wall, "output_tok_s": outputs / wall, "ttft_p50_ms": 1e3 * percentile(ttft, 0.5),
            "ttft_p99_ms": 1e3 * percentile(ttft, 0.99), "tpot_p50_ms": 1e3 * percentile(tpot, 0.5),
            "hit_rate": (after.prefix_hit_tokens - before.prefix_hit_tokens) / max(1, queries),
            "steps": after.steps - before.steps, "host_us_per_step": sum(stages.values()), "host_us_by_stage": stages}


def prefix_ttft(engine_for: Any, vocab: int) -> dict[str, float]:
    """TTFT in ms of a 1,088-token prompt whose first 1,024 tokens were seen before, with the prefix cache on and off."""
    out = {}
    for on in (True, False):
        engine = engine_for(enable_prefix_caching=on)
        jobs = make("c", vocab, 77)
        drive(engine, jobs[:1], None, 0)
        runs = []
        for job in jobs[1:8]:
            _, clock = drive(engine, [job], None, 0)
            runs.append(1e3 * (clock.times[job.id][0] - clock.arrival[job.id]))
        out["on" if on else "off"] = statistics.median(runs)
        del engine
    return out


def decode_host_work(engine: Any, vocab: int) -> dict[str, float]:
    """Host microseconds per decode step with 1 and with 64 sequences, if the KV pool holds them."""
    from jaxkv import SamplingParams

    out = {}
    for n in (1, min(64, engine.config.sched.max_num_seqs)):
        rng = random.Random(n)
        for i in range(n):
            engine.add_request(f"h{i}", [rng.randrange(min(300, vocab // 2), vocab) for _ in range(24)],
                               SamplingParams(temperature=0.0, max_tokens=160, ignore_eos=True))
        while engine.has_work and engine.metrics.running < n:
            engine.step()
        for _ in range(8):
            engine.step()
        before = deepcopy(engine.metrics)
        for _ in range(100):
            engine.step()
        if engine.metrics.running == n and engine.metrics.preemptions == before.preemptions:
            out[str(n)] = sum(host_work(engine, before.stage_seconds, 100).values())
        else:
            print(f"no host work with {n} sequences: the KV pool does not hold them at once")
        while engine.has_work:
            engine.step()
    return out


def table(rows: list[dict[str, Any]]) -> str:
    head = ("workload", "wall s", "min-max", "products s", "out tok/s", "TTFT p50/p99 ms", "TPOT p50 ms", "hit rate",
            "host us/step")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        m = r["median"]
        lines.append(f"| {r['workload']} | {m['wall_s']:.3f} | {r['min_s']:.3f}-{r['max_s']:.3f} "
                     f"| {r['products_s']:.3f} | {m['output_tok_s']:.0f} "
                     f"| {m['ttft_p50_ms']:.1f}/{m['ttft_p99_ms']:.1f} | {m['tpot_p50_ms']:.2f} | {m['hit_rate']:.2f} "
                     f"| {m['host_us_per_step']:.0f} |")
    return "\n".join(lines)


def run_peers(args: argparse.Namespace) -> dict[str, Any]:
    """Drives the peers harness: the same weights and workloads on other engines and on our server, in one run."""
    out = Path(tempfile.mkdtemp()) / "peers.json"
    command = [sys.executable, "run.py", "--peers", f"jaxkv_server,{args.peer}", "--size", args.size, "--workloads",
               args.workloads, "--repeat", str(args.repeat), "--quiet", "20", "--json", str(out)]
    here = str(Path(__file__).parent.parent)  # else the server is whatever version the harness's environment has installed
    subprocess.run(command, cwd=args.peers, check=True, env=os.environ | {"PYTHONPATH": here})
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.engine", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    from jaxkv.cli import add_engine_args, config_from_namespace, one_line_errors

    add_engine_args(parser)
    parser.add_argument("--shape", choices=sorted(SHAPES), help="random weights of this shape instead of a model")
    parser.add_argument("--workloads", default="a,b,c,d")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rate", type=float, default=4.0, help="arrivals per second of the online runs")
    parser.add_argument("--quick", action="store_true", help="offline workloads only")
    parser.add_argument("--profile", action="store_true", help="single steps beside what they must take (bench.step_profile)")
    parser.add_argument("--peers", metavar="DIR", help="directory of the peers harness")
    parser.add_argument("--peer", default="openvino,vllm", help="peers to run, as the harness names them")
    parser.add_argument("--size", default="small", help="the harness's model size")
    add_json(parser)
    args = parser.parse_args()
    if args.peers and not Path(args.peers, "run.py").is_file():
        parser.error(f"peers must be the directory of the peers harness, but {args.peers} has no run.py")
    if args.shape:
        args.model, args.load_format, args.skip_tokenizer_init = config_dir(args.shape), "dummy", True
    with one_line_errors("bench.engine"):
        config = config_from_namespace(args)
        if args.profile:
            from bench import step_profile

            return step_profile.run(config, args.json)
        report = run(args, config)
    write(args.json, report)
    if args.peers:
        report["peers"] = run_peers(args)
        write(args.json, report)


def run(args: argparse.Namespace, config: Any) -> dict[str, Any]:
    from dataclasses import replace

    from bench.products import count_steps, product_seconds
    from jaxkv.runtime.startup import build_engine

    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started = first_token.measure(config, args.repeat)  # before this process takes the device
    events = first_token.compile_events()
    engine = build_engine(config)
    vocab = engine.vocab_size
    drive(engine, [Job("first", [1], 1)], None, 0)
    executables = first_token.executables(events)
    print("\n".join(engine.describe()), flush=True)
    rows, counts = [], count_steps(engine.executor)
    for name in args.workloads.split(","):
        for kind, rate in [("offline", None)] + ([] if args.quick or name == "a" else [("online", args.rate)]):
            counts.clear()
            runs = [measure(engine, name, vocab, seed, rate) for seed in range(args.repeat)]
            median = sorted(runs, key=lambda r: r["wall_s"])[len(runs) // 2]
            rows.append({"workload": f"{name} {kind}", "median": median, "min_s": min(r["wall_s"] for r in runs),
                         "max_s": max(r["wall_s"] for r in runs), "runs": runs, "products_s": product_seconds(
                             engine.executor, config.model.model, engine.metrics.info["dtype"], counts) / args.repeat})
    report = {"workloads": rows, "host_us_per_decode_step": decode_host_work(engine, vocab),
              "executables": executables, **started,
              "rss_mib": {"after imports": imported >> 20, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
                          "weights": engine.weight_bytes >> 20, "pools": engine.capacity.pool_bytes >> 20}}
    del engine
    if not args.quick:
        report["prefix_ttft_ms"] = prefix_ttft(
            lambda **kw: build_engine(replace(config, cache=replace(config.cache, **kw))), vocab)
    print("\n" + table(rows) + "\n")
    for key in ("host_us_per_decode_step", "executables", "start_to_first_token_s", "start_executables", "rss_mib",
                "prefix_ttft_ms"):
        if key in report:
            print(f"{key}: {report[key]}")
    return report


if __name__ == "__main__":
    main()

"""Replays a request trace through the real trie and cache controller, without a device and without JAX.

    python -m bench.replay conversation.jsonl.gz --policy lfu,lru,arc --capacity 0.01,0.05,0.1 --json out.json
    python -m bench.replay synthetic:agents --policy lfu,lru --host-capacity 0.2 --session-hints --plot out.png

One block of the trace is one page of one token; everything is weighted by 512 tokens. Requests run one at a time, what
they generate is not cached. Capacities are shares of the trace's distinct full blocks. Beside the policies stands the
clairvoyant optimum for HBM and host together: exclusive tiers are one cache as far as recompute goes.

Prefill work and bytes are those of Llama-3-8B: 6.98e9 weights per token outside the embedding, 32 layers of width 4096,
128 KiB of KV per token in bfloat16. Work counts the weights and causal attention.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.replay_one import GROUP, PARAMS, REST, serve
from bench.replay_optimum import optimum
from bench.replay_speed import touches_per_second
from bench.replay_trace import BLOCK, SYNTHETIC, Line, distinct_blocks, load, synthetic
from bench.report import add_json, write
from jaxkv.cache.controller import CacheController
from jaxkv.cache.eviction import GDSF, POLICIES
from jaxkv.types import Request

WEIGHT_FLOPS = 2 * 6.98e9  # per token
ATTENTION_FLOPS = 4 * 32 * 4096  # per token and earlier token
KV_BYTES = 128 * 1024  # per token


class Outcome(NamedTuple):
    """What one replay gave. Everything but ``seconds`` is a function of trace, policy and capacities."""

    hits: list[int]  # blocks found, by request
    host_hits: int  # those found in the host tier
    moved: int  # blocks copied between the tiers
    seconds: float


def replay(lines: Sequence[Line], policy: str, capacity: int, host: int = 0, hints: bool = False) -> Outcome:
    """Run the trace; ``capacity`` and ``host`` in blocks. ``hints``: the last request of a session says so."""
    cache = CacheController((GROUP,), 1, (capacity,), (host,), policy, watermark=0.0)
    for ranker in cache.store.policies.values():
        if isinstance(ranker, GDSF):
            ranker.balance /= BLOCK  # depths are in blocks here
    hits = []
    start = time.perf_counter()
    for i, line in enumerate(lines):
        prompt = (*line.blocks, REST)
        cache.tick(line.time)
        hits.append(serve(cache, Request(str(i), prompt, PARAMS, 1, arrival=line.time, session_id=line.session,
                                         end_session=hints and line.last)))
    stats = cache.stats
    return Outcome(hits, stats.host_hit_tokens, stats.demotions + stats.promotions, time.perf_counter() - start)


def prefill_flops(tokens: int) -> float:
    return WEIGHT_FLOPS * tokens + ATTENTION_FLOPS * tokens * tokens / 2


def row(lines: Sequence[Line], policy: str, shares: tuple[float, float], outcome: Outcome) -> dict[str, Any]:
    """A row of the table; rates are shares of all prompt tokens."""
    total = sum(line.tokens for line in lines)
    saved = sum(prefill_flops(BLOCK * n) for n in outcome.hits)
    host = BLOCK * outcome.host_hits / total
    rate = BLOCK * sum(outcome.hits) / total
    return {"policy": policy, "capacity": shares[0], "host_capacity": shares[1], "token_hit_rate": rate,
            "hbm_hit_rate": rate - host, "host_hit_rate": host,
            "prefill_saved": saved / sum(prefill_flops(line.tokens) for line in lines),
            "bytes_moved": outcome.moved * BLOCK * KV_BYTES,
            "touches_per_second": sum(len(line.blocks) for line in lines) / max(outcome.seconds, 1e-9)}


def measure(lines: Sequence[Line], policies: Sequence[str], capacities: Sequence[float], hosts: Sequence[float],
            hints: bool = False) -> list[dict[str, Any]]:
    """One row per policy, capacity and host capacity, and the optimum of each pair of capacities."""
    blocks = distinct_blocks(lines)
    rows = []
    for host_share in hosts:
        for share in capacities:
            capacity, host = max(1, int(share * blocks)), int(host_share * blocks)
            for policy in policies:
                outcome = replay(lines, policy, capacity, host, hints)
                rows.append(row(lines, policy, (share, host_share), outcome))
                print(_line(rows[-1]), flush=True)
            start = time.perf_counter()
            best = optimum(lines, capacity + host)
            outcome = Outcome(best, 0, 0, time.perf_counter() - start)
            rows.append(row(lines, "optimum", (share, host_share), outcome))
            print(_line(rows[-1]), flush=True)
    return rows


HEAD = (f"{'policy':<12} {'HBM':>6} {'host':>6} {'hit %':>7} {'in HBM':>7} {'in host':>7} "
        f"{'work -%':>7} {'GB moved':>9} {'ktouch/s':>9}")


def _line(row: dict[str, Any]) -> str:
    percent = [100 * row[name] for name in ("capacity", "host_capacity", "token_hit_rate", "hbm_hit_rate", "host_hit_rate",
                                            "prefill_saved")]
    return (f"{row['policy']:<12} {percent[0]:>5g}% {percent[1]:>5g}% {percent[2]:>7.2f} {percent[3]:>7.2f} {percent[4]:>7.2f} "
            f"{percent[5]:>7.2f} {row['bytes_moved'] / 1e9:>9.0f} {row['touches_per_second'] / 1e3:>9.0f}")


def plot(rows: Sequence[dict[str, Any]], title: str, path: str) -> None:
    """Token hit rate over capacity, a line per policy and host capacity."""
    from matplotlib.figure import Figure  # an option of the command, not worth its start-up time otherwise

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for policy, host in dict.fromkeys((r["policy"], r["host_capacity"]) for r in rows):
        mine = sorted((r["capacity"], r["token_hit_rate"]) for r in rows if (r["policy"], r["host_capacity"]) == (policy, host))
        axes.plot([100 * x for x, _ in mine], [100 * y for _, y in mine], marker="o",
                  linestyle="--" if policy == "optimum" else "-", label=policy + (f", host {100 * host:g} %" if host else ""))
    axes.set(xscale="log", xlabel="HBM, % of the distinct blocks", ylabel="token hit rate, %", title=title)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def _shares(text: str) -> list[float]:
    values = [float(part) for part in text.split(",")]
    if any(not 0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"shares must be in [0, 1], got {text!r}")
    return values


def _policies(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in POLICIES]:
        raise argparse.ArgumentTypeError(f"policies are {', '.join(POLICIES)}, got {', '.join(unknown)}")
    return names


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.replay", description=__doc__.splitlines()[0])
    parser.add_argument("trace", nargs="?", help=f"JSONL file, or synthetic:NAME with NAME of {', '.join(SYNTHETIC)}")
    parser.add_argument("--policy", type=_policies, default=["lfu", "lru"], metavar="NAME,...")
    parser.add_argument("--capacity", type=_shares, default=[0.01, 0.05, 0.1, 0.25, 0.5], metavar="SHARE,...")
    parser.add_argument("--host-capacity", type=_shares, default=[0.0], metavar="SHARE,...")
    parser.add_argument("--session-hints", action="store_true", help="an oracle tells when a session ends")
    parser.add_argument("--speed", type=int, metavar="NODES", help="no trace: block touches per second with so many nodes")
    parser.add_argument("--plot", metavar="FILE")
    add_json(parser)
    args = parser.parse_args(argv)
    if args.speed:
        rows = [{"policy": policy, "nodes": args.speed, "touches_per_second": touches_per_second(policy, args.speed)}
                for policy in args.policy]
        for found in rows:
            print(f"{found['policy']:<12} {found['nodes']} nodes {found['touches_per_second'] / 1e3:>8.0f} k block touches/s")
        write(args.json, {"rows": rows}, device=False)
        return 0
    if args.trace is None:
        parser.error("a trace is needed")
    try:
        kind, _, name = args.trace.partition(":")
        lines = synthetic(name) if kind == "synthetic" else load(args.trace)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"no trace {args.trace!r}: {error}")
    if not any(line.blocks for line in lines):
        parser.error(f"{args.trace}: no full block of {BLOCK} tokens in it")
    print(f"{args.trace}: {len(lines)} requests, {distinct_blocks(lines)} distinct full blocks, "
          f"{sum(len(line.blocks) for line in lines)} read")
    if args.session_hints:
        print("session hints are an ORACLE here: the last request of every session is marked by looking ahead")
    print(HEAD)
    rows = measure(lines, args.policy, args.capacity, args.host_capacity, args.session_hints)
    if args.plot:
        plot(rows, Path(args.trace).name + (" (session-end oracle)" if args.session_hints else ""), args.plot)
    write(args.json, {"trace": args.trace, "session_hints_oracle": args.session_hints, "rows": rows}, device=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

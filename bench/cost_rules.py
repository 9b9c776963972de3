"""Bring KV back or compute it again: measured costs against fixed rules, in a virtual clock.

    python -m bench.cost_rules
    python -m bench.cost_rules --trace FILE       with a cut of a trace (JSON lines: timestamp, input_length, hash_ids)

The real Scheduler and CacheController serve conversations that share system prompts on a virtual machine
(``bench.virtual``) whose host link and disk sweep over orders of magnitude. Every rule sees the same requests at the same
times; what is compared is the sum of the times to first token.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.report import add_json, write
from bench.virtual import Link, Machine, VirtualDisk, VirtualEngine
from jaxkv.cache.controller import CacheController
from jaxkv.cache.costs import Costs
from jaxkv.config import SchedConfig
from jaxkv.params import SamplingParams
from jaxkv.sched.scheduler import Scheduler
from jaxkv.types import KVGroup, Request, Tier

PAGE_SIZE = 16
LATENCY = {Tier.HOST: 30e-6, Tier.DISK: 200e-6}  # seconds
# Llama-3-8B in bfloat16 on an H100: weights read at 3.2 TB/s, 2 * 8e9 FLOP per token and 4 * 32 * 4096 per token and
# earlier position at 400 TFLOP/s; 128 KiB of KV per token. The built-in model on two CPU cores: from bench.engine.
MACHINES = {m.name: m for m in (Machine("8B on an H100", 5e-3, 40e-6, 1.3e-9, 2 << 20),
                                Machine("built-in model on a CPU", 4e-4, 4e-5, 5e-8, 64 << 10))}


class Fixed(Costs):
    """A rule that learns nothing: bring from ``tiers``, and only hits of at least ``least`` tokens."""

    def __init__(self, tiers: Sequence[Tier], least: int = 0) -> None:
        super().__init__(PAGE_SIZE)
        self._tiers = tiers
        self._least = least

    def worth_moving(self, tier: Tier, start: int, end: int, held: int) -> int:
        return -(-(end - start) // PAGE_SIZE) if tier in self._tiers else 0

    def best_cut(self, start: int, runs: list[tuple[Tier, int]], length: int, busy: object = ()) -> int:
        cut = sum(pages for _, pages in itertools.takewhile(lambda run: run[0] in self._tiers, runs))
        return cut if cut * PAGE_SIZE >= self._least else 0


BOTH = (Tier.HOST, Tier.DISK)
RULES: dict[str, Callable[[], Costs]] = {
    "always": lambda: Fixed(BOTH), "never": lambda: Fixed(()), "host only": lambda: Fixed(BOTH[:1]),
    ">= 512": lambda: Fixed(BOTH, 512), ">= 2048": lambda: Fixed(BOTH, 2048), "measured": lambda: Costs(PAGE_SIZE)}


@dataclass(frozen=True)
class Case:
    """One point: requests of a workload on a machine with these link rates in bytes per second, ``later`` ones from the
    middle of the run on."""

    machine: str
    host: float
    disk: float
    later: tuple[float, float] | None = None
    load: float = 0.5  # share of the device's time that computing every prompt would take
    trace: str = ""
    seed: int = 0
    conversations: int = 160
    hbm_tokens: int = 40960
    host_tokens: int = 131072


def conversations(case: Case) -> list[Request]:
    """Multi-turn conversations that begin with one of a few system prompts; ids are dense in time. A turn's prompt
    contains the earlier turns and answers; arrivals do not depend on how fast they are served."""
    rng = random.Random(case.seed)
    systems = [[rng.randrange(50000) for _ in range(rng.randrange(300, 1500))] for _ in range(4)]
    turns: list[tuple[float, list[int], int]] = []
    for _ in range(case.conversations):
        at, tokens = rng.random(), list(rng.choice(systems))
        for _ in range(rng.randint(2, 6)):
            tokens = tokens + [rng.randrange(50000) for _ in range(int(rng.lognormvariate(6.0, 0.9)) + 20)]
            if len(tokens) > 14000:
                break
            answer = rng.randint(8, 32)
            turns.append((at, tokens, answer))
            tokens = tokens + [answer_token(len(tokens), i) for i in range(answer)]
            at += rng.expovariate(case.conversations / 8)
    return _requests(case, sorted(turns, key=lambda turn: turn[0]))


def answer_token(prompt: int, index: int) -> int:
    return 60000 + (31 * prompt + index) % 5000


def traced(case: Case, count: int = 200) -> list[Request]:
    """The first ``count`` requests of a trace whose prompts have at most 14,000 tokens; its own order and gaps, scaled."""
    turns = []
    with (gzip.open if case.trace.endswith("gz") else open)(case.trace, "rt") as lines:
        for line in lines:
            one = json.loads(line)
            if one["input_length"] <= 14000:
                tokens = [512 * h + i for h in one["hash_ids"] for i in range(512)][:one["input_length"]]
                turns.append((float(one["timestamp"]), tokens, 16))
                if len(turns) == count:
                    break
    return _requests(case, turns)


def _requests(case: Case, turns: list[tuple[float, list[int], int]]) -> list[Request]:
    """Requests whose arrivals, at given relative times, spread so that recomputing everything gives the case's load."""
    m = MACHINES[case.machine]
    work = sum(m.base * (1 + n) + m.per_token * len(t) + m.per_position * len(t) ** 2 / 2 for _, t, n in turns)
    first, last = turns[0][0], turns[-1][0]
    scale = work / case.load / (last - first)
    return [Request(f"r{i}", tuple(tokens), SamplingParams(max_tokens=n), n, arrival=(at - first) * scale)
            for i, (at, tokens, n) in enumerate(turns)]


def play(case: Case, rule: str) -> dict[str, Any]:
    """Sum and mean of the time to first token in seconds, and what the cache counted."""
    requests = traced(case) if case.trace else conversations(case)
    machine, middle = MACHINES[case.machine], requests[len(requests) // 2].arrival
    disk = VirtualDisk()
    cache = CacheController((KVGroup((0,), 1, 1, "float32"),), PAGE_SIZE, (case.hbm_tokens // PAGE_SIZE,),
                            (case.host_tokens // PAGE_SIZE,), disk=disk if case.disk else None, costs=RULES[rule]())
    scheduler = Scheduler(SchedConfig(32, 2048), cache, 16384)
    rates = [lambda now, i=i: ((case.host, case.disk) if case.later is None or now < middle else case.later)[i] for i in (0, 1)]
    lengths = {one.id: len(one.prompt) for one in requests}
    host = Link(rates[0], LATENCY[Tier.HOST]), Link(rates[0], LATENCY[Tier.HOST])
    engine = VirtualEngine(scheduler, machine, host, Link(rates[1], LATENCY[Tier.DISK]), disk,
                           lambda name, index: answer_token(lengths[name], index))
    engine.run(requests)
    assert len(engine.first_token) == len(requests)
    total, s = sum(engine.first_token.values()), cache.stats
    return {"rule": rule, "sum": total, "mean": total / len(requests), "hit": s.hit_tokens / s.query_tokens,
            "host_hit_tokens": s.host_hit_tokens, "disk_hit_tokens": s.disk_hit_tokens, "loads": s.loads,
            "recomputed_tokens": s.recomputed_tokens, "demotions": s.demotions, "saves": s.saves}


def cases(trace: str, seed: int) -> list[Case]:
    """The sweeps: host link without a disk, disk behind a fast host link, loads, and links that change in mid-run."""
    out = []
    for name, m in MACHINES.items():
        even = m.page_bytes / PAGE_SIZE / m.per_token  # bytes per second at which bringing takes as long as computing
        base = Case(name, even, 0.0, trace=trace, seed=seed)
        out += [replace(base, host=even * x) for x in (1e-3, 1e-2, 0.1, 0.3, 0.7, 1.0, 1.5, 3.0, 10.0, 100.0)]
        out += [replace(base, host=even * 16, disk=even * x, host_tokens=40960)
                for x in (1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)]
        out += [replace(base, host=even * x, load=load) for load in (0.1, 0.7) for x in (0.01, 0.5, 1.0, 2.0, 20.0)]
        out += [replace(base, host=even * a, later=(even * b, 0.0))
                for a, b in ((0.01, 20.0), (20.0, 0.01), (0.3, 20.0), (20.0, 0.3), (1.0, 30.0))]
        out += [replace(base, host=even * 16, disk=even * a, later=(even * 16, even * b), host_tokens=40960)
                for a, b in ((0.02, 20.0), (20.0, 0.02))]
    return out


def point(case: Case) -> dict[str, Any]:
    """What every rule takes; ``ratio``: measured costs over the best fixed rule."""
    rows = [play(case, rule) for rule in RULES]
    best = min((row for row in rows if row["rule"] != "measured"), key=lambda row: row["sum"])
    return {"case": asdict(case), "best": best["rule"], "ratio": rows[-1]["sum"] / best["sum"], "rules": rows}


def line(one: dict[str, Any]) -> str:
    """A point's row of the table: rates in GB/s, mean time to first token in ms."""
    case = one["case"]
    rates = [f"{a / 1e9:.4g}" + (f" > {b / 1e9:.4g}" if a != b else "") for a, b in
             zip((case["host"], case["disk"]), case["later"] or (case["host"], case["disk"]))]
    return f"{case['machine']:24}{case['load']:5} {rates[0]:>16} {rates[1]:>16}" + \
        "".join(f"{row['mean'] * 1e3:13.1f}" for row in one["rules"]) + f"{one['ratio']:8.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", default="", help="path of a trace, plain or .gz")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    add_json(parser)
    args = parser.parse_args()
    print("mean time to first token, ms; rates in GB/s, \">\": changes in the middle of the run")
    print(f"{'machine':24} load {'host':>16} {'disk':>16}" + "".join(f"{rule:>13}" for rule in RULES) + "  / best")
    points = []
    with ProcessPoolExecutor(args.jobs) as pool:
        for one in pool.map(point, cases(args.trace, args.seed)):
            points.append(one)
            print(line(one), flush=True)
    worst = {name: max(one["ratio"] for one in points if bool(one["case"]["later"]) is changes)
             for name, changes in (("constant links", False), ("links that change", True))}
    print(f"worst over the best fixed rule: {worst}")
    write(args.json, {"machines": {name: asdict(m) for name, m in MACHINES.items()}, "worst": worst, "points": points},
          device=False)


if __name__ == "__main__":
    main()

"""Long proofs at full size, in small steps: interrupted at any time, the next run goes on where the JSON ends.

    python -m bench.soak                           all proofs; the JSON is runs/soak.json, which git ignores
    python -m bench.soak --json FILE               or another
    python -m bench.soak --only disk_kills --steps 10

A proof is a function of a step's number that raises if something is wrong, and else returns counts to be summed. The test suite
runs one step in a hundred.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from bench.report import add_json, earlier, write
from bench.soak_cache import abort, operate
from bench.soak_disk import kill_once
from bench.soak_server import disconnect, flat, malform, queue, step_of

ROOT = Path(__file__).resolve().parent.parent


class Proof(NamedTuple):
    """``goal`` steps, each of which needs a folder that the steps of a run share."""

    goal: int
    step: Callable[[Path, int], dict[str, int]]
    unit: str  # the count that is to reach the goal
    zero: tuple[str, ...]  # counts that must stay 0


PROOFS = {
    "cache_operations": Proof(100_000, operate, "operations", ("leaked",)),
    "aborts": Proof(10_000, abort, "aborted", ("leaked",)),
    "disk_kills": Proof(200, kill_once, "killed", ("lost", "wrong")),
    "server_queue": Proof(1_000, step_of(queue, 1_000), "queued", ("unanswered", "unbounded")),
    "server_disconnects": Proof(10_000, step_of(disconnect, 2_500), "disconnected",
                                ("leaked_pages", "leaked_tasks", "leaked_files")),
    "server_malformed": Proof(50_000, step_of(malform, 10_000), "malformed", ("other",)),
    "server_memory": Proof(20_000, step_of(flat, 20_000), "requests", ("grew",)),
}


def run(name: str, state: dict[str, dict], steps: int | None, save: Callable[[], None]) -> None:
    """Goes on with one proof until its goal, or for ``steps`` steps; saves after each."""
    proof = PROOFS[name]
    mine = state.setdefault(name, {"goal": proof.goal, "steps": 0, "seconds": 0.0, "counts": {}})
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(proof.goal * 10 if steps is None else steps):
            if mine["counts"].get(proof.unit, 0) >= proof.goal:
                break
            start = time.perf_counter()
            counts = Counter(mine["counts"])
            counts.update(proof.step(Path(folder), mine["steps"]))
            assert not any(counts[zero] for zero in proof.zero), f"{name} failed in step {mine['steps']}: {dict(counts)}"
            mine.update(steps=mine["steps"] + 1, seconds=mine["seconds"] + time.perf_counter() - start, counts=dict(counts))
            save()
    print(f"{name}: {mine['counts'].get(proof.unit, 0)} of {proof.goal} {proof.unit} in {mine['seconds']:.0f} s, "
          + ", ".join(f"{key} {value}" for key, value in sorted(mine["counts"].items())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PROOFS), action="append")
    parser.add_argument("--steps", type=int, help="of each proof, at most")
    add_json(parser, ROOT / "runs" / "soak.json", "counts so far, read before and written after every step (%(default)s)")
    args = parser.parse_args()
    state = earlier(args.json)
    for name in args.only or PROOFS:
        run(name, state, args.steps, lambda: write(args.json, state, device=False))


if __name__ == "__main__":
    main()

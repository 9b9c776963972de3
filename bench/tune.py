"""Searches the block sizes of the attention kernels on this machine's device; `--write` keeps them for the kernels.

    python -m bench.tune                               decode and prefill, in 8 minutes at most
    python -m bench.tune --write                       and what is faster goes into ragged_paged_attention/tuned.json
    python -m bench.tune decode --head-dim 64 --kv-dtype int8
    python -m bench.tune xla                           the constants of xla.py, on CPU; they are changed by hand

Every candidate's output is compared with the reference's on a small batch before it is timed on large ones; one that is
refused, does not compile, differs or is out of time is listed with the reason. decode and prefill need a GPU: exit status 2
without one. Best is the lowest geometric mean of the times relative to today's row; a fiftieth less is noise. The candidates
most like today's row come first, so that a run after `--write` goes on from there. `--json FILE` is written after each.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax

from bench.kernel_cases import TOLERANCE, Case, attention, difference, make_case
from bench.report import add_json, origin, replace, write
from bench.timing import ends_within, time_together
from pallas_kernels.arg_specs import BATCHES, MODELS, BatchSpec, HeadSpec
from pallas_kernels.ragged_paged_attention import tuning, xla
from pallas_kernels.ragged_paged_attention.mosaic_gpu import prefill_tuning

CHIP = "h100"
NOISE = 0.98
Save = Callable[[list[dict[str, Any]]], None]
SMALL = {"decode": BatchSpec((1, 1, 1), (300, 17, 129)), "prefill": BatchSpec((200, 131), (200, 300)),
         "xla": BatchSpec((70, 1, 5), (90, 300, 64))}
LARGE = {"decode": ("decode-1x32k", "decode-8x4k", "decode-32x4k", "decode-128x4k"),
         "prefill": ("prefill-2k", "prefill-8k", "prefill-32k"),
         "xla": ("decode-1", "decode-32-ragged", "decode-24-shared", "prefill-512", "mixed")}
XLA_CHOICES = {"KEYS": (64, 128, 256), "MANY_KEYS": (256, 512, 1024), "CHUNK_ROWS": (32, 64, 128), "GROUP_ROWS": (16, 32, 64),
               "SINGLES": (8, 16, 32), "SINGLE_KEYS": (32, 64, 128)}


@contextmanager
def entry(table: dict[Any, Any], key: Any, value: Any) -> Iterator[None]:
    """`table[key]` is `value` meanwhile; whatever is traced then has it built in."""
    before = table.get(key)
    table[key] = value
    try:
        yield
    finally:
        if before is None:
            del table[key]
        else:
            table[key] = before


def candidates(what: str, head_dim: int, today: Any) -> list[Any]:
    """All others for "decode" or "prefill"; those that differ from `today` in the fewest fields first."""
    if what == "decode":
        widths = (64, 128) if head_dim > 128 else (128,)
        found: list[Any] = [tuning.DecodeTuning(*c) for c in itertools.product((64, 128), (2, 3, 4, 6), (1, 2, 3), widths)]
    else:
        found = [prefill_tuning.PrefillBlocks(*c) for c in itertools.product((64, 128, 192), (2, 3, 4), (True, False))]
    return sorted((c for c in found if c != today), key=lambda c: sum(a != b for a, b in zip(c, today)))


def measure(
    cases: list[Case], small: Case, impl: str, want: Any, samples: int, end: float = math.inf
) -> dict[str, float]:
    """Seconds per call of each case. RuntimeError: with the reason, if it is refused, fails, differs from `want`, or the clock
    is past `end`."""
    in_time(end)
    error = difference(attention(small, impl)[1], want)
    if error > TOLERANCE[small.q.dtype.name]:
        raise RuntimeError(f"wrong: differs by {error:.2g} of a row's size")
    times = {}
    for case in cases:
        in_time(end)
        run, _ = attention(case, impl, check=False)
        times[case.shape] = time_together({"it": run}, samples=samples)["it"].median
    return times


def in_time(end: float) -> None:
    """RuntimeError if the monotonic clock is past `end`."""
    if time.monotonic() > end:
        raise RuntimeError("out of time")


def score(times: dict[str, float], base: dict[str, float]) -> float:
    """Geometric mean of the times relative to `base`."""
    return math.exp(sum(math.log(times[shape] / base[shape]) for shape in base) / len(base))


def try_all(
    named: dict[str, Any], using: Callable[[Any], Any], time_it: Callable[[], dict[str, float]], base: dict[str, float],
    save: Save = lambda found: None,
) -> list[dict[str, Any]]:
    """Result of each candidate, best first; those without figures last, with their reasons. `save` gets what there is after
    each."""
    found: list[dict[str, Any]] = []
    for name, candidate in named.items():
        try:
            with using(candidate):
                times = time_it()
            found.append({"candidate": name, "score": score(times, base), "seconds": times})
            print(f"{found[-1]['score']:.3f}  {name}", flush=True)
        except RuntimeError as error:
            found.append({"candidate": name, "score": None, "reason": str(error)})
            print(f"  -    {name}: {error}", flush=True)
        save(found)
    return sorted(found, key=lambda f: math.inf if f["score"] is None else f["score"])


def tune_mosaic(
    what: str, heads: HeadSpec, kv_dtype: str, page_size: int, samples: int, end: float, save: Save
) -> tuple[tuple, Any, float] | None:
    """The row to put into the table: its key, the blocks, and their time relative to today's; None if today's is best.
    `heads.head_dim` and `kv_dtype` name the row. RuntimeError if today's does not run; NotImplementedError if there is none."""
    dtype = kv_dtype if kv_dtype in TOLERANCE else "bfloat16"

    def case(shape: str, batch: BatchSpec) -> Case:
        return make_case(shape, batch, heads, platform="gpu", dtype=dtype, kv_dtype=kv_dtype, page_size=page_size)

    table: dict[Any, Any]
    if what == "decode":
        table, key = tuning.DECODE, (CHIP, heads.head_dim, page_size, kv_dtype)
        today: Any = tuning.decode_tuning(tuning.CHIPS[CHIP], heads.head_dim, page_size, kv_dtype)
    else:
        table, key = prefill_tuning.BLOCKS, (CHIP, heads.head_dim, kv_dtype)
        today = prefill_tuning.blocks_for(heads.head_dim, kv_dtype)
    small = case("small", SMALL[what])
    want = attention(small, "ref")[1]
    cases = [case(shape, BATCHES[shape]) for shape in LARGE[what]]
    base = measure(cases, small, "mosaic_gpu", want, samples)
    print(f"{what} {key}: today {today}", flush=True)
    save([first := {"candidate": str(today), "score": 1.0, "seconds": base}])
    named = {str(c): c for c in candidates(what, heads.head_dim, today)}
    time_it = lambda: measure(cases, small, "mosaic_gpu", want, samples, end)  # noqa: E731
    found = try_all(named, lambda c: entry(table, key, c), time_it, base, lambda found: save([first, *found]))
    best = found[0]
    if best["score"] is None or best["score"] >= NOISE:
        return None
    return key, named[best["candidate"]], best["score"]


def write_row(what: str, key: tuple, blocks: Any, facts: dict[str, Any], path: Path) -> None:
    """Puts a row into the table at `path`, in place of the one with its key; `facts` say where it comes from."""
    table = json.loads(path.read_text())
    rows = [row for row in table[what] if tuple(row["key"]) != key] + [{"key": list(key), "blocks": blocks._asdict(), **facts}]
    table[what] = sorted(rows, key=lambda row: str(row["key"]))
    replace(path, table)


def tune_xla(samples: int, end: float, save: Save) -> None:
    """One constant after the other, each kept at the best value found so far. Prints; changes no table."""
    heads = MODELS["peers-small"]

    def case(shape: str, batch: BatchSpec) -> Case:
        return make_case(shape, batch, heads, platform="cpu", dtype="float32", kv_dtype="float32", layers=2)

    small = case("small", SMALL["xla"])
    want = attention(small, "ref")[1]
    cases = [case(shape, BATCHES[shape]) for shape in LARGE["xla"]]
    base, best = measure(cases, small, "xla", want, samples), {name: getattr(xla, name) for name in XLA_CHOICES}
    time_it = lambda: measure(cases, small, "xla", want, samples, end)  # noqa: E731
    found: list[dict[str, Any]] = []
    for name, values in XLA_CHOICES.items():
        results = try_all({f"{name} = {v}": v for v in values if v != best[name]}, lambda v, n=name: entry(vars(xla), n, v),
                          time_it, base, lambda results, before=tuple(found): save([*before, *results]))
        found += results
        if results[0]["score"] is not None and results[0]["score"] < NOISE:
            best[name] = vars(xla)[name] = int(results[0]["candidate"].split(" = ")[1])
            base = results[0]["seconds"]
    print("\n" + "\n".join(f"{name} = {value}" for name, value in best.items()))


def main() -> int:
    """Exit status 2: this machine has no GPU to tune for; 1: today's blocks do not run on it."""
    parser = argparse.ArgumentParser(prog="bench.tune", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("decode", "prefill", "xla"), help="default: decode, then prefill")
    parser.add_argument("--model", choices=sorted(MODELS), default="llama-3-8b", help="heads, unless --head-dim is given")
    parser.add_argument("--head-dim", type=int)
    parser.add_argument("--kv-dtype", default="bfloat16")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=470, help="for everything; no candidate is begun after them")
    parser.add_argument("--write", action="store_true", help="put what is faster into the table that the kernels read")
    add_json(parser)
    args = parser.parse_args()
    end, platform = time.monotonic() + args.seconds, jax.default_backend()
    if args.what == "xla" and args.write:
        parser.error("--write: the constants of xla.py are changed by hand")
    if args.what != "xla" and platform != "gpu":
        print(f"bench.tune {args.what or 'decode'}: needs a GPU, this is {platform}", file=sys.stderr)
        return 2
    kinds = (args.what,) if args.what else ("decode", "prefill")
    document: dict[str, Any] = {**origin(), "results": {}}
    facts = {name: document[name] for name in ("device", "jax", "driver", "commit")}

    def keep(what: str, found: list[dict[str, Any]]) -> None:
        document["results"][what] = found
        write(args.json, document)

    heads, status = MODELS[args.model]._replace(head_dim=args.head_dim or MODELS[args.model].head_dim), 0
    with ends_within(args.seconds + 90):
        for left, what in zip(range(len(kinds), 0, -1), kinds):
            now = time.monotonic()
            until = now + (end - now) / left
            if what == "xla":
                tune_xla(args.samples, until, partial(keep, what))
                continue
            try:
                row = tune_mosaic(what, heads, args.kv_dtype, args.page_size, args.samples, until, partial(keep, what))
            except (RuntimeError, NotImplementedError) as error:
                print(f"{what}: {error}", file=sys.stderr)
                status = 1
                continue
            print(f"\n{row[0]}: {row[1]}, {row[2]:.3f} of the time before\n" if row else "\ntoday's row is best\n", flush=True)
            if row and args.write:
                write_row(what, *row[:2], {"score": row[2], **facts}, tuning.TUNED)
    if args.write:
        print(f"wrote what was faster to {tuning.TUNED}")
    return status


if __name__ == "__main__":
    sys.exit(main())

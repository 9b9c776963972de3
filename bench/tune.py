"""Searches the block sizes of the attention kernels on this machine's device and prints the table that they read.

    python -m bench.tune decode --head-dim 128 --kv-dtype bfloat16     rows of ragged_paged_attention/tuning.py
    python -m bench.tune prefill --head-dim 128                        rows of mosaic_gpu/prefill_tuning.py
    python -m bench.tune xla                                           the constants of xla.py, on CPU

Every candidate's output is compared with the reference's on a small batch before it is timed on large ones; one that is
refused, does not compile or differs is listed with the reason. decode and prefill need a GPU: exit status 2 without one.
Best is the lowest geometric mean of the times relative to today's table. `--json` keeps every figure; tables are changed by
hand, with these figures beside them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

from bench.kernel_cases import TOLERANCE, Case, attention, difference, make_case
from bench.timing import time_together
from pallas_kernels.arg_specs import BATCHES, MODELS, BatchSpec, HeadSpec
from pallas_kernels.ragged_paged_attention import xla

CHIP = "h100"
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


def decode_candidates(head_dim: int) -> list[Any]:
    from pallas_kernels.ragged_paged_attention.tuning import DecodeTuning

    widths = (64, 128) if head_dim > 128 else (128,)
    return [DecodeTuning(*c) for c in itertools.product((64, 128), (2, 3, 4, 6), (1, 2, 3), widths)]


def prefill_candidates() -> list[Any]:
    from pallas_kernels.ragged_paged_attention.mosaic_gpu.prefill_tuning import PrefillBlocks

    return [PrefillBlocks(*c) for c in itertools.product((64, 128, 192), (2, 3, 4), (True, False))]


def measure(cases: list[Case], small: Case, impl: str, want: Any, samples: int) -> dict[str, float]:
    """Seconds per call of each case. RuntimeError: with the reason, if it is refused, fails, or differs from `want`."""
    error = difference(attention(small, impl)[1], want)
    if error > TOLERANCE[small.q.dtype.name]:
        raise RuntimeError(f"wrong: differs by {error:.2g} of a row's size")
    times = {}
    for case in cases:
        run, _ = attention(case, impl)
        times[case.shape] = time_together({"it": run}, samples=samples)["it"].median
    return times


def score(times: dict[str, float], base: dict[str, float]) -> float:
    """Geometric mean of the times relative to `base`."""
    return math.exp(sum(math.log(times[shape] / base[shape]) for shape in base) / len(base))


def try_all(
    candidates: dict[str, Any], using: Callable[[Any], Any], time_it: Callable[[], dict[str, float]], base: dict[str, float]
) -> list[dict[str, Any]]:
    """Result of each candidate, best first; those without figures last, with their reasons."""
    found = []
    for name, candidate in candidates.items():
        try:
            with using(candidate):
                times = time_it()
            found.append({"candidate": name, "score": score(times, base), "seconds": times})
            print(f"{found[-1]['score']:.3f}  {name}", flush=True)
        except RuntimeError as error:
            found.append({"candidate": name, "score": None, "reason": str(error)})
            print(f"  -    {name}: {error}", flush=True)
    return sorted(found, key=lambda f: math.inf if f["score"] is None else f["score"])


def tune_mosaic(what: str, heads: HeadSpec, kv_dtype: str, page_size: int, samples: int) -> list[dict[str, Any]]:
    """Best first; prints the row to put into the table. `heads.head_dim` and `kv_dtype` name the row."""
    dtype = kv_dtype if kv_dtype in TOLERANCE else "bfloat16"

    def case(shape: str, batch: BatchSpec) -> Case:
        return make_case(shape, batch, heads, platform="gpu", dtype=dtype, kv_dtype=kv_dtype, page_size=page_size)

    small = case("small", SMALL[what])
    want = attention(small, "ref")[1]
    cases = [case(shape, BATCHES[shape]) for shape in LARGE[what]]
    if what == "decode":
        from pallas_kernels.ragged_paged_attention.tuning import DECODE as table

        key, candidates = (CHIP, heads.head_dim, page_size, kv_dtype), decode_candidates(heads.head_dim)
    else:
        from pallas_kernels.ragged_paged_attention.mosaic_gpu.prefill_tuning import BLOCKS as table

        key, candidates = (CHIP, heads.head_dim, kv_dtype), prefill_candidates()
    time_it = lambda: measure(cases, small, "mosaic_gpu", want, samples)  # noqa: E731
    base = time_it()
    found = try_all({str(c): c for c in candidates}, lambda c: entry(table, key, c), time_it, base)
    best = found[0] if found[0]["score"] is not None and found[0]["score"] < 1 else None
    print(f"\n    {key!r}: {best['candidate']},  # {best['score']:.3f} of the time before" if best else "\ntoday's row is best")
    return found


def tune_xla(samples: int) -> list[dict[str, Any]]:
    """One constant after the other, each kept at the best value found so far. Prints; changes no file."""
    heads = MODELS["peers-small"]

    def case(shape: str, batch: BatchSpec) -> Case:
        return make_case(shape, batch, heads, platform="cpu", dtype="float32", kv_dtype="float32", layers=2)

    small = case("small", SMALL["xla"])
    want = attention(small, "ref")[1]
    cases = [case(shape, BATCHES[shape]) for shape in LARGE["xla"]]
    time_it = lambda: measure(cases, small, "xla", want, samples)  # noqa: E731
    base, best, found = time_it(), {name: getattr(xla, name) for name in XLA_CHOICES}, []
    for name, values in XLA_CHOICES.items():
        results = try_all({f"{name} = {v}": v for v in values if v != best[name]}, lambda v, n=name: entry(vars(xla), n, v),
                          time_it, base)
        found += results
        if results[0]["score"] is not None and results[0]["score"] < 0.98:  # less is noise
            best[name] = vars(xla)[name] = int(results[0]["candidate"].split(" = ")[1])
            base = results[0]["seconds"]
    print("\n" + "\n".join(f"{name} = {value}" for name, value in best.items()))
    return found


def main() -> int:
    """Exit status 2: this machine has no GPU to tune for."""
    parser = argparse.ArgumentParser(prog="bench.tune", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("decode", "prefill", "xla"))
    parser.add_argument("--model", choices=sorted(MODELS), default="llama-3-8b", help="heads, unless --head-dim is given")
    parser.add_argument("--head-dim", type=int)
    parser.add_argument("--kv-dtype", default="bfloat16")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    platform = jax.default_backend()
    if args.what != "xla" and platform != "gpu":
        print(f"bench.tune {args.what}: needs a GPU, this is {platform}", file=sys.stderr)
        return 2
    if args.what == "xla":
        found = tune_xla(args.samples)
    else:
        heads = MODELS[args.model]._replace(head_dim=args.head_dim or MODELS[args.model].head_dim)
        found = tune_mosaic(args.what, heads, args.kv_dtype, args.page_size, args.samples)
    if args.json:
        args.json.write_text(json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "results": found},
                                        indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Truncated sampling: the full sort against the two-stage selection, interleaved, on random logits.

    python -m bench.sampling                               all sizes, about two minutes on two cores
    python -m bench.sampling --vocab 151936 --rows 64      one size

Timed is ``pallas_kernels.sampling``'s ``truncated_argmax`` of given log-probabilities and noise; every run has new noise
and the two must choose the same tokens. "peaked": half of a row's mass or more lies on its 10 likeliest tokens, as
with a language model; "flat": thousands of tokens share it. Peers: none, the sort is the plain way to do it in XLA.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bench.report import add_json, write
from pallas_kernels.sampling.api import truncated_argmax

SETTINGS = {  # top_k, top_p, min_p
    "top_k=1": (1, 1.0, 0.0),
    "top_k=50": (50, 1.0, 0.0),
    "top_k=1000": (1000, 1.0, 0.0),
    "top_p=0.9": (0, 0.9, 0.0),
    "top_p=0.1": (0, 0.1, 0.0),
    "top_k=50 top_p=0.9": (50, 0.9, 0.0),
    "min_p=0.05": (0, 1.0, 0.05),
}
SPREAD = {"peaked": 4.5, "flat": 1.0}  # standard deviation of the logits


def make_inputs(rng: np.random.Generator, rows: int, vocab: int, spread: float) -> tuple[jax.Array, jax.Array]:
    """Race and log-probabilities f32 [rows, vocab]."""
    z = rng.normal(size=(rows, vocab)).astype(np.float32) * np.float32(spread)
    z -= z.max(axis=1, keepdims=True)
    return jnp.asarray(np.exp(z) / rng.exponential(size=z.shape).astype(np.float32)), jnp.asarray(z)


def measure(
    runs: dict[str, Callable[..., jax.Array]], rows: int, vocab: int, spread: float, setting: tuple[int, float, float],
    repeat: int,
) -> dict[str, float]:
    """Median milliseconds of each run, interleaved. RuntimeError if they disagree on a token."""
    rng = np.random.default_rng(0)
    columns = [jnp.full((rows,), value, dtype) for value, dtype in zip(setting, (jnp.int32, jnp.float32, jnp.float32))]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(repeat + 1):  # the first compiles
        if i < 4:
            race, z = make_inputs(rng, rows, vocab, spread)
        tokens = {}
        for name, run in runs.items():
            start = time.perf_counter()
            tokens[name] = np.asarray(run(race, z, *columns))
            times[name].append((time.perf_counter() - start) * 1e3)
        first, *others = tokens.values()
        if any((first != other).any() for other in others):
            raise RuntimeError(f"the implementations disagree at {rows} x {vocab}, {setting}")
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[4096, 32000, 151936])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--repeat", type=int, default=5, help="runs per figure; ten times as many below 300,000 logits")
    add_json(parser)
    args = parser.parse_args()

    runs = {"sort": jax.jit(partial(truncated_argmax, impl="ref")), "two_stage": jax.jit(partial(truncated_argmax, impl="xla"))}
    results = []
    print(f"{'vocab':>7} {'rows':>4} {'logits':6} {'setting':20} {'sort ms':>9} {'two-stage ms':>12} {'ratio':>6}")
    for vocab in args.vocab:
        for rows in args.rows:
            for logits, spread in SPREAD.items():
                for name, setting in SETTINGS.items():
                    repeat = args.repeat * (10 if rows * vocab < 300_000 else 1)
                    ms = measure(runs, rows, vocab, spread, setting, repeat)
                    ratio = ms["sort"] / ms["two_stage"]
                    results.append(dict(vocab=vocab, rows=rows, logits=logits, setting=name, repeat=repeat, ratio=ratio,
                                        sort_ms=ms["sort"], two_stage_ms=ms["two_stage"]))
                    print(f"{vocab:7} {rows:4} {logits:6} {name:20} {ms['sort']:9.3f} {ms['two_stage']:12.3f} {ratio:6.2f}",
                          flush=True)
    write(args.json, {"peers": "none", "results": results})


if __name__ == "__main__":
    main()

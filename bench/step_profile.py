"""The steps of the engine beside what they must take at least: `python -m bench.engine --profile`, under 8 minutes on an H100.

    python -m bench.engine --profile                                     the built-in model
    python -m bench.engine --profile --shape llama-3-8b --attention-impl mosaic_gpu

Plans go straight to the engine's executor, one behind the other as from the scheduler, so that a step takes what the device or
the host takes, whichever is longer. Only the step executables that are measured are compiled, and without a compile cache.

decode    so many sequences x tokens of context, one new token each. Floor: the weights (but an embedding that is looked up) and
          all keys and values, over the measured copy bandwidth.
prefill   one chunk of --max-num-batched-tokens, and one at the end of the longest context. FLOPs: the products, those behind
          the last layer's attention for one row only, and causal attention.
tier      pages of all layers of a KV group from device to host memory and back, gathered and scattered as the engine does.

KV is that of random tokens; sequences have the same, but each its own pages.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import numpy as np

from bench.kernel_cases import reason
from bench.kernel_report import print_table
from bench.limits import measure_limits
from bench.report import origin, write
from bench.roofline import Limits
from bench.timing import Candidate, ends_within, time_together
from jaxkv import SamplingParams
from jaxkv.config import EngineConfig
from jaxkv.device import models
from jaxkv.device.batch import BatchShape, batch_shapes
from jaxkv.device.spec import ModelSpec
from jaxkv.runtime.engine import Engine
from jaxkv.runtime.page_ops import PageForm
from jaxkv.runtime.startup import build_engine
from jaxkv.runtime.weights import find_model, read_config
from jaxkv.types import Admit, Chunk, PageMove, StepHandle, StepPlan, Tier

BATCHES, CONTEXTS, MOVES = (1, 32, 128), (1024, 4096), (1, 4, 16, 64)
SECONDS = 470
HEAD = ("kind", "shape", "time ms", "min-max", "floor ms", "over floor", "GB/s", "TFLOP/s", "of matmul", "tokens/s", "host us")


def run(config: EngineConfig, path: Path | None) -> None:
    """Prints the table; writes the JSON there, after every row. ConfigError for settings that no engine starts with."""
    jax.config.update("jax_enable_compilation_cache", False)
    with ends_within(SECONDS + 90):
        show(profile(config, save=lambda document: write(path, document)))


def profile(
    config: EngineConfig, *, batches: tuple[int, ...] = BATCHES, contexts: tuple[int, ...] = CONTEXTS,
    moves: tuple[int, ...] = MOVES, seconds: float = SECONDS, samples: int = 7,
    save: Callable[[dict[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Every row; after `seconds` no other is begun. contexts: in tokens, at most the window's. `save` gets the document after
    every row."""
    end = time.monotonic() + seconds
    config = replace(config, sched=replace(config.sched, max_num_seqs=max(batches), max_num_batched_tokens=max(
        *batches, config.sched.max_num_batched_tokens)))
    prefill = BatchShape(config.sched.max_num_batched_tokens, max(batches), min(8, max(batches)))
    wanted = (*(BatchShape(n, n, n, decode=True) for n in batches), prefill)
    limits = measure_limits(jax.default_backend(), ("bfloat16", "float16", "float32"))  # before the pools take the memory
    engine, start = start_engine(config, wanted)
    print("\n".join(engine.describe()), flush=True)
    bench = Steps(engine, limits, samples)
    window = sorted({min(context, engine.max_model_len) for context in contexts})
    chunk = min(prefill.tokens, window[-1])
    bench.fill(window[-1], chunk)
    jobs: list[tuple[str, Callable[[], dict[str, Any]]]] = []
    for context in window:
        jobs += [(f"decode {n} x {context}", lambda n=n, context=context: bench.decode(n, context)) for n in batches]
    for before in sorted({0, window[-1] - chunk}):
        jobs.append((f"prefill {chunk} after {before}", lambda before=before: bench.prefill(chunk, before)))
    for n in moves:
        jobs += [(f"tier {n} pages {way}", lambda n=n, way=way: bench.move(n, way)) for way in ("to host", "to device")]
    document = {**origin(), "info": engine.metrics.info, "limits": {"copy": limits.copy, "matmul": dict(limits.matmul)},
                "start": start, "weight_bytes": bench.weights, "rows": [],
                "skipped": [f"{name}: not reached" for name, _ in jobs]}
    skipped = []
    for number, (name, measure) in enumerate(jobs, 1):
        print(f"{name} ...", flush=True)
        try:
            if time.monotonic() > end:
                raise NotImplementedError("out of time")
            document["rows"].append({"kind": name.split()[0], "shape": name.partition(" ")[2], **measure()})
        except Exception as error:  # one row must not cost the others their figures
            skipped.append(f"{name}: {reason(error)}")
        document["skipped"] = skipped + [f"{name}: not reached" for name, _ in jobs[number:]]
        save(document)
    return document


def start_engine(config: EngineConfig, wanted: tuple[BatchShape, ...]) -> tuple[Engine, dict[str, Any]]:
    """An engine with these step executables only, and what the start took in seconds: loading, and compiling them and the page
    moves; executables: how many of how many that this configuration has."""
    compiling: list[float] = []

    def shapes(*_: int) -> tuple[BatchShape, ...]:  # asked for right before the executor compiles
        compiling.append(time.perf_counter())
        return wanted

    begin = time.perf_counter()
    with patch("jaxkv.runtime.executor.batch_shapes", shapes):
        engine = build_engine(config)
    every = batch_shapes(config.sched.max_num_seqs, config.sched.max_num_batched_tokens)
    return engine, {"load_s": compiling[0] - begin, "compile_s": time.perf_counter() - compiling[0],
                    "executables": [len(wanted), len(every)]}


class Steps:
    """Plans for one engine, whose KV pages it gives out as it likes."""

    def __init__(self, engine: Engine, limits: Limits, samples: int) -> None:
        self.executor, self.kv, self.samples = engine.executor, engine.executor.kv, samples
        mesh, info, settings = self.executor.mesh, engine.metrics.info, engine.config
        self.spec = spec = models.spec_from_config(read_config(find_model(settings.model.model)), info["dtype"], tp=mesh.size,
                                                   out_first=info["platform"] == "cpu")
        self.copy, self.matmul = mesh.size * limits.copy, mesh.size * limits.matmul[spec.dtype]
        self.weights = sum(d.nbytes for d in models.weight_table(spec) if spec.tied or d.name != "embed")
        self.host_pages = engine.capacity.num_host_pages[0]
        self.page_bytes = PageForm(self.kv, mesh, settings.cache.kv_codec).bytes[0]
        rng = np.random.default_rng(0)
        self.pages = [rng.permutation(n).tolist() for n in self.kv.num_pages]  # by group, in the order they are given out
        self.tokens = rng.integers(1, spec.vocab_size, 1 << 17).tolist()
        self.submitted = 0
        self.submit(admits=tuple(Admit(slot, str(slot), SamplingParams(temperature=0.0), 0, 0, 1, (), ())
                                 for slot in range(self.executor.slots)))

    def submit(self, **plan: Any) -> StepHandle:
        self.submitted += 1
        return self.executor.submit(StepPlan(self.submitted, **plan))

    def need(self, context: int) -> int:
        return -(-context // self.kv.page_size)

    def pages_of(self, sequence: int, context: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """As in ``Chunk``. A group with a window, which has fewer pages, gives them out again."""
        n = self.need(context)
        return tuple((0, tuple(pages[i % len(pages)] for i in range(sequence * n, (sequence + 1) * n))) for pages in self.pages)

    def chunk(self, tokens: int, before: int, context: int) -> Chunk:
        """Of a prompt of `context` tokens in slot 0."""
        ids = [self.tokens[i % len(self.tokens)] for i in range(before, before + tokens)]
        return Chunk("0", 0, before, tuple(ids), 1, self.pages_of(0, context))

    def fill(self, context: int, chunk: int) -> None:
        """Computes the KV of one sequence in its pages, and copies it to all others."""
        for before in range(0, context, chunk):
            self.submit(chunks=(self.chunk(min(chunk, context - before), before, context),)).read()
        n = self.need(context)
        self.submit(moves=tuple(PageMove(g, (Tier.HBM, pages[i % n]), (Tier.HBM, pages[i]))
                                for g, pages in enumerate(self.pages) for i in range(n, len(pages))))
        jax.block_until_ready(self.executor.state)

    def time(self, step: Callable[[], Any], wait: Callable[[Any], Any]) -> dict[str, Any]:
        """Seconds per step, and CPU microseconds of the host."""
        host = lambda: sum(s for stage, s in self.executor.stage_seconds.items() if stage != "wait")  # noqa: E731
        before, steps = host(), self.submitted
        timing = time_together({"it": Candidate(step, wait, 1)}, samples=self.samples)["it"]
        return {"seconds": timing.median, "low": timing.low, "high": timing.high, "samples": timing.samples,
                "host_us": 1e6 * (host() - before) / (self.submitted - steps)}

    def time_chunks(self, chunks: tuple[Chunk, ...]) -> dict[str, Any]:
        """RuntimeError if the device's memory runs out or there is NaN among the logits."""
        def read(handle: StepHandle) -> None:
            result = handle.read()
            if result.failed or any(token < 0 for row in result.tokens for token in row):
                raise RuntimeError("out of memory" if result.failed else "NaN among the logits")

        read(self.submit(chunks=chunks))
        again = tuple(replace(chunk, pages=()) for chunk in chunks)  # the executor has the page table
        return self.time(lambda: self.submit(chunks=again), read)

    def decode(self, batch: int, context: int) -> dict[str, Any]:
        """One step of `batch` sequences of `context` tokens, the new one included. NotImplementedError: they do not fit."""
        for group, pages in zip(self.kv.groups, self.pages):
            if group.window is None and batch * self.need(context) > len(pages):
                raise NotImplementedError(f"{batch * self.need(context):,} pages, but the pool has {len(pages):,}")
        # -1: the token that the slot sampled last
        timing = self.time_chunks(tuple(Chunk(str(i), i, context - 1, (-1,), 1, self.pages_of(i, context))
                                        for i in range(batch)))
        moved = self.weights + batch * sum(min(context, g.window or context) * g.page_bytes(1) for g in self.kv.groups)
        return timing | {"batch": batch, "context": context, "bytes": moved, "floor": moved / self.copy,
                         "over_floor": timing["seconds"] * self.copy / moved, "gb_s": moved / timing["seconds"] / 1e9,
                         "tokens_s": batch / timing["seconds"]}

    def prefill(self, tokens: int, before: int) -> dict[str, Any]:
        """A chunk of `tokens` behind `before` others."""
        timing = self.time_chunks((self.chunk(tokens, before, before + tokens),))
        flops = prefill_flops(self.spec, tokens, before)
        rate = flops / timing["seconds"]
        return timing | {"tokens": tokens, "before": before, "flops": flops, "tflop_s": rate / 1e12,
                         "matmul_share": rate / self.matmul, "tokens_s": tokens / timing["seconds"]}

    def move(self, pages: int, way: str) -> dict[str, Any]:
        """`pages` of the first KV group "to host" or "to device" in one plan. NotImplementedError: the tier is smaller."""
        if pages > min(self.host_pages, len(self.pages[0])):
            raise NotImplementedError(f"the host tier has {self.host_pages:,} pages")
        drop = tuple(PageMove(0, (Tier.HOST, i), None) for i in range(pages))  # nothing where there is no such page
        down = tuple(PageMove(0, (Tier.HBM, self.pages[0][i]), (Tier.HOST, i)) for i in range(pages))
        up = tuple(PageMove(0, (Tier.HOST, i), (Tier.HBM, self.pages[0][i])) for i in range(pages))
        host = self.executor.tiers.host
        arrived = lambda _: jax.block_until_ready((self.executor.state, list(host.values())))  # noqa: E731
        arrived(self.submit(moves=drop + down))
        timing = self.time(lambda: self.submit(moves=drop + down if way == "to host" else up), arrived)
        arrived(self.submit(moves=drop))
        size = pages * self.page_bytes
        return timing | {"pages": pages, "bytes": size, "gb_s": size / timing["seconds"] / 1e9}


def prefill_flops(spec: ModelSpec, tokens: int, before: int) -> float:
    """That a chunk of `tokens` behind `before` others needs for one row of logits; multiply and add are two."""
    last = f"layers.{spec.num_layers - 1}."
    flops = 2.0 * spec.vocab_size * spec.hidden_size
    for decl in models.weight_table(spec):
        if decl.name.startswith("layers.") and len(decl.shape) == 2:
            rows = 1 if decl.name.startswith(last) and not decl.name.endswith("qkv") else tokens
            flops += 2.0 * rows * decl.shape[0] * decl.shape[1]
    positions = np.arange(before + 1, before + tokens + 1)
    for window in spec.windows:
        flops += 4.0 * np.minimum(positions, window or positions).sum() * spec.head_dim * spec.num_heads
    return float(flops)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    ms = lambda s: f"{1e3 * s:.4g}"  # noqa: E731
    form = {"floor": ms, "over_floor": "{:.2f}x".format, "gb_s": "{:.3g}".format, "tflop_s": "{:.3g}".format,
            "matmul_share": "{:.0%}".format, "tokens_s": "{:.0f}".format, "host_us": "{:.0f}".format}
    return (row["kind"], row["shape"], ms(row["seconds"]), f"{ms(row['low'])}-{ms(row['high'])}",
            *(show(row[field]) if field in row else "" for field, show in form.items()))


def show(document: dict[str, Any]) -> None:
    """Prints all of it."""
    limits, start = document["limits"], document["start"]
    print(f"\n{document['device']}, {document['cpus']} CPUs, jax {document['jax']}, commit {document['commit']}")
    print(f"measured limits: copy {limits['copy'] / 1e9:.1f} GB/s read and written, " + ", ".join(
        f"{dtype} products {rate / 1e12:.2f} TFLOP/s" for dtype, rate in limits["matmul"].items()))
    made, every = start["executables"]
    print(f"start: loaded in {start['load_s']:.1f} s; {made} of the {every} step executables and the page moves compiled in "
          f"{start['compile_s']:.1f} s, without a compile cache")
    print_table(HEAD, [cells(row) for row in document["rows"]])
    for line in document["skipped"]:
        print(f"not measured: {line}")

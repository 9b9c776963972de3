"""The kernel benchmark's rows: what is asked of a device, and the measuring of it, section by section.

Every implementation's output is compared with the first one's, and every peer's with ours, before anything is timed: one
that differs is listed as wrong and has no time. Candidates of one shape are timed in turn.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from bench.kernel_cases import TOLERANCE, Case, attention, difference, make_case, reason
from bench.kernel_peers import peers
from bench.page_moves import Sizes, moves
from bench.roofline import KINDS, QUANTISED, Limits, Work, attention_work, bound, kind_of
from bench.timing import Candidate, Timing, time_together
from pallas_kernels.arg_specs import BATCHES, MODELS


class Setup(NamedTuple):
    """What is asked of a device. shapes: names in `arg_specs.BATCHES`, of each kind the most important first; quantised, mass:
    the same, for those comparisons; kv_dtypes: the first is what the others are compared with; layers: in one program."""

    model: str
    dtype: str
    layers: int
    shapes: tuple[str, ...]
    quantised: tuple[str, ...]
    kv_dtypes: tuple[str, ...]
    mass: tuple[str, ...]
    writes: tuple[int, ...]
    batches: tuple[int, ...]
    pool_pages: int
    sampling: tuple[int, int]


CPU = Setup("peers-small", "float32", 2, (
    "decode-1", "decode-8", "decode-32-ragged", "decode-24-shared", "prefill-512", "prefill-2048", "mixed"),
    ("decode-32-ragged",), ("bfloat16", "float32", "int8", "float8_e4m3fn"), ("decode-32-ragged",),
    (1, 64, 512), (1, 4, 16), 1024, (8, 32000))
GPU = Setup("llama-3-8b", "bfloat16", 1, (
    *(f"decode-{n}" for n in ("32x4k", "1x32k", "128x4k", "8x32k", "1x4k", "32x32k", "256x4k", "128x1k", "8x4k", "1x1k",
                              "32x1k", "256x1k", "8x1k", "128x32k", "256x32k")), "decode-64-shared-8k",
    *(f"prefill-{k}k" for k in (8, 32, 2, 16, 4)), "mixed-64"),
    ("decode-32x4k", "decode-128x4k", "decode-8x32k", "prefill-8k"), ("bfloat16", "int8", "float8_e4m3fn"),
    ("decode-32x4k", "decode-8x32k"), (64, 8192), (1, 4, 16, 64, 256), 4096, (64, 151936))
TINY = Setup("default", "float32", 1, ("decode-1",), ("decode-1",), ("bfloat16", "int8"), ("decode-1",), (8,), (2,), 16,
             (2, 64))


class Bench:
    """Collects rows until its time is up."""

    def __init__(self, setup: Setup, platform: str, limits: Limits, seconds: float, samples: int) -> None:
        self.setup, self.platform, self.limits, self.samples = setup, platform, limits, samples
        self.names = ["xla"] + {"gpu": ["mosaic_gpu"], "tpu": ["mosaic_tpu"]}.get(platform, [])
        self.end = time.monotonic() + seconds
        self.rows: list[dict[str, Any]] = []
        self.skipped: list[str] = []
        everyone = peers(platform)
        self.peers = [p for p in everyone if p.absent is None]
        self.absent = {p.name: p.absent for p in everyone if p.absent is not None}

    def late(self) -> bool:
        return time.monotonic() > self.end

    def section(self, name: str, measure: Callable[[], None]) -> None:
        """Runs `measure` if there is time; what does not fit the device's memory is left out with its reason."""
        if self.late():
            self.skipped.append(f"{name}: out of time")
            return
        print(f"{name} ...", flush=True)
        try:
            measure()
        except Exception as error:  # one shape must not cost the others their figures
            self.skipped.append(f"{name}: {reason(error)}")

    def case(self, shape: str, kv_dtype: str) -> Case:
        return make_case(shape, BATCHES[shape], MODELS[self.setup.model], platform=self.platform, dtype=self.setup.dtype,
                         kv_dtype=kv_dtype, layers=self.setup.layers)

    def time(self, candidates: dict[Any, Candidate]) -> dict[Any, Timing]:
        return time_together(candidates, samples=self.samples)

    def row(self, kind: str, shape: str, impl: str, work: Work, *, case: Any = None, kv_dtype: str = "", ours: bool = True,
            timing: Any = None, status: str = "ok", error: float | None = None, **more: Any) -> None:
        """Adds a row; `timing` None with the reason as `status`."""
        row: dict[str, Any] = dict(kind=kind, shape=shape, impl=impl, ours=ours, status=status, batch=1, context=0, head_dim=0,
                                   kv_dtype=kv_dtype, bytes=work.bytes, flops=work.flops,
                                   error=error if math.isfinite(error or 0.0) else None)
        if case is not None:
            row |= dict(batch=len(case.batch.kv_lens), context=min(case.batch.kv_lens), head_dim=case.heads.head_dim,
                        q_heads=case.heads.q_heads, kv_heads=case.heads.kv_heads, dtype=case.q.dtype.name,
                        kv_dtype=case.kv_dtype, page_size=case.page_size, calls_per_run=case.calls)
        if timing is not None:
            name, least = bound(work, self.limits, self.setup.dtype)
            s = timing.median
            row |= {f"{field}_best": value for field, value in (more.pop("best", None) or {}).items()}
            row |= dict(copy_share_best=work.bytes / timing.low / self.limits.copy,
                        matmul_share_best=work.flops / timing.low / self.limits.matmul[self.setup.dtype])
            row |= dict(seconds=s, low=timing.low, high=timing.high, samples=timing.samples, gb_s=work.bytes / s / 1e9,
                        tflop_s=work.flops / s / 1e12, bound=name, share=0.0 if kind == "tier" else least / s,
                        copy_share=work.bytes / s / self.limits.copy, matmul_share=work.flops / s / self.limits.matmul[
                            self.setup.dtype], tokens_s=row["batch"] / s, **more)
        self.rows.append(row)

    def attention(self, shape: str) -> None:
        """Ours and the peers', one shape."""
        case = self.case(shape, self.setup.dtype)
        work, ready, errors, refused = attention_work(case.batch, case.heads, case.kv_dtype), {}, {}, {}
        want = self.prepare(case, "", ready, errors, refused)
        ours = set(ready)
        for peer in self.peers if want is not None else ():
            if self.late():
                refused[peer.name] = "out of time"
                continue
            try:
                prepared = peer.prepare(case)
                errors[peer.name] = difference(prepared.first(), want)
                ready[peer.name] = prepared.candidate
            except Exception as error:  # whatever stops a peer is its result
                refused[peer.name] = reason(error)
        self.drop_wrong(case, ready, errors, refused)
        times = self.time(ready)
        for name in [*self.names, *(p.name for p in self.peers)]:
            timing, more = times.get(name), {}
            if name in ours and timing:
                more = self.against(timing.median, {n: t.median for n, t in times.items()})
                more |= {"best": self.against(timing.low, {n: t.low for n, t in times.items()})}
            if timing or name in self.names or not refused.get(name, "refused").startswith("refused"):
                self.row(kind_of(case.batch), shape, name, work, case=case, ours=name in self.names, timing=timing,
                         status=refused.get(name, "ok"), error=errors.get(name), **more)

    def prepare(self, case: Case, prefix: str, ready: dict[str, Any], errors: dict[str, float], refused: dict[str, str]) -> Any:
        """Our implementations under `prefix` + name; the first one's output, which the others are compared with."""
        want = None
        for name in self.names:
            if self.late():
                refused[prefix + name] = "out of time"
                continue
            try:
                ready[prefix + name], first = attention(case, name)
            except RuntimeError as error:
                refused[prefix + name] = str(error)
                continue
            want = first if want is None else want
            errors[prefix + name] = difference(first, want)
        return want

    @staticmethod
    def drop_wrong(case: Any, ready: dict[str, Any], errors: dict[str, float], refused: dict[str, str]) -> None:
        """Takes out of `ready` what computes something else."""
        for name, error in errors.items():
            if error > TOLERANCE[case.q.dtype.name]:
                ready.pop(name, None)
                refused[name] = f"wrong: differs by {error:.2g} of a row's size"

    @staticmethod
    def against(seconds: float, times: dict[str, float]) -> dict[str, float]:
        """How many times as fast as the fastest of PyTorch's ways, and as cuDNN."""
        torch = [t for name, t in times.items() if name.startswith("torch sdpa")]
        out = {"speed_vs_torch": min(torch) / seconds} if torch else {}
        return out | ({"speed_vs_cudnn": times["cudnn"] / seconds} if "cudnn" in times else {})

    def quantised(self, shape: str) -> None:
        """A shape with every KV dtype; the first implementation's output is what the others must give."""
        cases = {kv: self.case(shape, kv) for kv in self.setup.kv_dtypes}
        ready: dict[str, Any] = {}
        errors: dict[str, float] = {}
        refused: dict[str, str] = {}
        for kv, case in cases.items():
            self.prepare(case, f"{kv} ", ready, errors, refused)
            self.drop_wrong(case, ready, errors, refused)
        times = self.time(ready)
        base = [t for key, t in times.items() if key.startswith("bfloat16 ")]
        for kv, case in cases.items():
            for name in self.names:
                timing = times.get(f"{kv} {name}")
                more: dict[str, Any] = {}
                if timing and base and kv in QUANTISED:
                    more = {"speed_vs_bf16": min(t.median for t in base) / timing.median,
                            "best": {"speed_vs_bf16": min(t.low for t in base) / timing.low}}
                self.row(f"{kind_of(case.batch)}-quantised", f"{shape} {kv}", name, attention_work(case.batch, case.heads, kv),
                         case=case, timing=timing, status=refused.get(f"{kv} {name}", "ok"),
                         error=errors.get(f"{kv} {name}"), **more)

    def mass(self, shape: str) -> None:
        """What the attention mass by page costs."""
        case = self.case(shape, self.setup.dtype)
        work, ready, refused = attention_work(case.batch, case.heads, case.kv_dtype), {}, {}
        for name in self.names:
            for mass in (None, "page"):
                if self.late():
                    refused[name, mass] = "out of time"
                    continue
                try:
                    ready[name, mass], _ = attention(case, name, mass, check=False)
                except RuntimeError as error:
                    refused[name, mass] = str(error)
        times = self.time(ready)
        for name in self.names:
            plain, timing = times.get((name, None)), times.get((name, "page"))
            more: dict[str, Any] = {}
            if plain and timing:
                more = {"speed_vs_plain": plain.median / timing.median, "best": {"speed_vs_plain": plain.low / timing.low}}
            status = refused.get((name, "page"), "ok")
            self.row("decode-mass", shape, name, work, case=case, timing=timing, status=status, **more)

    def moves(self, kinds: set[str]) -> None:
        """kv_write, page copies and tier moves. Pages are the engine's: all layers of the model at once."""
        heads = MODELS[self.setup.model]
        sizes = Sizes(heads, self.setup.dtype, 16, heads.layers, self.setup.pool_pages, self.setup.writes, self.setup.batches)
        for move in moves(sizes, self.platform, self.names):
            if move.kind not in kinds:
                continue
            if self.late():
                self.skipped.append(f"{move.kind} {move.shape} {move.impl}: out of time")
                continue
            timing, status = None, "ok"
            try:
                timing = self.time({"it": move.make()})["it"]
            except RuntimeError as error:
                status = str(error)
            self.row(move.kind, move.shape, move.impl, Work(move.bytes, 0.0), kv_dtype=self.setup.dtype, timing=timing,
                     status=status)

    def sampling(self) -> None:
        """Truncated sampling at one size; `bench.sampling` has them all."""
        from bench.sampling import SETTINGS, SPREAD, measure
        from pallas_kernels.sampling.api import truncated_argmax

        rows, vocab = self.setup.sampling
        runs = {name: jax.jit(partial(truncated_argmax, impl=name)) for name in ("xla", "ref")}
        for setting in ("top_p=0.9", "top_k=50 top_p=0.9"):
            if self.late():
                self.skipped.append(f"sampling {rows}x{vocab} {setting}: out of time")
                continue
            ms = measure(runs, rows, vocab, SPREAD["peaked"], SETTINGS[setting], self.samples)
            for name, median in ms.items():
                t = Timing(*[1e-3 * median] * 3, self.samples)
                self.row("sampling", f"{rows}x{vocab} {setting}", name, Work(2 * 4 * rows * vocab, 0.0), timing=t,
                         speed_vs_sort=ms["ref"] / median)


def sections(bench: Bench, kinds: set[str]) -> list[tuple[str, Callable[[], None]]]:
    """What was asked for: the first of every kind, then the second of every kind, and so on, so that each gets some time."""
    by_kind: dict[str, list[tuple[str, Callable[[], None]]]] = {kind: [] for kind in KINDS}
    for shape in bench.setup.shapes:
        by_kind[kind_of(BATCHES[shape])].append((shape, partial(bench.attention, shape)))
    for what, shapes, measure in (("quantised", bench.setup.quantised, bench.quantised),
                                  ("mass", bench.setup.mass, bench.mass)):
        for shape in shapes:
            kind = f"{kind_of(BATCHES[shape])}-{what}"
            by_kind[kind].append((f"{kind} {shape}", partial(measure, shape)))
    for kind in ("kv_write", "page_copy", "tier"):
        by_kind[kind].append((kind, partial(bench.moves, {kind})))
    by_kind["sampling"].append(("sampling", bench.sampling))
    rounds = itertools.zip_longest(*(by_kind[kind] for kind in KINDS if kind in kinds))
    return [section for turn in rounds for section in turn if section]


def measure_all(bench: Bench, kinds: set[str], after: Callable[[list[str]], Any]) -> None:
    """Every section of the setup that was asked for; `after` each, with the names of those that wait."""
    todo = sections(bench, kinds)
    for number, (name, measure) in enumerate(todo, 1):
        bench.section(name, measure)
        after([waiting for waiting, _ in todo[number:]])

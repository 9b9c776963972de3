"""What a kernel has to move and compute, what the machine can do, and the targets. Arithmetic only: no array is touched.

Conventions: a byte of KV that several sequences share counts once; attention is 4 * Tq * Tk * D * Hq FLOPs, half of that over
the square in which a causal chunk sees itself (FlashAttention's count); rates are per second, in GB (1e9) and TFLOP (1e12).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pallas_kernels.arg_specs import BatchSpec, HeadSpec

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8_e4m3fn": 1}
QUANTISED = ("int8", "float8_e4m3fn")
KINDS = ("decode", "prefill", "decode-quantised", "page_copy", "decode-mass", "sampling", "shared", "mixed", "kv_write", "tier",
         "prefill-quantised")  # of rows; those with a target first


class Limits(NamedTuple):
    """Of the machine, measured. copy: bytes read plus written per second; matmul: FLOP/s by dtype name."""

    copy: float
    matmul: Mapping[str, float]


class Work(NamedTuple):
    """Of one call. bytes: of KV that must be read at least once (or moved, for other kernels: read and written)."""

    bytes: int
    flops: float


def token_bytes(heads: HeadSpec, kv_dtype: str) -> int:
    """Bytes of one token's keys and values in one layer, scales included."""
    row = heads.head_dim * BYTES[kv_dtype] + (4 if kv_dtype in QUANTISED else 0)
    return 2 * heads.kv_heads * row


def attention_work(batch: BatchSpec, heads: HeadSpec, kv_dtype: str) -> Work:
    """Of one call over `batch`, without a window."""
    tokens = sum(batch.kv_lens) - batch.shared * (len(batch.kv_lens) - 1)
    pairs = sum(q * (kv - q) + q * q / 2 for q, kv in zip(batch.q_lens, batch.kv_lens))
    return Work(tokens * token_bytes(heads, kv_dtype), 4.0 * pairs * heads.head_dim * heads.q_heads)


def kind_of(batch: BatchSpec) -> str:
    """decode (one query each), shared (the same over a common prefix), mixed (some of each) or prefill."""
    if max(batch.q_lens) == 1:
        return "shared" if batch.shared else "decode"
    return "mixed" if min(batch.q_lens) == 1 else "prefill"


def bound(work: Work, limits: Limits, dtype: str) -> tuple[str, float]:
    """What limits the call ("memory" or "compute") and the seconds it needs at least by the measured limits."""
    memory, compute = work.bytes / limits.copy, work.flops / limits.matmul[dtype]
    return ("memory", memory) if memory >= compute else ("compute", compute)


class Target(NamedTuple):
    """A promise about rows of a result. platform: where it applies; kind: of row; field: the figure, which must be at least
    `least`; batch, context: only rows with at least (or, `exact`, exactly) so much of both; head_dim: only this one."""

    name: str
    platform: str
    kind: str
    field: str
    least: float
    batch: int = 0
    context: int = 0
    exact: bool = False
    head_dim: int | None = None

    def applies(self, row: Mapping[str, Any]) -> bool:
        size = (row["batch"], row["context"])
        fits = size == (self.batch, self.context) if self.exact else size[0] >= self.batch and size[1] >= self.context
        return row["kind"] == self.kind and fits and self.head_dim in (None, row["head_dim"])


TARGETS = (
    Target("decode >= 90 % of copy bandwidth from 32 x 4k up", "gpu", "decode", "copy_share", 0.90, 32, 4096),
    Target("decode >= 75 % of copy bandwidth at 1 x 32k", "gpu", "decode", "copy_share", 0.75, 1, 32768, exact=True),
    Target("prefill from 8k up >= 0.9x cuDNN", "gpu", "prefill", "speed_vs_cudnn", 0.9, 1, 8192, head_dim=128),
    Target("prefill from 8k up >= 65 % of the matmul rate", "gpu", "prefill", "matmul_share", 0.65, 1, 8192, head_dim=128),
    Target("prefill from 8k up >= 75 % of the matmul rate, the next step", "gpu", "prefill", "matmul_share", 0.75, 1, 8192,
           head_dim=128),
    Target("int8/fp8 KV decode >= 1.7x bf16 tokens/s", "gpu", "decode-quantised", "speed_vs_bf16", 1.7),
    Target("page_copy >= 90 % of copy bandwidth", "gpu", "page_copy", "copy_share", 0.90),
    Target("mass by page costs <= 10 %", "gpu", "decode-mass", "speed_vs_plain", 1 / 1.1),
    Target("truncated sampling >= 3x the sort", "gpu", "sampling", "speed_vs_sort", 3.0),
    Target("decode ahead of PyTorch SDPA", "cpu", "decode", "speed_vs_torch", 1.0),
    Target("shared-prefix decode ahead of PyTorch SDPA", "cpu", "shared", "speed_vs_torch", 1.0),
    Target("prefill within 1.5x of PyTorch SDPA", "cpu", "prefill", "speed_vs_torch", 1 / 1.5),
)


class Verdict(NamedTuple):
    """How one target came out at one row's shape; value None where there is nothing to judge. unclear: the medians say one
    thing and the best samples another, so the machine was too busy to tell."""

    target: str
    shape: str
    value: float | None
    least: float
    verdict: str  # met, missed, unclear, not measured, not on this device


def judge(rows: list[dict[str, Any]], platform: str, targets: tuple[Target, ...] = TARGETS) -> list[Verdict]:
    """Every target at every shape it speaks of, by our fastest implementation there."""
    verdicts = []
    for target in targets:
        if target.platform != platform:
            verdicts.append(Verdict(target.name, "", None, target.least, "not on this device"))
            continue
        ours = sorted((r for r in rows if r["ours"] and r.get("seconds") and target.applies(r)), key=lambda r: -r["seconds"])
        fastest = {row["shape"]: row for row in ours}
        best = {shape: (row[target.field], row.get(f"{target.field}_best", row[target.field]))  # by medians, by best samples
                for shape, row in fastest.items() if row.get(target.field) is not None}
        for shape, values in best.items():
            met = [value >= target.least for value in values]
            verdict = "unclear" if met[0] != met[1] else "met" if met[0] else "missed"
            verdicts.append(Verdict(target.name, shape, values[0], target.least, verdict))
        if not best:
            verdicts.append(Verdict(target.name, "", None, target.least, "not measured"))
    return verdicts


def losses(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Shapes where somebody else is faster than the best of ours: kind, shape, peer and how many times faster."""
    lost = []
    shapes = {(row["kind"], row["shape"]) for row in rows if row["ours"]}
    for kind, shape in sorted(shapes):
        here = [r for r in rows if (r["kind"], r["shape"]) == (kind, shape) and r.get("seconds")]
        ours = min((r["seconds"] for r in here if r["ours"]), default=None)
        for row in here:
            if ours is not None and not row["ours"] and row["seconds"] < ours:
                lost.append({"kind": kind, "shape": shape, "peer": row["impl"], "times": ours / row["seconds"]})
    return lost

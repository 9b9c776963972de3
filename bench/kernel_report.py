"""The kernel benchmark's table and its JSON document."""

from __future__ import annotations

from typing import Any

from bench.report import origin
from bench.roofline import Limits, Verdict

HEAD = ("kind", "shape", "KV", "implementation", "time us", "min-max", "GB/s", "TFLOP/s", "of limit", "note")


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    name = ("" if row["ours"] else "· ") + row["impl"]
    if row["status"] != "ok":
        return (row["kind"], row["shape"], row["kv_dtype"], name, "", "", "", "", "", row["status"])
    us = lambda s: f"{1e6 * s:.1f}" if s < 1e-3 else f"{1e6 * s:.0f}"  # noqa: E731
    note = [f"{label} {row[field]:.2f}x" for field, label in RATIOS.items() if row.get(field)]
    return (row["kind"], row["shape"], row["kv_dtype"], name, us(row["seconds"]), f"{us(row['low'])}-{us(row['high'])}",
            f"{row['gb_s']:.3g}", f"{row['tflop_s']:.3g}" if row["tflop_s"] else "",
            f"{row['share']:.0%} {row['bound']}" if row["share"] else "", ", ".join(note))


RATIOS = {"speed_vs_torch": "vs torch", "speed_vs_cudnn": "vs cuDNN", "speed_vs_bf16": "vs bf16 KV",
          "speed_vs_plain": "vs plain", "speed_vs_sort": "vs sort"}


def show(document: dict[str, Any]) -> None:
    """Prints everything a document says; with rich if it is there."""
    limits = document["limits"]
    print(f"\n{document['device']}, {document['cpus']} CPUs, jax {document['jax']}, commit {document['commit']}")
    print(f"measured limits: copy {limits['copy'] / 1e9:.1f} GB/s read and written, " + ", ".join(
        f"{dtype} products {rate / 1e12:.2f} TFLOP/s" for dtype, rate in limits["matmul"].items()))
    print_table(HEAD, [cells(row) for row in document["rows"]])
    for name, why in document["absent"].items():
        print(f"absent: {name}: {why}")
    for line in document["skipped"]:
        print(f"not measured: {line}")
    print("\nTargets (the fastest of ours)")
    print_table(("target", "shape", "value", "wanted", "verdict"), [
        (v["target"], v["shape"], "" if v["value"] is None else f"{v['value']:.3f}", f"{v['least']:.3f}", v["verdict"])
        for v in document["targets"]])
    print("\nShapes where a peer is faster:" + ("" if document["losses"] else " none"))
    for loss in document["losses"]:
        print(f"  {loss['kind']} {loss['shape']}: {loss['peer']} is {loss['times']:.2f}x as fast")


def print_table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
        for r in [head, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(r, widths)).rstrip())
        return
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    console = Console()
    Console(width=max(console.width, 150), markup=False).print(table)


def document(
    limits: Limits, rows: list[dict[str, Any]], verdicts: list[Verdict], lost: list[dict[str, Any]], absent: dict[str, str],
    skipped: list[str], tests: str,
) -> dict[str, Any]:
    """What is written as JSON: where and how it was measured, then every figure."""
    return {**origin(), "tests": tests,
            "limits": {"copy": limits.copy, "matmul": dict(limits.matmul)}, "rows": rows,
            "targets": [v._asdict() for v in verdicts], "losses": lost, "absent": absent, "skipped": skipped}

"""Owns the loss curve: a training log (log.jsonl) becomes default_curve.png and the table in the README.

Usage: python checkpoints/plot_log.py --run /tmp/tiny
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
CURVES = {"recall_plain": "recall, plain", "recall_chat": "recall, chat", "join": "join", "copy": "copy"}


def read_log(path: Path) -> list[dict[str, float]]:
    """One record per step; where the run went back to a checkpoint, the later record counts."""
    records = {record["step"]: record for record in map(json.loads, path.read_text().splitlines())}
    return [records[step] for step in sorted(records)]


def smooth(records: list[dict[str, float]], key: str, width: int = 25) -> tuple[list[float], list[float]]:
    """Means over groups of `width` steps, against millions of tokens seen."""
    xs, ys, seen = [], [], 0.0
    for first in range(0, len(records), width):
        group = records[first : first + width]
        seen += sum(record["tokens"] for record in group) / 1e6
        if values := [record[key] for record in group if key in record]:
            xs.append(seen)
            ys.append(sum(values) / len(values))
    return xs, ys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=HERE / "default_curve.png")
    args = parser.parse_args()
    records = read_log(args.run / "log.jsonl")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), dpi=80)
    left.plot(*smooth(records, "text_loss"), color="black")
    left.set(xlabel="million tokens", ylabel="training loss on text (nats per token)", ylim=(1.5, 6))
    for key, label in CURVES.items():
        right.plot(*smooth(records, key), label=label)
    right.set(xlabel="million tokens", ylabel="answers right as a whole (training rows)", ylim=(0, 1))
    right.legend()
    figure.tight_layout()
    figure.savefig(args.out)
    tokens, seconds = sum(r["tokens"] for r in records), sum(r["seconds"] for r in records)
    print(f"{len(records)} steps, {tokens} tokens, {seconds:.0f} s in steps, {tokens / seconds:.0f} tokens/s")
    print("| step | text loss | recall, plain | recall, chat | join | copy |\n|---|---|---|---|---|---|")
    for first in range(0, len(records), 150):
        group = records[first : first + 150][-25:]
        means = [smooth(group, key, len(group))[1] for key in ("text_loss", *CURVES)]
        print("| " + " | ".join([str(int(group[-1]["step"]) + 1), *(f"{m[0]:.3f}" if m else "" for m in means)]) + " |")


if __name__ == "__main__":
    main()

"""``jaxkv bench``: puts load on an OpenAI-compatible server and says how it did, as a table and as JSON."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jaxkv.cli import OneLineParser, one_line_errors
from jaxkv.commands.http import HttpError, Server
from jaxkv.commands.load import Load, Record, run
from jaxkv.commands.tables import facts, table
from jaxkv.config import ConfigError

PROG = "python -m jaxkv.commands.bench"
PERCENTILES = (50, 90, 99)
_HELP = {
    "workload": "random: prompts have nothing in common; shared-prefix; multi-turn: each prompt holds the talk so far",
    "num_requests": "requests in all", "input_len": "new tokens of a prompt", "output_len": "tokens of an answer",
    "prefix_len": "tokens that the prompts of shared-prefix begin with", "turns": "turns of a multi-turn conversation",
    "concurrency": "requests (multi-turn: conversations) under way at once, at most",
    "request_rate": "arrivals a second, Poisson (default: as soon as there is room)", "seed": "of prompts and arrivals",
    "timeout": "seconds for a request",
}


def make_parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The server and the load."""
    parser = OneLineParser(prog, usage=f"{prog} [OPTIONS] [-- OPTIONS OF jaxkv serve]",
                           description="Puts load on a server. Without --url one is started, with the options behind --.")
    group = parser.add_argument_group("server")
    group.add_argument("--url", metavar="URL", help="a running server (default: start one)")
    group.add_argument("--api-key", metavar="KEY", help="the server's key")
    group.add_argument("--model", metavar="NAME", help="the server's name of the model (default: the first it lists)")
    group = parser.add_argument_group("load")
    for item in fields(Load):
        kind = {"int": int, "float": float, "float | None": float, "str": str}[str(item.type)]
        default = f" (default: {item.default})" if item.default is not None else ""
        group.add_argument(f"--{item.name.replace('_', '-')}", type=kind, default=item.default, help=_HELP[item.name] + default,
                           choices=("random", "shared-prefix", "multi-turn") if item.name == "workload" else None,
                           metavar=None if item.name == "workload" else "N" if kind is int else "X")
    group = parser.add_argument_group("output")
    group.add_argument("--json", metavar="FILE", help="writes settings, summary and every request's times")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Returns 0, 1 if a request failed; 2 for settings that cannot work and for a server that does not answer."""
    argv = list(sys.argv[1:] if argv is None else argv)
    own, _, options = (argv[:argv.index("--")], "", argv[argv.index("--") + 1:]) if "--" in argv else (argv, "", [])
    args = make_parser(prog).parse_args(own)
    with one_line_errors(prog, args):
        load = _load(args)
        if args.url and options:
            raise ConfigError(f"{options[0]} is for a server to start, but url names one")
        with contextlib.nullcontext(args.url) if args.url else _started(options) as url:
            report = _measure(Server(url, args.api_key), args.model, load)
        if args.json:
            try:
                Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
            except OSError as error:
                raise ConfigError(f"json {args.json!r} cannot be written: {error.strerror}") from None
    print(show(report["summary"]))
    return 1 if report["summary"]["errors"] else 0


def summary(records: Sequence[Record]) -> dict[str, Any]:
    """Totals, rates and percentiles. Milliseconds; ``tpot`` is the mean time between an answer's tokens, ``itl`` each gap."""
    good = [r for r in records if not r.error]
    errors = Counter(r.error for r in records if r.error)
    found: dict[str, Any] = {"requests": len(records), "failed": len(records) - len(good), "errors": dict(errors)}
    if not good:
        return found
    wall = max(r.end for r in good) - min(r.due for r in good)
    prompt, output, cached = (sum(getattr(r, name) for r in good)
                              for name in ("prompt_tokens", "output_tokens", "cached_tokens"))
    times = {
        "ttft": [r.times[0] - r.due for r in good],
        "tpot": [(r.times[-1] - r.times[0]) / (r.output_tokens - 1) for r in good if r.output_tokens > 1],
        "itl": [b - a for r in good for a, b in zip(r.times, r.times[1:])],
        "e2e": [r.end - r.due for r in good],
    }
    return found | {
        "wall_s": wall, "prompt_tokens": prompt, "output_tokens": output, "cached_tokens": cached, "hit_rate": cached / prompt,
        "requests_s": len(good) / wall, "output_tokens_s": output / wall, "tokens_s": (prompt + output) / wall,
        **{f"{name}_ms": {"mean": 1e3 * sum(values) / len(values)} | {f"p{p}": 1e3 * percentile(values, p) for p in PERCENTILES}
           for name, values in times.items() if values},
    }


def percentile(values: Sequence[float], p: float) -> float:
    """Linear between the closest ranks, as NumPy's default."""
    ordered = sorted(values)
    at = (len(ordered) - 1) * p / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def show(found: dict[str, Any]) -> str:
    """The summary for a person."""
    rows: list[tuple[str, object]] = [("requests", f"{found['requests']} ({found['failed']} failed)")]
    parts = []
    if "wall_s" in found:
        rows += [
            ("time", f"{found['wall_s']:.2f} s"), ("requests/s", f"{found['requests_s']:.2f}"),
            ("tokens/s", f"{found['output_tokens_s']:,.1f} output, {found['tokens_s']:,.1f} with prompts"),
            ("prompt tokens", f"{found['prompt_tokens']:,}, {100 * found['hit_rate']:.1f} % from the cache"),
            ("output tokens", f"{found['output_tokens']:,}")]
        names = {"ttft": "first token", "tpot": "per output token", "itl": "between tokens", "e2e": "whole request"}
        parts.append(table(("ms", "mean", *(f"p{p}" for p in PERCENTILES)),
                           [(text, *(f"{value:.2f}" for value in found[f"{name}_ms"].values()))
                            for name, text in names.items() if f"{name}_ms" in found]))
    parts += [f"{count} failed: {error}" for error, count in found["errors"].items()]
    return "\n\n".join([facts(rows), *parts])


def _load(args: argparse.Namespace) -> Load:
    load = Load(**{item.name: getattr(args, item.name) for item in fields(Load)})
    for name in ("num_requests", "input_len", "output_len", "prefix_len", "turns", "concurrency"):
        if getattr(load, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(load, name)}")
    for name in ("request_rate", "timeout"):
        value = getattr(load, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"{name} must be a positive number, got {value}")
    return load


def _measure(server: Server, model: str | None, load: Load) -> dict[str, Any]:
    try:
        if model is None:
            model = asyncio.run(server.get("/v1/models"))["data"][0]["id"]
    except HttpError as error:
        raise ConfigError(f"url: {error}") from None
    with tqdm(total=load.num_requests, unit="request", disable=not sys.stderr.isatty(), leave=False) as bar:
        records = asyncio.run(run(server, model, load, bar.update))
    return {"model": model, "load": asdict(load), "summary": summary(records), "requests": [asdict(r) for r in records]}


@contextlib.contextmanager
def _started(options: Sequence[str]) -> Iterator[str]:
    """The URL of a server of our own, which ends with the block. Its output goes to stderr."""
    child = subprocess.Popen([sys.executable, "-m", "jaxkv.serve", "--port", "0", *options], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", file=sys.stderr)
            if line.startswith("ready: "):
                break
        else:
            raise ConfigError(f"the server ended with exit code {child.wait()}")
        yield line.split()[1]
    finally:
        child.terminate()
        child.wait()


if __name__ == "__main__":
    raise SystemExit(main())

"""``jaxkv inspect``: the cache of a running server, a model directory, or a directory of the disk tier, as tables or JSON."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxkv.cli import OneLineParser, one_line_errors
from jaxkv.commands.http import HttpError, Server
from jaxkv.commands.tables import facts, size, table
from jaxkv.config import DTYPES, KV_CACHE_DTYPES, ConfigError, parse_size

PROG = "python -m jaxkv.commands.inspect"


def make_parser(prog: str = PROG) -> argparse.ArgumentParser:
    """The target and what is to be known of it."""
    parser = OneLineParser(prog, usage=f"{prog} [OPTIONS] [TARGET]",
                           description="Shows what a server's KV cache holds, or what a directory holds.")
    parser.add_argument("target", nargs="?", metavar="TARGET",
                        help="a server's URL, a model directory, or a directory of --disk-kv-path (default: our own model)")
    parser.add_argument("--json", action="store_true", help="JSON instead of tables")
    server = parser.add_argument_group("server")
    server.add_argument("--api-key", metavar="KEY", help="the server's key")
    server.add_argument("--top", type=int, default=10, metavar="N", help="prefixes to show (default: 10)")
    model = parser.add_argument_group("model")
    model.add_argument("--memory", metavar="SIZE", help="how many tokens of KV fit into so much memory: bytes or with K, M, G")
    model.add_argument("--platform", choices=("cpu", "gpu", "tpu"), default="gpu",
                       help="whose memory it takes: a CPU serves in float32, a TPU pads pages to its tiles (default: gpu)")
    model.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights (default: as the platform serves them)")
    model.add_argument("--kv-cache-dtype", choices=KV_CACHE_DTYPES, default="auto", help="default: that of the weights")
    model.add_argument("--page-size", type=int, default=16, metavar="N", help="tokens per KV page (default: 16)")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Returns 0, or ends with 2 for a target that cannot be read."""
    args = make_parser(prog).parse_args(argv)
    with one_line_errors(prog, args):
        if not 1 <= args.top <= 10_000:
            raise ConfigError(f"top must be in [1, 10000], got {args.top}")
        if args.page_size < 1:
            raise ConfigError(f"page_size must be at least 1, got {args.page_size}")
        memory = parse_size(args.memory, "memory")
        if args.target and "://" in args.target:
            found, show = _ask(args), show_cache
        elif args.target and (Path(args.target) / "jaxkv.lock").is_file():
            found, show = {"formats": _facts().disk_facts(Path(args.target))}, show_disk
        else:
            found, show = _facts().model_facts(
                args.target, platform=args.platform, dtype=args.dtype, kv_cache_dtype=args.kv_cache_dtype,
                page_size=args.page_size, memory=memory), show_model
        print(json.dumps(found) if args.json else show(found))
    return 0


def show_cache(found: dict[str, Any]) -> str:
    """Tiers, what was found where, the hit-rate curve and the prefixes of /debug/kv."""
    stats, page = found["stats"], found["page_size"]
    pages = [(name, sum(tier["pages_used"]), sum(tier["pages_total"]), tier["nodes"]) for name, tier in found["tiers"].items()]
    tiers = [(name, used, total, _share(used, total), nodes) for name, used, total, nodes in pages]
    parts = [table(("tier", "pages used", "of", "%", "nodes"), tiers)]
    below = {"host": stats["host_hit_tokens"], "disk": stats["disk_hit_tokens"]}
    hits = {"device": stats["hit_tokens"] - sum(below.values())} | below
    parts.append(table((f"found of {stats['query_tokens']:,} tokens", "tokens", "%"),
                       [(name, tokens, _share(tokens, stats["query_tokens"])) for name, tokens in hits.items()]))
    if found["curve"]:
        parts.append(table(("a cache of so many tokens", "would hit %"),
                           [(f"{point['pages'] * page:,}", f"{100 * point['hit_rate']:.1f}") for point in found["curve"]]))
    depth: dict[str, int] = {}
    rows = []
    for node in found["nodes"]:
        depth[node["digest"]] = level = depth.get(node["parent"], -1) + 1
        rows.append(("  " * level + node["digest"][:12], node["start"], node["tokens"], node["pages"], node["pages_below"],
                     node["kind"].lower(), node["tier"].lower(), node["users"]))
    if rows:
        shown = f"prefix ({len(rows)} of {found['nodes_total']}{', from a sample' if found['sampled'] else ''})"
        head = (shown, "start", "tokens", "pages", "below", "kind", "tier", "users")
        parts.append(table(head, rows))
    return "\n\n".join(parts)


def show_model(found: dict[str, Any]) -> str:
    """A model's facts."""
    groups = "; ".join(f"{g['layers']} layers " + (f"window {g['window']}" if g["window"] else "full attention")
                       for g in found["kv_groups"])
    rows = [
        ("directory", found["directory"]), ("family", found["family"]), ("parameters", f"{found['parameters']:,}"),
        ("weights", f"{size(found['weight_bytes'])} ({found['dtype']})"),
        ("attention", f"{found['heads']} heads, {found['kv_heads']} KV heads of {found['head_dim']}; {groups}"),
        ("window", f"{found['window']:,} tokens"), ("vocabulary", f"{found['vocabulary']:,}"),
        ("KV per token", f"{found['kv_bytes_per_token']:,} bytes ({found['kv_cache_dtype']}, {found['platform']})"),
        ("KV of a full window", size(found["kv_bytes_per_token"] * found["window"])),
    ]
    if "memory" in found:
        rows.append((f"{size(found['memory'])} hold", f"{found['kv_tokens']:,} tokens"))
    return facts(rows)


def show_disk(found: dict[str, Any]) -> str:
    """The formats of a disk tier's directory."""
    rows = [(form["fingerprint"][:12] if form["fingerprint"] else "damaged", form["segments"], size(form["bytes"]),
             form.get("pages", ""), form.get("page_size", ""), form.get("tokens", ""), form.get("damaged", ""))
            for form in found["formats"]]
    return table(("model", "segments", "size", "pages", "of tokens", "tokens", "damaged"), rows) if rows else "no segments"


def _ask(args: argparse.Namespace) -> Any:
    try:
        return asyncio.run(Server(args.target, args.api_key).get(f"/debug/kv?top={args.top}"))
    except HttpError as error:
        raise ConfigError(f"{args.target}: {error}") from None


def _facts() -> Any:
    return importlib.import_module("jaxkv.commands.model_facts")


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else "-"


if __name__ == "__main__":
    raise SystemExit(main())

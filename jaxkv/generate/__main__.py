"""``python -m jaxkv.generate``: the command line. What is heavy is imported once the arguments are known to be good."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path

from jaxkv.cli import (
    BASIC_ENGINE_OPTIONS,
    SAMPLING_OPTIONS,
    OneLineParser,
    add_engine_args,
    add_sampling_args,
    config_from_namespace,
    one_line_errors,
    sampling_overrides,
)
from jaxkv.config import ConfigError

PROG = "python -m jaxkv.generate"
_EPILOG = """
Input, one JSON object a line: OpenAI batch requests ({"custom_id", "method", "url": "/v1/chat/completions" or
"/v1/completions", "body"}; the body's "model" is not checked), or {"prompt": text or token ids} with any sampling field
of /v1/completions and an optional "id". Blank lines are skipped; a line that cannot be answered gets an error record.

Output, one JSON object a line, in the order of completion: OpenAI batch results, or {"prompt", "text", "token_ids",
"finish_reason", ...}. Each carries "line" (counted from 0) and "digest" of its input line. Run the same command again
after an interruption of any kind and it goes on with what is missing. Exit code 0: every line has its record.
"""

def make_parser(prog: str = PROG) -> argparse.ArgumentParser:
    """Options of the batch, of sampling and of the engine."""
    parser = OneLineParser(prog, description="Answers a file of prompts.", epilog=_EPILOG,
                           basic=("input", "output", "shard", "max_tokens", "temperature", *BASIC_ENGINE_OPTIONS))
    group = parser.add_argument_group("batch")
    group.add_argument("--input", required=True, type=Path, metavar="FILE", help="JSON lines to answer")
    group.add_argument("--output", required=True, type=Path, metavar="FILE",
                       help="JSON lines to write, or to go on with")
    group.add_argument("--shard", default="0/1", metavar="I/N",
                       help="only the lines whose number leaves I when divided by N (default: 0/1, all)")
    group.add_argument("--no-progress", action="store_true", help="no progress bar")
    group = parser.add_argument_group("sampling (wins over what the lines say)")
    add_sampling_args(group)
    group.add_argument("--ignore-eos", action="store_true", default=None)
    add_engine_args(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Returns the exit code: 0 when all is done, 128 + N after signal N; 2 for settings that cannot work."""
    args = make_parser(prog).parse_args(argv)
    with one_line_errors(prog, args):
        config = config_from_namespace(args)
        overrides = sampling_overrides(args, (*SAMPLING_OPTIONS, "stop", "ignore_eos"))
        shard = parse_shard(args.shard)
        return importlib.import_module("jaxkv.generate.runner").run(
            config, args.input, args.output, shard=shard, overrides=overrides, show_progress=not args.no_progress)


def parse_shard(text: str) -> tuple[int, int]:
    """ "1/4" -> (1, 4). ConfigError for anything that names no shard."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ConfigError(f"shard must be I/N with 0 <= I < N, got {text!r}")
    return int(index), int(count)


if __name__ == "__main__":
    raise SystemExit(main())

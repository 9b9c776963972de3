"""``python -m jaxkv.serve``: the command line. Imports what is heavy only after the arguments are known to be good."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from jaxkv.cli import OneLineParser, add_engine_args, config_from_namespace, one_line_errors
from jaxkv.config import ConfigError, parse_size
from jaxkv.serve.dialect import add_chat_args, chat_options
from jaxkv.serve.sockets import listen

PROG = "python -m jaxkv.serve"


def make_parser() -> argparse.ArgumentParser:
    """Server options and the engine's."""
    parser = OneLineParser(PROG, description="OpenAI-compatible server.")
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", metavar="ADDRESS",
                       help="address to listen on; 0.0.0.0 for every interface (default: 127.0.0.1)")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="0: any free port (default: 8000)")
    group.add_argument("--api-key", action="append", metavar="KEY",
                       help="bearer token asked for on /v1, may be repeated (default: $JAXKV_API_KEY, else none)")
    group.add_argument("--served-model-name", metavar="NAME", help="name in /v1/models (default: the model's)")
    group.add_argument("--max-open-requests", type=int, default=1024, metavar="N",
                       help="sequences running or waiting before a 429 (default: 1024)")
    group.add_argument("--max-body", default="32M", metavar="SIZE", help="largest request body (default: 32M)")
    group.add_argument("--shutdown-timeout", type=float, default=10.0, metavar="SECONDS",
                       help="time that open requests get after SIGTERM (default: 10)")
    group.add_argument("--access-log", action="store_true", help="one log line per HTTP request")
    add_chat_args(parser.add_argument_group("chat"))
    add_engine_args(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the server until a signal. Returns the exit code: 0 after a signal, 1 after an engine failure, 2 for
    settings that cannot work."""
    args = make_parser().parse_args(argv)
    with one_line_errors(PROG):
        if not 0 <= args.port <= 65535:
            raise ConfigError(f"port must be in [0, 65535], got {args.port}")
        if args.max_open_requests < 1:
            raise ConfigError(f"max_open_requests must be at least 1, got {args.max_open_requests}")
        if not 0 <= args.shutdown_timeout < float("inf"):
            raise ConfigError(f"shutdown_timeout must be a number of seconds from 0, got {args.shutdown_timeout}")
        args.max_body = parse_size(args.max_body, "max_body")
        args.api_key = args.api_key or [key for key in [os.environ.get("JAXKV_API_KEY")] if key]
        if not all(args.api_key):
            raise ConfigError("api_key must not be empty")
        args.chat = chat_options(args)
        config = config_from_namespace(args)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sys.exit(0))  # until the server has its own handlers
        sock = listen(args.host, args.port)
        return importlib.import_module("jaxkv.serve.server").run(args, config, sock)


def command() -> NoReturn:
    """``main`` as a process: once it has ended, nothing that the libraries do at exit can delay or fail it."""
    try:
        code = main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    command()

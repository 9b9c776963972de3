"""``python -m jaxkv.serve``: the command line. Imports what is heavy only after the arguments are known to be good."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import NoReturn

from jaxkv.cli import BASIC_ENGINE_OPTIONS, OneLineParser, add_engine_args, config_from_namespace, one_line_errors
from jaxkv.config import ConfigError
from jaxkv.serve.dialect import add_chat_args, chat_options
from jaxkv.serve.limits import add_limit_args, keys_of, limits_of
from jaxkv.serve.sockets import listen

PROG = "python -m jaxkv.serve"


def make_parser(prog: str = PROG) -> argparse.ArgumentParser:
    """Server options and the engine's."""
    parser = OneLineParser(prog, description="OpenAI-compatible server.",
                           basic=("host", "port", "api_key", "served_model_name", *BASIC_ENGINE_OPTIONS))
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", metavar="ADDRESS",
                       help="address to listen on; 0.0.0.0 for every interface (default: 127.0.0.1)")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="0: any free port (default: 8000)")
    group.add_argument("--served-model-name", metavar="NAME", help="name in /v1/models (default: the model's)")
    group.add_argument("--max-batch", type=int, default=32, metavar="N",
                       help="prompts that go to the engine together for embeddings and scores (default: 32)")
    group.add_argument("--max-wait-ms", type=float, default=5.0, metavar="MS",
                       help="how long the first of them waits for others (default: 5)")
    group.add_argument("--batch-dir", metavar="DIR",
                       help="where /v1/files and /v1/batches keep files (default: a directory that goes with the process)")
    group.add_argument("--shutdown-timeout", type=float, default=10.0, metavar="SECONDS",
                       help="time that open requests get after SIGTERM (default: 10)")
    group.add_argument("--log-format", choices=("text", "json"), default="text", help="form of the log (default: text)")
    group.add_argument("--request-log", action=argparse.BooleanOptionalAction, default=True,
                       help="one log line per request, without its content")
    group.add_argument("--otlp-endpoint", metavar="URL",
                       help="where OpenTelemetry traces go, such as http://localhost:4318/v1/traces; needs jaxkv[otel] "
                            "(default: none)")
    add_limit_args(parser.add_argument_group("limits"))
    add_chat_args(parser.add_argument_group("chat"))
    add_engine_args(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Runs the server until a signal. Returns the exit code: 0 after a signal, 1 after an engine failure, 2 for
    settings that cannot work."""
    args = make_parser(prog).parse_args(argv)
    with one_line_errors(prog, args):
        if not 0 <= args.port <= 65535:
            raise ConfigError(f"port must be in [0, 65535], got {args.port}")
        if not 0 <= args.shutdown_timeout < float("inf"):
            raise ConfigError(f"shutdown_timeout must be a number of seconds from 0, got {args.shutdown_timeout}")
        if args.max_batch < 1:
            raise ConfigError(f"max_batch must be at least 1, got {args.max_batch}")
        if not 0 <= args.max_wait_ms <= 60_000:
            raise ConfigError(f"max_wait_ms must be in [0, 60000], got {args.max_wait_ms}")
        args.limits, args.keys, args.chat = limits_of(args), keys_of(args), chat_options(args)
        config = config_from_namespace(args)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: sys.exit(0))  # until the server has its own handlers
        sock = listen(args.host, args.port)
        return importlib.import_module("jaxkv.serve.server").run(args, config, sock)


def command(argv: Sequence[str] | None = None, prog: str = PROG) -> NoReturn:
    """``main`` as a process: once it has ended, nothing that the libraries do at exit can delay or fail it."""
    try:
        code = main(argv, prog)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    command()

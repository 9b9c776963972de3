"""``jaxkv``, the console script, and ``python -m jaxkv``: which command runs. Each has a parser of its own.

Imports what a command needs once it is known which: ``jaxkv --help`` starts no device.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from jaxkv import __version__
from jaxkv.cli import PlainParser

COMMANDS = {
    "serve": ("jaxkv.serve.__main__", "an OpenAI-compatible server"),
    "chat": ("jaxkv.commands.chat", "talk to a model, or to a running server"),
    "generate": ("jaxkv.generate.__main__", "answer a file of prompts"),
    "bench": ("jaxkv.commands.bench", "put load on a server and measure it"),
    "inspect": ("jaxkv.commands.inspect", "what a server's cache holds, what a model directory would need"),
}
SHELLS = ("bash", "zsh", "fish")


def make_parser() -> argparse.ArgumentParser:
    """The whole command line, every command with its options."""
    parser = PlainParser("jaxkv", description="KV-cache-first LLM inference.",
                                     epilog="jaxkv COMMAND --help shows a command's options.")
    parser.add_argument("--version", action="version", version=f"jaxkv {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=PlainParser)
    for name, (module, text) in COMMANDS.items():
        options = importlib.import_module(module).make_parser(f"jaxkv {name}")
        commands.add_parser(name, help=text, parents=[options], add_help=False)
    shell = commands.add_parser("completion", help="print the completion script of a shell")
    shell.add_argument("shell", choices=SHELLS)
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs a command; its exit code."""
    if argv and argv[0] in COMMANDS:
        return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:], f"jaxkv {argv[0]}")
    parser = make_parser()
    print(_completion(parser, parser.parse_args(argv).shell))
    return 0


def command() -> NoReturn:
    """The process: ``serve`` ends its own way, and a reader that leaves (``| head``) or Ctrl+C is no traceback."""
    argv = sys.argv[1:]
    if argv[:1] == ["serve"]:
        importlib.import_module(COMMANDS["serve"][0]).command(argv[1:], "jaxkv serve")
    try:
        code = main(argv)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush goes nowhere
        code = 1
    except KeyboardInterrupt:
        code = 130
    raise SystemExit(code)


def _completion(parser: argparse.ArgumentParser, shell: str) -> str:
    import shtab  # only for this

    kinds: dict[str, Any] = {"FILE": shtab.FILE, "DIR": shtab.DIRECTORY}
    commands: Any = parser._actions[-1].choices
    for action in (action for options in commands.values() for action in options._actions):
        if action.metavar in kinds:
            action.complete = kinds[action.metavar]
    return shtab.complete(parser, shell)


if __name__ == "__main__":
    command()

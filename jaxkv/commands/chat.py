"""``jaxkv chat``: a conversation in the terminal, with a running server or with an engine in this process.

Owns the conversation and the terminal. Who answers is behind ``Answers``: ``chat_remote`` or ``chat_local``.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

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
from jaxkv.commands.chat_remote import Remote
from jaxkv.commands.http import Server
from jaxkv.config import ConfigError

PROG = "python -m jaxkv.commands.chat"
HELP = """/reset           forget the conversation
/system [TEXT]   show the system prompt, or set it and forget the conversation
/history         show the conversation
/quit            end (or Ctrl+D); Ctrl+C stops an answer"""
HISTORY_LINES = 1000
# What a model writes must not steer the terminal: control characters but for newline and tab are shown, not sent.
VISIBLE = {code: f"\\x{code:02x}" for code in (*range(32), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
_SAMPLING = tuple(name for name in SAMPLING_OPTIONS if name != "n")


def make_parser(prog: str = PROG) -> argparse.ArgumentParser:
    """Options of the chat, of sampling and of an engine in this process."""
    parser = OneLineParser(
        prog, description="Chat in the terminal. Input that is piped in is one message; only the answer is printed then.",
        basic=("url", "api_key", "system", "max_tokens", "temperature", "seed", *BASIC_ENGINE_OPTIONS))
    group = parser.add_argument_group("chat")
    group.add_argument("--url", metavar="URL", help="a running server (default: an engine in this process)")
    group.add_argument("--api-key", metavar="KEY", help="the server's key")
    group.add_argument("--system", metavar="TEXT", help="system prompt")
    add_sampling_args(parser.add_argument_group("sampling"), _SAMPLING)
    add_engine_args(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = PROG) -> int:
    """Returns the exit code: 0 at the end, 1 when a piped message got no whole answer, 2 for settings that cannot work."""
    args = make_parser(prog).parse_args(argv)
    with one_line_errors(prog, args):
        params = sampling_overrides(args, (*_SAMPLING, "stop"))
        config = config_from_namespace(args)
        if args.url:
            _check_no_engine(args)
            server = Server(args.url, args.api_key)
            answers: Answers = Remote(server, args.url, params | ({"seed": args.seed} if "seed" in args else {}))
        else:
            answers = importlib.import_module("jaxkv.commands.chat_local").Local(config, params)
        with contextlib.closing(answers):
            chat = Chat(answers, args.system)
            return chat.talk() if sys.stdin.isatty() else chat.once(sys.stdin.read())


class Answers(Protocol):
    """Who answers. ``answer`` blocks; Ctrl+C ends it with KeyboardInterrupt, what cannot be answered with ValueError."""

    name: str

    def answer(self, messages: Sequence[Mapping[str, str]], show: Callable[[str], None]) -> None: ...
    def close(self) -> None: ...


class Chat:
    """The messages so far, and what is done with a line."""

    def __init__(self, answers: Answers, system: str | None) -> None:
        self.answers, self.system = answers, system
        self.messages: list[dict[str, str]] = []

    def once(self, text: str) -> int:
        """One message, one answer."""
        if not text.strip():
            raise ConfigError("standard input holds no message")
        return 0 if self.ask(text.strip()) else 1

    def talk(self) -> int:
        """Until the end of input."""
        print(f"{self.answers.name}; /help shows the commands")
        with _line_editing():
            while True:
                try:
                    line = input(">>> ").strip()
                except EOFError:
                    print()
                    return 0
                except KeyboardInterrupt:
                    print("\n(Ctrl+D or /quit ends)")
                    continue
                if line in ("/quit", "/exit"):
                    return 0
                if line.startswith("/"):
                    print(self.command(line))
                elif line:
                    self.ask(line)

    def command(self, line: str) -> str:
        """What a /command did, for the person."""
        name, _, rest = line.partition(" ")
        if name == "/reset":
            self.messages.clear()
            return "(forgotten)"
        if name == "/system":
            if not rest.strip():
                return self.system or "(no system prompt)"
            self.system = rest.strip()
            self.messages.clear()
            return "(set; the conversation starts anew)"
        if name == "/history":
            return "\n".join(f"{m['role']}: {m['content'].translate(VISIBLE)}" for m in self.messages) or "(nothing yet)"
        return HELP if name == "/help" else f"unknown command {name}\n{HELP}"

    def ask(self, text: str) -> bool:
        """Prints the answer as it comes and remembers it, also one that Ctrl+C stopped. False: no whole answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        question = {"role": "user", "content": text}
        parts: list[str] = []

        def show(part: str) -> None:
            parts.append(part)
            print(part.translate(VISIBLE), end="", flush=True)

        whole = True
        try:
            self.answers.answer([*system, *self.messages, question], show)
        except KeyboardInterrupt:
            whole = False
            print(" (stopped)", end="")
        except ValueError as error:  # refused, or broken off: the question is not part of the conversation
            print(("\n" if parts else "") + f"error: {error}", file=sys.stderr)
            return False
        print()
        if parts:
            self.messages += [question, {"role": "assistant", "content": "".join(parts)}]
        return whole


def _check_no_engine(args: argparse.Namespace) -> None:
    """ConfigError for engine options on the command line that a running server would not hear of."""
    parser = argparse.ArgumentParser(add_help=False)
    add_engine_args(parser)
    for action in parser._actions:
        if action.dest in args and action.dest != "seed" and action.dest not in args.sources:
            raise ConfigError(f"{action.dest} is for an engine in this process, but url names a server")


@contextlib.contextmanager
def _line_editing() -> Iterator[None]:
    """Arrow keys and a history of lines that outlives the process."""
    import readline  # changes how input() reads

    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    file = state / "jaxkv" / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch(mode=0o600)
            readline.write_history_file(file)


if __name__ == "__main__":
    raise SystemExit(main())

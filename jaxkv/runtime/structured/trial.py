"""A trial compile in a process of its own: what takes too long or too much, or overflows a stack, ends that process only.

llguidance cannot be stopped once it compiles, and deep nesting crashes it (seen: a chain of 3,000 rules; 3.8 GB for a
regex of 60 kB). The child has an alarm, an address-space limit and a small stack, so that what it survives is safe here.
Run as a program, this file is the child; it needs nothing but llguidance and the standard library.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxkv.params import Structured
from jaxkv.runtime.structured.grammar import grammar_of, make_matcher, make_tokenizer, reason, shorten, special_texts

SECONDS = 5.0  # for one compile
MEMORY = 2**31  # bytes of address space
STACK = 2**20  # bytes; threads here have eight times as much
WALK = 8  # tokens tried after the first: some grammars only begin small


class Trial:
    """A child that tries what it is given; started again when one ended it. Used by one thread."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self._setup = setup
        self._child: subprocess.Popen[str] | None = None

    def compile(self, structured: Structured) -> str:
        """The grammar of ``structured``, which ``make_matcher`` will take. ValueError says why there is none."""
        if self._child is None or self._child.poll() is not None:
            self._start()
        return self._ask(asdict(structured))

    def close(self) -> None:
        """Ends the child, whatever it does."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()

    def _start(self) -> None:
        root = str(Path(__file__).parents[3])
        path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        self._child = subprocess.Popen([sys.executable, "-m", __name__], env={**os.environ, "PYTHONPATH": path}, text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        try:
            self._ask(self._setup)
        except ValueError as error:
            self._child = None  # nothing to wait for: its input is closed with it
            raise ValueError(f"this model's tokenizer cannot be used: {error}") from None

    def _ask(self, question: dict[str, Any]) -> str:
        """The child's answer. ValueError with its complaint."""
        child = self._child
        assert child is not None and child.stdin is not None and child.stdout is not None
        try:
            print(json.dumps(question), file=child.stdin, flush=True)
            answer = child.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            found, error = json.loads(answer)
            if error:
                raise ValueError(error)
            return found
        self._child = None
        if child.wait() == -signal.SIGALRM:
            raise ValueError(f"compiling takes longer than {SECONDS:g} seconds")
        raise ValueError("it is too large or too deeply nested")


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C is for the parent, whose end closes our input
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    setup = json.loads(sys.stdin.readline())
    tokenizer = _answer(lambda: make_tokenizer(**setup), lambda _: "")
    special = special_texts(tokenizer, setup["tokenizer_json"]) if tokenizer else []
    threading.stack_size(STACK)
    for line in sys.stdin:
        structured = Structured(**json.loads(line))
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        _answer(lambda: _try(tokenizer, structured, special), str)  # noqa: B023  runs before the next line
        signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(action: Callable[[], Any], shown: Callable[[Any], str]) -> Any:
    """The result of ``action``, run on a stack that can be small; prints [what to show of it, what was wrong]."""
    result, error = [], ""

    def run() -> None:
        nonlocal error
        try:
            result.append(action())
        except BaseException as problem:  # panics of Rust are no Exceptions
            error = shorten(str(problem)) or type(problem).__name__

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    print(json.dumps([shown(result[0]) if result else "", error]), flush=True)
    return result[0] if result else None


def _try(tokenizer: Any, structured: Structured, special: list[str]) -> str:
    grammar = grammar_of(structured, special)
    matcher, draw = make_matcher(tokenizer, grammar), random.Random(0)
    for _ in range(WALK):
        if matcher.is_stopped():
            break
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        tail = mask >> draw.randrange(max(mask.bit_length(), 1))  # the first allowed token from a random one on
        matcher.consume_token((tail & -tail).bit_length() - 1 + mask.bit_length() - tail.bit_length())
    if matcher.is_error():
        raise ValueError(reason(matcher))
    return grammar


if __name__ == "__main__":
    _main()

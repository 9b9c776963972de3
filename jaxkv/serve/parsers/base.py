"""What a tool parser is: text in pieces goes in, content and calls come out in pieces.

Owns the protocol and what the formats share. A parser knows one format and nothing of HTTP. It never raises: text that
turns out to be no call is content. What comes out, joined, depends on the text only, never on how it was cut.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,64}")  # a call to anything else is no call


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of a call. The first piece of a call has its name; the arguments of all pieces joined are JSON text."""

    index: int  # of the call in the answer
    arguments: str = ""
    name: str | None = None


Piece = str | CallDelta  # str: content
Tools = Mapping[str, dict[str, Any]]  # JSON schemas of arguments, by the name of the function


class ToolParser(ABC):
    """Reads one answer. ``feed`` takes text as it comes, ``finish`` gives what was held back when no more comes.

    Text is held back only while it may be a part of a call's syntax.
    """

    markers: ClassVar[tuple[str, ...]] = ()  # if one is a special token, special tokens must stay in the text

    def __init__(self) -> None:
        self.count = 0  # calls begun and done with
        self._held = ""
        self._pieces: list[Piece] = []

    @classmethod
    def grammar(cls, tools: Tools, many: bool, token: Callable[[str], str]) -> str:
        """Lark rules of which `calls` is an answer that calls one of the tools, or with ``many`` any number of them;
        ``token`` writes a marker. Empty for a format that no grammar here can force. ValueError for a schema without one."""
        return ""

    def feed(self, text: str) -> list[Piece]:
        """Content and calls that are certain by now."""
        self._held += text
        while self._held and self._step():
            pass
        return self._take()

    def finish(self) -> list[Piece]:
        """The rest."""
        self._end()
        self._held = ""
        return self._take()

    @abstractmethod
    def _step(self) -> bool:
        """Consumes from the front of ``_held``. False: what is left needs more text."""

    def _end(self) -> None:
        """What is held becomes content unless the format knows better."""
        self._say(self._held)

    def _say(self, text: str) -> None:
        if text:
            self._pieces.append(text)

    def _say_until(self, *markers: str) -> bool:
        """Content up to the first marker; True if there is one, which then begins ``_held``."""
        found = [at for marker in markers if (at := self._held.find(marker)) >= 0]
        at = min(found) if found else len(self._held) - overlap(self._held, *markers)
        self._say(self._held[:at])
        self._held = self._held[at:]
        return bool(found)

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces


def overlap(text: str, *markers: str) -> int:
    """Length of the longest end of ``text`` that begins a marker and is not all of it."""
    longest = min(len(text), max(map(len, markers)) - 1)
    return next((size for size in range(longest, 0, -1)
                 if any(marker.startswith(text[-size:]) for marker in markers)), 0)

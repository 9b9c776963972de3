"""One answer to a chat while it is written: reasoning first, then content and calls."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from jaxkv.serve.parsers.base import CallDelta, Piece, ToolParser
from jaxkv.serve.parsers.reasoning import ThinkParser


@dataclass(slots=True)
class Parts:
    """What is new in an answer: reasoning, then content and calls in their order."""

    reasoning: str = ""
    pieces: list[Piece] = field(default_factory=list)

    @property
    def content(self) -> str:
        return "".join(piece for piece in self.pieces if isinstance(piece, str))

    @property
    def calls(self) -> list[CallDelta]:
        """One entry a call, in the order of their index."""
        names: dict[int, str | None] = {}
        arguments: dict[int, list[str]] = {}
        for piece in self.pieces:
            if not isinstance(piece, str):
                names.setdefault(piece.index, piece.name)
                arguments.setdefault(piece.index, []).append(piece.arguments)
        return [CallDelta(index, "".join(arguments[index]), name) for index, name in names.items()]


def joined(parts: Iterable[Parts]) -> Parts:
    """Several as one."""
    parts = list(parts)
    return Parts("".join(part.reasoning for part in parts), [piece for part in parts for piece in part.pieces])


class MessageReader:
    """Sends text through the parsers of a request; without any, text is content.

    ``reasoning_tokens`` are those from the first up to and including the one that brought the end of the reasoning: all of
    ``tokens`` as long as it has not ended, none for an answer that does not begin with reasoning.
    """

    def __init__(self, think: ThinkParser | None = None, tools: ToolParser | None = None, parallel: bool = True) -> None:
        self.called = False  # whether a call has begun
        self.tokens = self.reasoning_tokens = 0
        self._think, self._tools, self._parallel = think, tools, parallel

    def feed(self, text: str, last: bool, tokens: int = 0) -> Parts:
        """Takes the next text, of so many tokens; ``last``: no more comes, so that nothing is held back."""
        self.tokens += tokens
        reasoning, content = ("", text) if self._think is None else self._split(self._think, text, last)
        if self._tools is None:
            return Parts(reasoning, [content] if content else [])
        pieces: list[Piece] = self._tools.feed(content) if content else []
        if last:
            pieces += self._tools.finish()
        if not self._parallel:
            pieces = [piece for piece in pieces if isinstance(piece, str) or not piece.index]
        self.called |= any(not isinstance(piece, str) for piece in pieces)
        return Parts(reasoning, pieces)

    def _split(self, think: ThinkParser, text: str, last: bool) -> tuple[str, str]:
        """Reasoning and the rest."""
        done = think.done
        reasoning, content = think.feed(text)
        if last:
            more, rest = think.finish()
            reasoning, content = reasoning + more, content + rest
        if think.begun and not done:
            self.reasoning_tokens = self.tokens
        return reasoning, content

"""One answer to a chat while it is written: reasoning first, then content and calls."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxkv.serve.parsers.base import CallDelta, Piece, ToolParser
from jaxkv.serve.parsers.reasoning import ThinkParser


@dataclass(slots=True)
class Parts:
    """What is new in an answer."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)  # one entry a call, in the order of their index


class MessageReader:
    """Sends text through the parsers of a request; without any, text is content."""

    def __init__(self, think: ThinkParser | None = None, tools: ToolParser | None = None, parallel: bool = True) -> None:
        self.called = False  # whether a call has begun
        self._think, self._tools, self._parallel = think, tools, parallel

    def feed(self, text: str, last: bool) -> Parts:
        """Takes the next text; ``last``: no more comes, so that nothing is held back."""
        reasoning, content = ("", text) if self._think is None else self._think.feed(text)
        if last and self._think is not None:
            more, rest = self._think.finish()
            reasoning, content = reasoning + more, content + rest
        if self._tools is None:
            return Parts(reasoning, content)
        pieces: list[Piece] = self._tools.feed(content) if content else []
        if last:
            pieces += self._tools.finish()
        return Parts(reasoning, "".join(piece for piece in pieces if isinstance(piece, str)), self._calls(pieces))

    def _calls(self, pieces: list[Piece]) -> list[CallDelta]:
        calls: dict[int, CallDelta] = {}
        for piece in pieces:
            if isinstance(piece, str) or piece.index and not self._parallel:
                continue
            before = calls.get(piece.index)
            calls[piece.index] = piece if before is None else CallDelta(
                piece.index, before.arguments + piece.arguments, before.name)
        self.called |= bool(calls)
        return list(calls.values())

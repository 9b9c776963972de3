"""Answers whose form a grammar has fixed: to tool_choice "required" and to a named function, where no model format is needed,
and calls or else content of a response format."""

from __future__ import annotations

from collections.abc import Container

from jaxkv.serve.parsers.base import CallDelta, ToolParser
from jaxkv.serve.parsers.json_calls import CallArray, State


class RequiredParser(ToolParser):
    """[{"name": ..., "parameters": {...}}, ...]"""

    def __init__(self) -> None:
        super().__init__()
        self._array: CallArray | None = None
        self._content = False  # all calls are read, or it is something else

    def _step(self) -> bool:
        if self._content:
            self._say(self._held)
            self._held = ""
        elif self._array is None:
            text = self._held.lstrip()
            if not text:
                return False
            self._content = text[0] != "["
            if not self._content:
                self._array, self._held = CallArray(0, self._held[:-len(text)] + "["), text[1:]
        else:
            self._held = self._array.feed(self._held, self._pieces)
            if self._array.state is State.OPEN:
                return False
            self._content = True
        return True

    def _end(self) -> None:
        self._say(self._held if self._array is None else self._array.finish() if not self._content else "")


class NamedParser(ToolParser):
    """The arguments of the one function."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name: str | None = name

    def _step(self) -> bool:
        self._pieces.append(CallDelta(0, self._held, self._name))
        self._name, self._held, self.count = None, "", 1
        return False


class CallsOrContent(ToolParser):
    """Calls of a model's format from the first character on, or content, in which the format's markers mean nothing."""

    def __init__(self, calls: ToolParser, names: Container[str]) -> None:
        super().__init__()
        calls.names = names
        self._calls = calls
        self._called: bool | None = None  # None: it may be either

    def _step(self) -> bool:
        if self._called is None:
            text, begins = self._held.lstrip(), self._calls.begins
            if any(marker.startswith(text) and marker != text for marker in begins):
                return False
            self._called = text.startswith(begins)
        if self._called:
            self._pieces += self._calls.feed(self._held)
        else:
            self._say(self._held)
        self._held = ""
        return False

    def _end(self) -> None:
        if self._called:
            self._pieces += self._calls.finish()
        else:
            self._say(self._held)

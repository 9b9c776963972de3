"""Llama 3: an answer that begins with {"name": ..., "parameters": {...}}, or has one behind <|python_tag|>."""

from __future__ import annotations

from collections.abc import Callable

from jaxkv.serve.parsers.base import ToolParser, Tools
from jaxkv.serve.parsers.json_calls import CallObject, State, call_rules

TAG = "<|python_tag|>"


class Llama3JsonParser(ToolParser):
    """Several calls stand one behind the other, separated by semicolons, commas or white space. The tag itself is never
    content."""

    markers = (TAG,)

    def __init__(self) -> None:
        super().__init__()
        self._call: CallObject | None = None
        self._may_call = True  # at the beginning, behind the tag or behind a call

    @classmethod
    def grammar(cls, tools: Tools, many: bool, token: Callable[[str], str]) -> str:
        more = r" (/[;,]?[ \n]{0,2}/ call)*" if many else ""
        return f"calls: {token(TAG)}? call{more}\n" + call_rules(tools, "parameters")

    def _step(self) -> bool:
        if self._call is not None:
            return self._read(self._call)
        if self._may_call:
            return self._begin()
        found = self._say_until(TAG)
        self._may_call = found
        return found

    def _begin(self) -> bool:
        text = self._held.lstrip(" \t\r\n;," if self.count else None)
        if text.startswith(TAG):
            self._held = text[len(TAG):]
            return True
        if TAG.startswith(text):
            return False
        if text[0] == "{":
            self._call = CallObject(self.count, self._held[:len(self._held) - len(text)], strict=True)
            self._held = text
        self._may_call = False
        return True

    def _read(self, call: CallObject) -> bool:
        self._held = call.feed(self._held, self._pieces)
        if call.state is State.OPEN:
            return False
        self._call = None
        self.count += call.announced
        self._may_call = call.state is State.DONE
        self._say(call.raw)
        return True

    def _end(self) -> None:
        if self._call is not None:
            self._say(self._call.raw)
        elif not (self._may_call and self.count and not self._held.strip(" \t\r\n;,")):
            self._say(self._held)

"""Hermes and Qwen: <tool_call>{"name": ..., "arguments": {...}}</tool_call>, text before, between and after."""

from __future__ import annotations

from collections.abc import Callable

from jaxkv.serve.parsers.base import ToolParser, Tools
from jaxkv.serve.parsers.json_calls import CallObject, State, call_rules

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesParser(ToolParser):
    """White space behind a call belongs to the syntax; a missing closing tag is forgiven."""

    markers = (BEGIN, END)

    def __init__(self) -> None:
        super().__init__()
        self._call: CallObject | None = None
        self._after = False  # behind a call, where only white space and its closing tag have been
        self._unclosed = False  # the closing tag of the latest call has not come

    @classmethod
    def grammar(cls, tools: Tools, many: bool, token: Callable[[str], str]) -> str:
        more = r" (/[ \n]{0,2}/ tagged)*" if many else ""
        return f"calls: tagged{more}\ntagged: {token(BEGIN)} /[ \\n]{{0,2}}/ call /[ \\n]{{0,2}}/ {token(END)}\n" \
            + call_rules(tools, "arguments")

    def _step(self) -> bool:
        if self._call is not None:
            return self._read(self._call)
        if self._after:
            text = self._held.lstrip()
            if BEGIN.startswith(text) or self._unclosed and END.startswith(text) and text != END:
                return False
            self._after = False
            if text.startswith(self._tags()):
                self._held = text
        if not self._say_until(*self._tags()):
            return False
        if self._held.startswith(BEGIN):
            self._held = self._held[len(BEGIN):]
            self._call = CallObject(self.count, BEGIN)
        else:
            self._held = self._held[len(END):]
            self._after = True
        self._unclosed = False
        return True

    def _tags(self) -> tuple[str, ...]:
        return self.markers if self._unclosed else (BEGIN,)

    def _read(self, call: CallObject) -> bool:
        self._held = call.feed(self._held, self._pieces)
        if call.state is State.OPEN:
            return False
        self._call = None
        self.count += call.announced
        self._after = self._unclosed = call.announced
        self._say(call.raw)
        return True

    def _end(self) -> None:
        if self._call is not None:
            self._say(self._call.raw)
        elif not self._after or not (END if self._unclosed else "").startswith(self._held.lstrip()):
            self._say(self._held)

"""Mistral: [TOOL_CALLS][{"name": ..., "arguments": {...}}], and since 2025 [TOOL_CALLS]name{...}[TOOL_CALLS]name{...}."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from jaxkv.runtime.structured.grammar import json_rule
from jaxkv.serve.parsers.base import NAME, CallDelta, ToolParser, Tools
from jaxkv.serve.parsers.json_calls import CallArray, JsonValue, State, call_rules

MARKER = "[TOOL_CALLS]"
_HEAD = re.compile(rf"\s*({NAME.pattern})\s*(?:\[CALL_ID\]\w+)?\s*(?:\[ARGS\])?\s*")
_NOT_IN_HEAD = re.compile(r"[^\w.:/\[\] \n-]", re.ASCII)
_LONGEST_HEAD = 160  # characters


class MistralParser(ToolParser):
    """The marker itself is never content."""

    markers = (MARKER,)

    def __init__(self) -> None:
        super().__init__()
        self._array: CallArray | None = None
        self._arguments: JsonValue | None = None  # of the call under way
        self._head = False  # behind the marker, where either form may follow
        self._after = False  # behind a call

    @classmethod
    def grammar(cls, tools: Tools, many: bool, token: Callable[[str], str]) -> str:
        begin, arguments = token(MARKER), token("[ARGS]")
        named = " | ".join(f"{json.dumps(name)} {arguments}? {json_rule({'type': 'object', **schema})}"
                           for name, schema in tools.items())
        array, more = (r' (/,[ \n]?/ call)*', f" ({begin} named)*") if many else ("", "")
        return f'calls: {begin} (/ ?/ "[" call{array} "]" | named{more})\nnamed: {named}\n' + call_rules(tools, "arguments")

    def _step(self) -> bool:
        if self._array is not None:
            return self._read_array(self._array)
        if self._arguments is not None:
            return self._read_arguments(self._arguments)
        if self._head:
            return self._read_head()
        if self._after:
            text = self._held.lstrip()
            if MARKER.startswith(text) and text != MARKER:
                return False
            self._after = False
            if text.startswith(MARKER):
                self._held = text
        if not self._say_until(MARKER):
            return False
        self._held = self._held[len(MARKER):]
        self._head = True
        return True

    def _read_head(self) -> bool:
        text = self._held.lstrip()
        if not text:
            return False
        if text[0] == "[":
            self._array = CallArray(self.count, self._held[:-len(text)] + "[")
            self._held, self._head = text[1:], False
            return True
        stop = _NOT_IN_HEAD.search(self._held, 0, _LONGEST_HEAD)
        if stop is None and len(self._held) < _LONGEST_HEAD:
            return False
        self._head = False
        end = stop.start() if stop else _LONGEST_HEAD
        head = _HEAD.fullmatch(self._held[:end])
        if head and self._held[end] == "{":
            self._pieces.append(CallDelta(self.count, "", head[1]))
            self._arguments = JsonValue()
        else:
            self._say(self._held[:end])
        self._held = self._held[end:]
        return True

    def _read_arguments(self, value: JsonValue) -> bool:
        end = value.scan(self._held, 0)
        self._pieces.append(CallDelta(self.count, self._held[:end]))
        self._held = self._held[end:]
        if value.done:
            self._arguments, self._after = None, True
            self.count += 1
        return value.done

    def _read_array(self, array: CallArray) -> bool:
        self._held = array.feed(self._held, self._pieces)
        if array.state is State.OPEN:
            return False
        self.count = array.count
        self._array, self._after = None, array.state is State.DONE
        return True

    def _end(self) -> None:
        if self._array is not None:
            self._say(self._array.finish())
        elif not (self._after and not self._held.strip()):
            self._say(self._held)

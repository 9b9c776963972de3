"""Calls written as JSON objects, {"name": ..., "arguments": {...}}, read while the text arrives.

Owns where values end and which keys mean what. Arguments go out as the model wrote them, character by character: only
strings and brackets are followed, as whatever comes may be broken. Each character is looked at once.
"""

from __future__ import annotations

import json
import re
from enum import Enum
from typing import Any

from jaxkv.runtime.structured.grammar import json_rule
from jaxkv.serve.parsers.base import NAME, CallDelta, Piece, Tools

ARGUMENTS = ("arguments", "parameters")
DEFINITIONS = ("$defs", "definitions")
_IN_STRING = re.compile(r'[^"\\]*')
_BETWEEN = re.compile(r'[^"{}\[\]]*')


def call_schema(name: str, parameters: dict[str, Any], key: str) -> dict[str, Any]:
    """One call, with the arguments under ``key``; definitions move to the root, where their references look for them."""
    inner = {"type": "object"} | {k: value for k, value in parameters.items() if k not in DEFINITIONS}
    return {"type": "object", "properties": {"name": {"const": name}, key: inner}, "required": ["name", key],
            "additionalProperties": False} | {k: parameters[k] for k in DEFINITIONS if parameters.get(k)}


def call_rules(tools: Tools, key: str) -> str:
    """A Lark rule `call`. ValueError for a schema without one."""
    return "call: " + " | ".join(json_rule(call_schema(name, schema, key)) for name, schema in tools.items()) + "\n"


class State(Enum):
    OPEN = 0
    DONE = 1
    BROKEN = 2


class JsonValue:
    """Finds the end of one JSON value. Numbers and words end before the first character that cannot be theirs."""

    __slots__ = ("_depth", "_escaped", "_string", "done")

    def __init__(self) -> None:
        self.done = self._string = self._escaped = False
        self._depth = 0

    def scan(self, text: str, at: int) -> int:
        """Index behind what belongs to the value; ``done`` says whether it ends there."""
        while at < len(text) and not self.done:
            if self._escaped:
                self._escaped = False
            elif self._string:
                at = _IN_STRING.match(text, at).end()  # type: ignore[union-attr]  # always matches
                if at == len(text):
                    break
                self._escaped = text[at] == "\\"
                self._string = self._escaped
                self.done = not self._string and not self._depth
            elif self._depth:
                at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
                if at == len(text):
                    break
                self._bracket(text[at])
            elif text[at] in ",]}" or text[at].isspace():
                self.done = True
                break
            else:
                self._bracket(text[at])
            at += 1
        return at

    def _bracket(self, char: str) -> None:
        self._string = char == '"'
        if char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.done = not self._depth


class CallObject:
    """One call. Nothing goes out before it is certain to be one: it has a name, and arguments or its end.

    ``strict``: it must have arguments, and a key that calls do not have breaks it. ``raw`` is everything so far until
    the first piece is out: what the owner shows as content if there will be none.
    """

    def __init__(self, index: int, raw: str = "", strict: bool = False) -> None:
        self.state = State.OPEN
        self.announced = False
        self.raw = raw
        self._index, self._strict = index, strict
        self._expect = "{"
        self._key = ""
        self._name: str | None = None
        self._arguments: list[str] = []  # not out yet
        self._has_arguments = False
        self._value: JsonValue | None = None  # under way
        self._text: list[str] = []  # of the value under way, unless it is streamed
        self._streamed = False

    def feed(self, text: str, pieces: list[Piece]) -> str:
        """Takes what belongs to the object and returns the rest; adds to ``pieces``."""
        at = 0
        while at < len(text) and self.state is State.OPEN:
            if self._value is not None:
                end = self._value.scan(text, at)
                (self._arguments if self._streamed else self._text).append(text[at:end])
                at = end
                if self._value.done:
                    self._end_value()
            elif text[at].isspace():
                at += 1
            else:
                at += self._punctuation(text[at])
        if not self.announced:
            self.raw += text[:at]
        if self._name is not None and (self._has_arguments or self.state is State.DONE):
            arguments = "".join(self._arguments)
            if arguments or not self.announced:
                pieces.append(CallDelta(self._index, arguments, None if self.announced else self._name))
            self._arguments = []
            self.announced, self.raw = True, ""
        return text[at:]

    def _punctuation(self, char: str) -> int:
        """How many characters were taken: a value begins with the one that is seen."""
        expected = self._expect
        if expected == "key" and char == '"' or expected == "value":
            self._value = JsonValue()
            self._streamed = (expected == "value" and char == "{" and self._key in ARGUMENTS
                              and not self._has_arguments)
            self._has_arguments |= self._streamed
            return 0
        if char == "}" and expected in ("key", ","):
            self._close()
        elif char == expected:
            self._expect = {"{": "key", ":": "value", ",": "key"}[char]
        else:
            self.state = State.BROKEN
            return 0
        return 1

    def _close(self) -> None:
        if self._name is None or self._strict and not self._has_arguments:
            self.state = State.BROKEN
            return
        self.state = State.DONE
        if not self._has_arguments:
            self._arguments.append("{}")

    def _end_value(self) -> None:
        self._value = None
        if self._expect == "key":
            self._expect = ":"
            self._key = str(self._loads())
            if self._strict and self._key not in ("name", "type", "id", *ARGUMENTS):
                self.state = State.BROKEN
            return
        self._expect = ","
        if self._streamed:
            self._streamed = False
        elif self._key == "name" and self._name is None:
            name = self._loads()
            self._name = name if isinstance(name, str) and NAME.fullmatch(name) else None
            if self._name is None:
                self.state = State.BROKEN
        elif self._key in ARGUMENTS and not self._has_arguments:
            self._odd_arguments()
        self._text = []

    def _odd_arguments(self) -> None:
        """Arguments that are no object: null means none, and some models write the object as a string."""
        value = self._loads()
        if value is None:
            text = "{}"
        else:
            text = value if isinstance(value, str) else ""
            try:
                text.encode()
                whole = isinstance(json.loads(text), dict)
            except (ValueError, RecursionError):
                whole = False
            if not whole:
                self.state = State.BROKEN
                return
        self._has_arguments = True
        self._arguments.append(text)

    def _loads(self) -> object:
        """The value just read; an exception stands for one that is not JSON."""
        text, self._text = "".join(self._text), []
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            return error


class CallArray:
    """[call, call, ...] whose opening bracket has been read. ``count`` counts the calls from where the owner's begin.

    ``raw`` is everything before the first call that is certain: content if there will be none.
    """

    def __init__(self, first: int, raw: str) -> None:
        self.state = State.OPEN
        self.count = first
        self._raw = raw
        self._call: CallObject | None = None

    def feed(self, text: str, pieces: list[Piece]) -> str:
        """Takes what belongs to the array and returns the rest; where it breaks, from the object that is no call."""
        while text and self.state is State.OPEN:
            if self._call is not None:
                text = self._read(self._call, text, pieces)
                continue
            rest = text.lstrip(" \t\r\n,")
            self._raw, text = self._raw + text[:len(text) - len(rest)], rest
            if text[:1] == "{":
                self._call = CallObject(self.count, self._raw)
                self._raw = ""
            elif text[:1] == "]":
                self.state = State.DONE
                self._raw, text = "", self._raw + text if "[" in self._raw else text[1:]
            elif text:
                self.state = State.BROKEN
                self._raw, text = "", self._raw + text
        return text

    def finish(self) -> str:
        """Text that never became a call, when no more comes."""
        raw = self._raw if self._call is None else self._call.raw
        return "" if raw.isspace() else raw

    def _read(self, call: CallObject, text: str, pieces: list[Piece]) -> str:
        text = call.feed(text, pieces)
        if call.state is not State.OPEN:
            self.state = State.BROKEN if call.state is State.BROKEN else State.OPEN
            self.count += call.announced
            self._call = None
        return call.raw + text if self.state is State.BROKEN else text

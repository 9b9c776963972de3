"""Pythonic calls, as Llama 3.2 and 4 write them: an answer that is a list, [f(a=1, b="x"), g()].

A call is read with ``ast``: literals only, nothing is ever evaluated. Its arguments go out as JSON when it is complete.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any

from jaxkv.serve.parsers.base import NAME, CallDelta, ToolParser

START, TAG, CLOSE = "<|python_start|>", "<|python_tag|>", "<|python_end|>"
_IN_STRING = {quote: re.compile(rf"[^{quote}\\]*") for quote in "'\""}
_BETWEEN = re.compile(r"[^'\"()\[\]{}]*")
_DEEPEST = 32  # brackets in brackets
_LONGEST = 2**15  # characters of a call: Python's parser takes more than linear time for some
_WORDS = {"true": True, "false": False, "null": None}


class PythonicParser(ToolParser):
    """The tags of Llama 4 are never content."""

    markers = (START, TAG, CLOSE)

    def __init__(self) -> None:
        super().__init__()
        self._mode = "start"  # then "call", "next" (behind a call), "end" (behind the list), "text"
        self._call = ""  # the list's opening bracket (first call only) and the call under way
        self._scan = CallSource()

    def _step(self) -> bool:
        if self._mode == "text":
            self._say(self._held)
            self._held = ""
            return False
        if self._mode == "call":
            return self._read()
        text = self._held.lstrip()
        tag = next((tag for tag in self.markers if text.startswith(tag)), None)
        if tag and self._mode != "next":
            self._held = text[len(tag):]
            return True
        if not text or self._mode != "next" and any(tag.startswith(text) for tag in self.markers):
            return False
        if self._mode == "start" and text[0] == "[":
            self._mode, self._call, self._held = "call", self._held[:len(self._held) - len(text) + 1], text[1:]
        elif self._mode == "next" and text[0] in ",]":
            self._mode, self._call, self._held = ("call", ",", text[1:]) if text[0] == "," else ("end", "", text[1:])
        else:
            self._mode = "text"
        return True

    def _read(self) -> bool:
        end = self._scan.scan(self._held)
        self._call += self._held[:end]
        self._held = self._held[end:]
        too_long = len(self._call) > _LONGEST
        if not self._scan.done and not self._scan.broken and not too_long:
            return False
        call = call_of(self._call.lstrip("[, \t\r\n")) if self._scan.done and not too_long else None
        self._mode = "text" if call is None else "next"
        if call is None:
            self._say(self._call)
        else:
            self._pieces.append(CallDelta(self.count, call[1], call[0]))
            self.count += 1
        self._call, self._scan = "", CallSource()
        return True

    def _end(self) -> None:
        if self._mode == "call":
            self._say(self._call)
        elif self._mode not in ("next", "end") or self._held.strip():
            self._say(self._held)


class CallSource:
    """Finds the parenthesis that ends a call. What cannot begin one, or nests too deep, is broken."""

    def __init__(self) -> None:
        self.done = self.broken = False
        self._depth = 0
        self._quote = ""
        self._escaped = False
        self._begun = False  # the name has begun
        self._named = 0  # its characters

    def scan(self, text: str) -> int:
        """Index behind what belongs to the call."""
        at = 0
        while at < len(text) and not self.done and not self.broken:
            if self._escaped:
                self._escaped = False
            elif self._quote:
                at = _IN_STRING[self._quote].match(text, at).end()  # type: ignore[union-attr]  # always matches
                if at == len(text):
                    break
                self._escaped = text[at] == "\\"
                self._quote = self._quote if self._escaped else ""
            elif self._depth:
                at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
                if at == len(text):
                    break
                self._mark(text[at])
            else:
                self._name(text[at])
            at += not self.broken
        return at

    def _name(self, char: str) -> None:
        if char == "(" and self._named:
            self._depth = 1
        elif self._named or not char.isspace():
            self._named += 1
            self.broken = not NAME.fullmatch(char) or self._named > 64

    def _mark(self, char: str) -> None:
        if char in "'\"":
            self._quote = char
        else:
            self._depth += 1 if char in "([{" else -1
            self.done, self.broken = not self._depth, self._depth > _DEEPEST


def call_of(source: str) -> tuple[str, str] | None:
    """Name and JSON arguments of a call's source; None if it is anything but a call with literals by name."""
    try:
        node = ast.parse(source, mode="eval").body
        if not isinstance(node, ast.Call) or node.args:
            return None
        name = ast.unparse(node.func)
        if not NAME.fullmatch(name):
            return None
        values: dict[str, Any] = {}
        for keyword in node.keywords:
            if keyword.arg is None or keyword.arg in values:
                return None
            values[keyword.arg] = literal(keyword.value)
        arguments = json.dumps(values, ensure_ascii=False, allow_nan=False)
        arguments.encode()  # ValueError for a lone surrogate
        return name, arguments
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def literal(node: ast.expr) -> Any:
    """The JSON value of a literal. ValueError for anything else."""
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None as value):
            return value
        case ast.Name(id=word) if word in _WORDS:
            return _WORDS[word]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [literal(item) for item in items]
        case ast.Dict(keys=keys, values=values):
            if not all(isinstance(key, ast.Constant) and isinstance(key.value, str) for key in keys):
                raise ValueError("keys must be strings")
            return {key.value: literal(value) for key, value in zip(keys, values)}  # type: ignore[union-attr]
    raise ValueError(f"{type(node).__name__} is no literal")

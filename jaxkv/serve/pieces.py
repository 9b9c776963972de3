"""JSON of megabytes, parsed and written a piece at a time: the interpreter's lock is never held for long, so that other
threads go on.

``Outline`` finds where a text may be cut and how much of it there is; numpy does that without the lock. What it proposes
is proven by parsing: every piece between two cuts is parsed as the list, object or string it is a part of.
"""

from __future__ import annotations

import re
import time
from bisect import bisect
from collections import defaultdict
from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any

import numpy as np
import orjson

PIECE = 2**16  # bytes that are parsed at once
ITEMS = 64  # of a list that are written at once
NAME = 2**16  # longest name of a field with a large value, in bytes
_STEP = np.zeros(256, np.int8)  # what a byte outside of strings does to the level
_STEP[list(b"[{")], _STEP[list(b"]}")] = 1, -1
_BLANK = re.compile(rb"[ \t\n\r]*")
_NAME = re.compile(rb'[ \t\n\r]*("(?:[^"\\]|\\.)*+")[ \t\n\r]*:', re.DOTALL)
_SAFE = re.compile(rb"[^\\]{12}(?=[^\\\x80-\xbf])")  # behind it a string may be cut: no escape and no character goes on there


class TooMany(ValueError):
    """A list is longer than it may be."""


class Outline:
    """Where the commas of a JSON text are, the first and the last of each level in every piece; ``levels`` is how deep it is
    nested, ``containers`` how many lists and objects it has. JSONDecodeError if these do not end."""

    def __init__(self, text: bytes, most: int):
        self._text, self._most = text, most
        self._commas: defaultdict[int, list[int]] = defaultdict(list)  # level -> positions
        self.levels = self.containers = level = 0
        inside, escaped = False, False  # a string, by the last byte of the piece before
        for start in range(0, len(text), PIECE):
            piece = text[start : start + PIECE]
            if escaped:
                piece = b" " + piece[1:]
            piece = piece.replace(b"\\\\", b"  ").replace(b'\\"', b"  ")
            escaped = piece.endswith(b"\\")
            codes = np.frombuffer(piece, np.uint8)
            outside = np.logical_xor.accumulate(codes == ord('"')) == inside
            steps = _STEP[codes] * outside
            levels = np.cumsum(steps, dtype=np.int32) + level
            self._note(start, np.flatnonzero((codes == ord(",")) & outside), levels)
            self.containers += int(np.count_nonzero(steps > 0))
            self.levels = max(self.levels, int(levels.max()))
            level, inside = int(levels[-1]), not outside[-1]
            _rest()
        if level or inside:
            raise _broken("unexpected end of data", len(text))

    def _note(self, start: int, commas: np.ndarray, levels: np.ndarray) -> None:
        of = levels[commas]
        for level in np.unique(of):
            found = commas[of == level]
            self._commas[int(level)] += [start + int(found[0]), start + int(found[-1])][: found.size]

    def load(self) -> Any:
        """What ``orjson.loads`` gives. JSONDecodeError as there, its position that within a piece; TooMany for a list of more
        than ``most`` items."""
        return self._value(0, len(self._text), 1)

    def _value(self, start: int, end: int, level: int) -> Any:
        """The value between two positions, whose items are at ``level``."""
        text = self._text
        if end - start <= PIECE:
            return self._parse(b"%b", start, end)
        start = _BLANK.match(text, start).end()  # type: ignore[union-attr]  # it matches nothing, too
        close = {b"[": b"]", b"{": b"}", b'"': b'"'}.get(text[start : start + 1], b"")
        last = text.rfind(close, start + 1, end)
        if not close or last < 0 or text[last + 1 : end].strip():
            return self._parse(b"%b", start, end)  # says what is wrong
        if close == b'"':
            return self._string(start + 1, last)
        commas = self._commas[level]
        cuts = [start, *commas[bisect(commas, start) : bisect(commas, last)], last]
        groups = [(before + 1, behind) for before, behind in zip(cuts, cuts[1:])]
        return self._list(groups, level) if close == b"]" else self._object(groups, level)

    def _list(self, groups: list[tuple[int, int]], level: int) -> list[Any]:
        out: list[Any] = []
        for start, end in groups:  # one that is larger than a piece is one item
            out += [self._value(start, end, level + 1)] if end - start > PIECE else \
                self._parse(b"[%b]", start, end) or _empty(groups)
            if len(out) > self._most:
                raise TooMany(f"a list may hold at most {self._most} items")
        return out

    def _object(self, groups: list[tuple[int, int]], level: int) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for start, end in groups:
            if end - start <= PIECE:
                out |= self._parse(b"{%b}", start, end) or _empty(groups)
            elif (name := _NAME.match(self._text, start, start + NAME)) is None:
                raise _broken("expected a name of at most 64 KiB", start)
            else:
                out[orjson.loads(name[1])] = self._value(name.end(), end, level + 1)
        return out

    def _string(self, start: int, end: int) -> str:
        parts = []
        while start < end:
            behind = end if end - start <= PIECE else self._cut(start, end)
            parts.append(self._parse(b'"%b"', start, behind))
            start = behind
        return "".join(parts)

    def _cut(self, start: int, end: int) -> int:
        """Where a string may be cut, about a piece behind ``start``."""
        for place in range(start + PIECE // 2, end, PIECE):
            if found := _SAFE.search(self._text, place, min(end, place + PIECE)):
                return found.end()
            _rest()
        return end

    def _parse(self, form: bytes, start: int, end: int) -> Any:
        value = orjson.loads(form % self._text[start:end])
        _rest()
        return value


def dumps(value: Any, option: int = 0) -> list[bytes]:
    """What ``orjson.dumps`` gives, in parts of about a piece. Lists are cut, and the objects of lists near the top are gone
    into; an object's names must be texts."""
    parts: list[bytes] = []
    small, size = [], 0
    for part in _parts(value, option, 0):
        small.append(part)
        size += len(part)
        if size >= PIECE:
            parts.append(b"".join(small))
            small, size = [], 0
            _rest()
    return [*parts, b"".join(small)]


def _parts(value: Any, option: int, level: int) -> Iterator[bytes]:
    if isinstance(value, dict):
        for before, (name, item) in zip(chain((b"{",), repeat(b",")), value.items()):
            yield before + orjson.dumps(name) + b":"
            yield from _parts(item, option, level + 1)
        yield b"}" if value else b"{}"
    elif isinstance(value, list) and level < 2 and value and isinstance(value[0], dict):
        for before, item in zip(chain((b"[",), repeat(b",")), value):
            yield before
            yield from _parts(item, option, level + 1)
        yield b"]"
    elif isinstance(value, list) and len(value) > ITEMS:
        for start in range(0, len(value), ITEMS):
            yield b"," if start else b"["
            yield orjson.dumps(value[start : start + ITEMS], option=option)[1:-1]
        yield b"]"
    else:
        yield orjson.dumps(value, option=option)


def _rest() -> None:
    """Lets threads that wait for the interpreter's lock have it: a sleep of 0 would take it back before they wake."""
    time.sleep(1e-5)


def _broken(message: str, position: int) -> orjson.JSONDecodeError:
    return orjson.JSONDecodeError(message, "", position)


def _empty(groups: list[tuple[int, int]]) -> tuple[()]:
    """What nothing between two commas is an error for; a list or object may be empty as a whole."""
    if len(groups) > 1:
        raise _broken("expected a value between commas", groups[0][0])
    return ()

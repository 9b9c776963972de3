"""What keeps a malformed body as cheap as a good one: how deep and how large the parts of its JSON may be."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from jaxkv.serve.errors import bad_request, path_of
from jaxkv.serve.pieces import PIECE, Outline, TooMany

T = TypeVar("T")
MAX_LEVELS = 100  # of nested lists and objects; a few hundred end orjson, repr and templates
MAX_CONTAINERS = 100_000  # lists and objects of a body; each is work for the garbage collector, which stops all threads
MAX_ITEMS = 2**20  # of one list: even to free a million numbers takes milliseconds
Items = Annotated[list[T], Field(fail_fast=True)]  # one complaint, not one for each element


def json_of(body: bytes, name: str = "the body") -> Any:
    """The JSON in ``body``. Where that is more than a piece, the interpreter's lock is not held for long: what takes time may
    so run beside the event loop. Raises ApiError."""
    try:
        if len(body) <= PIECE:
            return orjson.loads(body)
        outline = Outline(body, MAX_ITEMS)
        if outline.levels > MAX_LEVELS + 1:
            raise bad_request(f"{name} may be nested at most {MAX_LEVELS} levels deep, got {outline.levels - 1}",
                              code="nested_too_deeply")
        if outline.containers > MAX_CONTAINERS:
            raise bad_request(f"{name} may hold at most {MAX_CONTAINERS} lists and objects, got {outline.containers}")
        return outline.load()
    except TooMany as error:
        raise bad_request(f"{name} holds too much: {error}") from None
    except orjson.JSONDecodeError as error:
        if field := _not_finite(body):
            raise bad_request(f"{field} must be a finite number", field) from None
        raise bad_request(f"{name} is not valid JSON: {error}", code="invalid_json") from None


def _not_finite(body: bytes) -> str:
    """The path of a number that is not finite, if the body is small and else valid."""
    if len(body) > PIECE:
        return ""
    try:
        place = _place(json.loads(body, parse_int=float))
    except (ValueError, RecursionError):
        return ""
    return path_of(place or ()).encode(errors="replace").decode()


def _place(value: Any) -> tuple[int | str, ...] | None:
    """Where there is a number that is not finite."""
    if isinstance(value, float):
        return None if math.isfinite(value) else ()
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        if (found := _place(item)) is not None:
            return (key, *found)
    return None


def check_levels(value: Any, name: str, param: str | None = None) -> None:
    """Raises ApiError for JSON that is nested more than ``MAX_LEVELS`` deep."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_LEVELS):
        if not level:
            return
        level = [item for parent in level for item in (parent.values() if type(parent) is dict else parent)
                 if type(item) is dict or type(item) is list]
    if level:
        raise bad_request(f"{name} may be nested at most {MAX_LEVELS} levels deep, got more", param, "nested_too_deeply")


def at_most(most: int, within: str = "") -> BeforeValidator:
    """Refuses a larger list or object before its entries are looked at, or a list whose objects hold lists called ``within``
    that have more entries together."""
    def check(value: Any) -> Any:
        lists = [value]
        if within:
            lists = [entry.get(within) for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []
        count = sum(len(one) for one in lists if isinstance(one, list | dict))
        if count > most:
            raise PydanticCustomError("too_long", "must hold at most {most} {what}, not {count}",
                                      {"most": most, "count": count, "what": within or "entries"})
        return value

    return BeforeValidator(check)


Metadata = Annotated[dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
                     at_most(16)]  # as in the OpenAI API

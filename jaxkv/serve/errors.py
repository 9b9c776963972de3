"""OpenAI error objects: {"error": {"message", "type", "param", "code"}} for whatever is refused or fails.

Owns the shape, the types and which field a message is about. Owns no HTTP: ``app`` and ``answer`` send it.
"""

from __future__ import annotations

import reprlib
from typing import Any

import orjson
from pydantic import ValidationError

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 500: "server_error",
          503: "service_unavailable_error", 504: "timeout_error"}
_MAX_PATH = 200  # characters of a field's path: keys come from outside
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


class ApiError(Exception):
    """Ends a request with an HTTP status and an error object."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None,
                 headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers or {}

    def body(self) -> dict[str, Any]:
        """The error object, ready for JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def render(self) -> bytes:
        """The error object as JSON text."""
        return orjson.dumps(self.body())

    def event(self) -> bytes:
        """The error object as the last event of a stream."""
        return b"data: %b\n\ndata: [DONE]\n\n" % self.render()


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400 about one field."""
    return ApiError(400, message, param=param, code=code)


def shown(value: Any) -> str:
    """A value for a message, in a time and a length that do not grow with it."""
    return _short.repr(value)


def shutting_down() -> ApiError:
    """The 503 of a server that drains."""
    return ApiError(503, "the server is shutting down", code="shutting_down")


def generation_failed(why: str) -> ApiError:
    """The 500 of a request that the engine ended."""
    return ApiError(500, why or "the model could not go on with this request", code="generation_failed")


def from_validation(error: ValidationError) -> ApiError:
    """The first complaint of pydantic as a 400 whose param is the path of the field."""
    errors = error.errors(include_url=False, include_context=False)
    first, path = errors[0], path_of(errors[0]["loc"])
    what = " or ".join(dict.fromkeys(e["msg"] for e in errors if path_of(e["loc"]) == path))  # branches of a union
    got = "" if first["type"] == "missing" else f", got {shown(first.get('input'))}"
    return bad_request(f"{path or 'body'}: {what}{got}", path or None)


def path_of(location: tuple[int | str, ...]) -> str:
    """stop[0], messages[1].content; pydantic's names of union branches ("str", "list[str]", ...) are left out."""
    parts = [p for p in location if not (isinstance(p, str) and (p == "str" or p.startswith(("list[", "dict["))))]
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in parts).lstrip(".")[:_MAX_PATH]


def from_value_error(error: ValueError, fields: set[str], rename: dict[str, str]) -> ApiError:
    """A ValueError whose message starts with the field's name; ``rename`` maps engine names to the request's."""
    message = str(error)
    first, _, rest = message.partition(" ")
    if first in rename:
        first, message = rename[first], f"{rename[first]} {rest}"
    too_long = first == "prompt" and "max_model_len" in message
    return bad_request(message, first if first in fields else None, "context_length_exceeded" if too_long else None)

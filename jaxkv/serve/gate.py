"""What every HTTP request passes before and after its route: its id, its API key, its share, its deadline, its record.

Owns headers that are about the request rather than its content, and how much may be posted at once. Knows no route: what is
posted is work, which has bounds, and that, /v1 and /debug ask for a key where there are any.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxkv.serve.answer import respond
from jaxkv.serve.engine_loop import EngineLoop
from jaxkv.serve.errors import ApiError, bad_request, shutting_down
from jaxkv.serve.limits import KeyRing, Limits
from jaxkv.serve.records import RECORD, Record

FAREWELL_S = 2.0  # longest wait for a client to take the error that ends its request
BODY_WAIT_S = 60.0  # longest wait for the next bytes of a body
POSTS = 4  # most posts open at once, for each sequence that may be
BODIES = 8  # most bytes of bodies being read at once, in largest bodies
_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")
_SECONDS = re.compile(rb"[0-9]{1,6}(\.[0-9]{1,6})?")


class Gate:
    """The outermost ASGI application but for CORS. ``done`` gets the record of every request at its end."""

    def __init__(self, app: ASGIApp, loop: EngineLoop, keys: KeyRing, limits: Limits, done: Callable[[Record], None]):
        self.app, self.loop, self.keys, self.limits, self.done = app, loop, keys, limits, done
        self._open: Counter[int] = Counter()  # requests under way by number of the key
        self._posts = 0  # requests under way that are work
        self._bytes = 0  # of bodies that have come and whose prompts the engine does not have yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers: dict[bytes, bytes] = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        name = given.decode() if _ID.fullmatch(given) else uuid.uuid4().hex
        trace = headers.get(b"traceparent")
        path = re.sub(r"[^!-~]", "?", scope["path"][:100])  # one word of a log line
        record = Record(name, f"{scope['method']} {path}", trace.decode("latin-1") if trace else None)
        scope[RECORD] = record
        writer, body = _Writer(send, record), _Body(self, receive)
        key = None
        self._posts += _works(scope)
        try:
            key = self._enter(scope, headers)
            async with asyncio.timeout(self._seconds(scope, headers)) as deadline:
                await self.app(scope, body.receive if _works(scope) else receive, writer.send)
        except ApiError as error:
            await writer.fail(error)
        except TimeoutError:
            if not deadline.expired():
                raise
            with contextlib.suppress(TimeoutError):  # of a client that does not read
                async with asyncio.timeout(FAREWELL_S):
                    await writer.fail(ApiError(504, "the request took longer than its deadline", code="deadline_exceeded"))
        finally:
            body.forget()
            self._posts -= _works(scope)
            if key is not None:
                self._open[key] -= 1
            record.end = time.monotonic()
            self.done(record)
            del scope[RECORD]  # uvicorn keeps the scope while the connection is idle, and prompts are long

    def _enter(self, scope: Scope, headers: dict[bytes, bytes]) -> int | None:
        """The number of the key that the request counts for until it ends, if it does. Raises ApiError for what may not
        enter."""
        key = None
        if self.keys and (_works(scope) or scope["path"].startswith(("/v1", "/debug"))):
            scheme, _, token = headers.get(b"authorization", b"Bearer " + headers.get(b"x-api-key", b"")).partition(b" ")
            key = self.keys.find(token.strip()) if scheme.lower() == b"bearer" else None
            if key is None:
                raise ApiError(401, "missing or wrong API key: send \"Authorization: Bearer KEY\"", code="invalid_api_key",
                               headers={"www-authenticate": "Bearer"})
            self.keys.mark(scope, key)
        if not _works(scope):
            return None
        if self.loop.draining:
            raise shutting_down()
        if self._posts > POSTS * self.limits.max_open_requests:
            raise self._busy(f"too many requests at once: the limit is {POSTS * self.limits.max_open_requests}")
        limit = self.limits.max_requests_per_key
        if key is None or not limit:
            return None
        if self._open[key] >= limit:
            raise self._busy(f"too many requests at once with this API key: {self._open[key]} under way, the limit is {limit}")
        self._open[key] += 1
        return key

    def count(self, size: int) -> None:
        """Counts bytes of a body that came, or fewer than none that went. Raises ApiError for more than the bound."""
        self._bytes += size
        most = BODIES * self.limits.max_body
        if size > 0 and self._bytes > most:
            raise self._busy(f"too many bodies are being read: they hold {self._bytes} bytes, the limit is {most}")

    def _busy(self, message: str) -> ApiError:
        return ApiError(429, message, code="too_many_requests", headers={"retry-after": str(self.loop.retry_after(1))})

    def _seconds(self, scope: Scope, headers: dict[bytes, bytes]) -> float | None:
        """How long the request may take: the server's bound, or less if the client asks for less."""
        limit, asked = self.limits.request_timeout or None, headers.get(b"x-request-timeout")
        if not _works(scope):
            return None
        if asked is None:
            return limit
        if not _SECONDS.fullmatch(asked) or not float(asked):
            raise bad_request(f"x-request-timeout must be a number of seconds above 0, got {asked[:40].decode('latin-1')!r}",
                              "x-request-timeout")
        return min(float(asked), limit or float("inf"))


class _Body:
    """Receives a body within the gate's bounds. Its bytes count until the application listens for what comes behind it, which
    is when the engine has the prompts, or until the request ends."""

    def __init__(self, gate: Gate, receive: Receive):
        self._gate, self._receive = gate, receive
        self._size, self._complete = 0, False

    async def receive(self) -> Message:
        if self._complete:
            self.forget()
            return await self._receive()
        try:
            async with asyncio.timeout(BODY_WAIT_S):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, f"no byte of the body came for {BODY_WAIT_S:g} s", code="request_timeout",
                           headers={"connection": "close"}) from None
        self._complete = not message.get("more_body", False)
        size = len(message.get("body", b""))
        self._size += size
        self._gate.count(size)
        return message

    def forget(self) -> None:
        """Its bytes count no more."""
        self._gate.count(-self._size)
        self._size = 0


class _Writer:
    """Sends what the application answers, with the request's id, and knows how far that has got."""

    def __init__(self, send: Send, record: Record):
        self._send, self._record = send, record
        self._streams = self._complete = False

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._record.status = message["status"]
            headers: list[tuple[bytes, bytes]] = message.setdefault("headers", [])
            headers.append((b"x-request-id", self._record.id.encode()))
            self._streams = any(value.startswith(b"text/event-stream") for name, value in headers if name == b"content-type")
        elif not message.get("more_body"):
            self._complete = True
        await self._send(message)

    async def fail(self, error: ApiError) -> None:
        """Ends the answer with an error: as the whole answer, as a last event, or else by cutting it off."""
        if not self._record.status:
            await respond(self.send, error.status, error.render(), error.headers)
        elif not self._complete:
            self._record.error = error.code
            if not self._streams:
                raise error
            await self.send({"type": "http.response.body", "body": error.event(), "more_body": False})


def _works(scope: Scope) -> bool:
    return bool(scope["method"] == "POST")

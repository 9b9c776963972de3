"""A small HTTP/1.1 client for one's own commands: JSON and server-sent events, one connection a request.

Standard library only, and light enough to measure a server with. Bounds what it holds: a line of ``MAX_LINE`` bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from jaxkv.config import ConfigError

MAX_LINE = 2**24  # bytes of one event
CONNECT_S = 10.0


class HttpError(Exception):
    """An answer that is none: the message for a person, and the status (0: there was no answer)."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Server:
    """A server's address, with or without /v1 at its end, and its key. ConfigError if it is no http(s) URL."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        try:
            parts = urlsplit(url)
            self._host, port = parts.hostname or "", parts.port
        except ValueError as error:
            raise ConfigError(f"url {url!r} is no URL: {error}") from None
        if parts.scheme not in ("http", "https") or not self._host:
            raise ConfigError(f"url must look like http://host:port, got {url!r}")
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = port or (443 if self._tls else 80)
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"host": parts.netloc.rpartition("@")[2], "connection": "close", "accept": "*/*"}
        if api_key:
            self._headers["authorization"] = f"Bearer {api_key}"

    async def get(self, path: str) -> Any:
        """The JSON at a path. HttpError."""
        async with self._request("GET", path, None) as body:
            return _json(b"".join([part async for part in body]))

    async def events(self, path: str, request: Mapping[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """Posts JSON and yields the events of the stream that answers. HttpError, also for an error within the stream."""
        async with self._request("POST", path, json.dumps(request).encode()) as body:
            async for line in _lines(body):
                if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
                    event = _json(data)
                    if "error" in event:
                        raise HttpError(500, _message(event))
                    yield event

    @contextlib.asynccontextmanager
    async def _request(self, method: str, path: str, body: bytes | None) -> AsyncIterator[AsyncIterator[bytes]]:
        """Sends a request; the parts of a successful answer's body. The connection ends with the block."""
        try:
            async with asyncio.timeout(CONNECT_S):
                reader, writer = await asyncio.open_connection(self._host, self._port, ssl=self._tls, limit=MAX_LINE)
        except (OSError, TimeoutError) as error:
            reason = getattr(error, "strerror", None) or str(error) or "timed out"
            raise HttpError(0, f"cannot reach {self._headers['host']}: {reason}") from None
        try:
            headers = self._headers | ({"content-type": "application/json", "content-length": str(len(body))} if body else {})
            head = f"{method} {self._base}{path} HTTP/1.1\r\n" + "".join(f"{k}: {v}\r\n" for k, v in headers.items())
            writer.write(head.encode() + b"\r\n" + (body or b""))
            status, fields = await _head(reader)
            parts = _body(reader, fields)
            if status >= 400:
                raise HttpError(status, _message(_json(b"".join([part async for part in parts])) or {}) or f"HTTP {status}")
            yield parts
        except (OSError, EOFError, asyncio.LimitOverrunError, ValueError) as error:
            raise HttpError(0, f"the connection broke: {str(error) or type(error).__name__}") from None
        finally:
            writer.close()


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    fields = dict(line.lower().split(":", 1) for line in lines[1:] if ":" in line)
    status = lines[0].split(" ")[1:2]
    if not lines[0].startswith("HTTP/") or not status:
        raise ValueError("no HTTP")
    return int(status[0]), {name: value.strip() for name, value in fields.items()}


async def _body(reader: asyncio.StreamReader, fields: Mapping[str, str]) -> AsyncIterator[bytes]:
    """The parts of a body, however its end is told: by chunks, by a length, or by the end of the connection."""
    if fields.get("transfer-encoding") == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
    elif "content-length" in fields:
        yield await reader.readexactly(int(fields["content-length"]))
    else:
        while part := await reader.read(2**16):
            yield part


async def _lines(parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest = b""
    async for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            yield line
    yield rest


def _json(data: bytes) -> Any:
    """A JSON value; what is none becomes an error's message."""
    try:
        return json.loads(data)
    except ValueError:
        return {"error": {"message": data[:200].decode("utf-8", "replace").strip() or "an empty answer"}}


def _message(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else body
    return str(error.get("message") if isinstance(error, dict) else error)

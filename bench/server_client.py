"""A load generator that costs little: raw HTTP/1.1 streams on one event loop, in a process of its own.

    python -m bench.server_client URL < requests.json > result.json

``requests``: [[delay in seconds, body of /v1/completions], ...]. The result gives, for each, when it was sent, its status and
when each event of its stream came, on the clock of ``time.perf_counter``; bytes that come together share a time.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import Any

from orjson import loads


class Stream(asyncio.Protocol):
    """One request on a connection of its own."""

    def __init__(self, body: dict[str, Any]) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.result: dict[str, Any] = {"sent": 0.0, "status": 0, "times": [], "tokens": 0}
        self._body = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
        self._tail = b""

    def connection_made(self, transport: Any) -> None:
        self.result["sent"] = time.perf_counter()
        transport.write(b"POST /v1/completions HTTP/1.1\r\nhost: bench\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%s"
                        % (len(self._body), self._body))

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if not self.result["status"]:
            self.result["status"] = int(data[9:12])
        events = data.count(b"data: {")
        self.result["times"] += [now] * events
        self._tail = (self._tail + data)[-2000:]

    def connection_lost(self, error: Exception | None) -> None:
        lines = [line for line in self._tail.split(b"\n") if line.startswith(b'data: {"id"')]
        if lines and self._tail.rstrip().split(b"\n")[-1].strip() in (b"0", b"data: [DONE]"):
            self.result["tokens"] = loads(lines[-1][6:])["usage"]["completion_tokens"]
            del self.result["times"][-1]  # the usage
        self.done.set_result(None)


async def run(host: str, port: int, requests: list[tuple[float, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Sends every request after its delay, and waits for all."""
    loop = asyncio.get_running_loop()

    async def one(delay: float, body: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(delay)
        _, stream = await loop.create_connection(lambda: Stream(body), host, port)
        await stream.done
        return stream.result

    return await asyncio.gather(*(one(delay, body) for delay, body in requests))


def main() -> None:
    host, port = sys.argv[1].removeprefix("http://").split(":")
    json.dump(asyncio.run(run(host, int(port), json.load(sys.stdin))), sys.stdout)


if __name__ == "__main__":
    main()

"""The commands' HTTP client against every way an answer may be framed, or not come."""

import asyncio
import contextlib

import pytest

from jaxkv.commands.http import HttpError, Server

HEAD = b"HTTP/1.1 200 OK\r\n"
EVENTS = b'data: {"n": 1}\n\n: a comment\n\ndata: {"n": "\xe6\x97\xa5"}\r\n\r\ndata: [DONE]\n\n'


def ask(answer: bytes, events: bool):
    """What the client makes of these bytes from a server that then hangs up."""
    async def run():
        async def talk(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            for start in range(0, len(answer), 7):  # in pieces
                writer.write(answer[start:start + 7])
                await writer.drain()
            writer.close()

        listening = await asyncio.start_server(talk, "127.0.0.1", 0)
        async with listening:
            server = Server(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1/")
            if not events:
                return await server.get("/x")
            return [event async for event in server.events("/x", {})]

    return asyncio.run(run())


def chunked(data: bytes, size: int) -> bytes:
    parts = [data[i:i + size] for i in range(0, len(data), size)]
    return b"".join(b"%x;ext=1\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_every_framing(size):
    for head, frame in ((b"transfer-encoding: Chunked\r\n", lambda data: chunked(data, size)), (b"", lambda data: data),
                        (b"Content-Length: %d\r\n", lambda data: data)):
        for events, body in ((False, b'{"n": [1, 2]}'), (True, EVENTS)):
            length = head % len(body) if b"%d" in head else head
            found = ask(HEAD + length + b"\r\n" + frame(body), events)
            assert found == ([{"n": 1}, {"n": "日"}] if events else {"n": [1, 2]})


@pytest.mark.parametrize(("answer", "words"), [
    (b"", "broke"), (b"HTTP/1.1 200 OK\r\n", "broke"), (b"nonsense\r\n\r\n", "broke"),
    (HEAD + b"content-length: 100\r\n\r\nshort", "broke"), (HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", "broke"),
    (b'HTTP/1.1 429 No\r\n\r\n{"error": {"message": "too many"}}', "^too many$"), (b"HTTP/1.1 502 Bad\r\n\r\n<html>", "<html>"),
    (HEAD + b'\r\ndata: {"error": {"message": "the engine failed"}}\n\n', "the engine failed"),
    (b"HTTP/1.1 401 No\r\n\r\n", "an empty answer"),
])
def test_what_is_no_answer(answer, words):
    with pytest.raises(HttpError, match=words):
        ask(answer, events=True)


def test_nobody_there():
    with pytest.raises(HttpError, match="cannot reach 127.0.0.1:9"):
        asyncio.run(Server("http://127.0.0.1:9").get("/"))


def test_urls_and_keys():
    with contextlib.suppress(HttpError):
        asyncio.run(Server("http://127.0.0.1:9/base/v1", "key").get("/"))
    assert Server("https://example.org/v1", "k")._headers["authorization"] == "Bearer k"
    assert Server("https://user@example.org:444")._headers["host"] == "example.org:444"

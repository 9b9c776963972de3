"""Long proofs of the server: a full queue, clients that go away, malformed requests, memory over many requests.

Each works on a running server through its port alone; what the server holds is read from /metrics. ``step_of`` makes one of
them a step of ``bench.soak``, with a server of its own.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import urllib.request
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.server import Server
from bench.server_client import run as send_all

FLAGS = ["--kv-cache-memory", "8M", "--host-kv-memory", "4M", "--max-model-len", "512", "--max-num-seqs", "8",
         "--max-num-batched-tokens", "128"]
HELD = {"pages": "vllm:kv_cache_usage_perc", "tasks": "jaxkv:event_loop_tasks", "files": "process_open_fds"}
QUEUED_BYTES = 2**16  # most that a waiting request may take, its connection included ...
ONCE_BYTES = 2**25  # ... besides what only the first of a process take
FLAT = 0.02  # most growth of resident memory
AT_ONCE = 32

GOOD = {"prompt": "def add(a, b):", "max_tokens": 8}
WRONG: list[tuple[str, Any]] = [
    ("max_tokens", -1), ("max_tokens", "5"), ("max_tokens", 1.5), ("max_tokens", 10**30), ("temperature", -0.1),
    ("temperature", "hot"), ("top_p", 0), ("top_p", 7), ("top_k", -2), ("min_p", 2), ("n", 0), ("n", 10**4), ("seed", 2**63),
    ("presence_penalty", 3), ("repetition_penalty", 0), ("logit_bias", {"x": 1}), ("logit_bias", [1]), ("stop", [""]),
    ("stop", 7), ("stop_token_ids", ["a"]), ("stop_token_ids", [10**6]), ("min_tokens", -1), ("logprobs", 99), ("stream", 1),
    ("echo", "yes"), ("ignore_eos", "no"), ("priority", 2**40), ("cache_salt", 5), ("retention", -1), ("prompt", []),
    ("prompt", {}), ("prompt", [[]]), ("prompt", [-1]), ("prompt", [True]), ("prompt", [10**6]), ("prompt", [1] * 600),
    ("prompt", "word " * 900), ("model", "gpt-9"), ("model", 5), ("stream_options", {"include_usage": True})]
BROKEN = [b"", b"{", b"[]", b"null", b'"x"', b'{"prompt": NaN}', b'{"prompt": "a", "top_p": Infinity}',
          b'{"prompt": "\\ud800"}', b"\xff\xfe", b"[" * 5000, b'{"prompt": "a",}', b'{"prompt"}',
          *(b'{"prompt": "a", "%b": %b}' % (name, b'{"a": [' * levels + b"]}" * levels)
            for name in (b"stop", b"model", b"guided_json", b"x") for levels in (60, 130, 500)),
          b'{"prompt": "a", "logit_bias": {"%b": 1}}' % (b"9" * 5000), b'{"prompt": [%b[1]], "n": 128}' % (b"[1]," * 5000),
          *(b'{"prompt": "a", "%b": [%b]}' % (name, b",".join([item] * 10**5))
            for name, item in ((b"stop", b"1"), (b"stop_token_ids", b'"a"'), (b"guided_choice", b"[]")))]
ELSEWHERE = [("GET", "/v1/completions"), ("POST", "/v1/nope"), ("DELETE", "/v1/models"), ("POST", "/health"),
             ("GET", "/../../etc/passwd"), ("PUT", "/v1/completions"), ("GET", "/debug/kv?top=-1"), ("GET", "/debug/kv?top=x")]
NO_HTTP = [b"\x00\x01\x02\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9.9\r\n\r\n", b"hello world\r\n\r\n",
           b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
           b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99999999999\r\n\r\n"]


def metrics(url: str) -> dict[str, float]:
    """Metric -> value, summed over labels."""
    out: Counter[str] = Counter()
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        for line in answer.read().decode().splitlines():
            if not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                out[name.partition("{")[0]] += float(value)
    return out


def settled(url: str, baseline: dict[str, float] | None = None, seconds: float = 10.0) -> dict[str, float]:
    """Metrics once nothing runs, and once nothing more is held than in ``baseline`` or after ``seconds`` more."""
    end = time.monotonic() + seconds
    while True:
        now = metrics(url)
        if now["vllm:num_requests_running"] + now["vllm:num_requests_waiting"]:
            end = time.monotonic() + seconds
        elif baseline is None or time.monotonic() > end or all(now[name] <= baseline[name] for name in HELD.values()):
            return now
        time.sleep(0.1)


def address(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


async def exchange(url: str, data: bytes, hang_up: float | None = None, whole: bool = True) -> int:
    """The status of the answer to ``data``; after ``hang_up`` seconds the connection is cut off. 0: no answer, or not the
    ``whole`` of it."""
    reader, writer = await asyncio.open_connection(*address(url))
    try:
        writer.write(data)
        async with asyncio.timeout(hang_up):
            head = await reader.read(100)
            while whole and await reader.read(65536):
                pass
        return int(head[9:12]) if head.startswith(b"HTTP/1.") else 0
    except (TimeoutError, ConnectionError):
        return 0
    finally:
        writer.transport.abort()


def post(path: str, body: bytes, method: str = "POST") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nhost: soak\r\nconnection: close\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def together(url: str, requests: list[tuple[bytes, float | None]], whole: bool = True) -> list[int]:
    """Statuses of requests, ``AT_ONCE`` at a time."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(data: bytes, hang_up: float | None) -> int:
        async with gate:
            return await exchange(url, data, hang_up, whole)

    return await asyncio.gather(*(one(*request) for request in requests))


def queue(url: str, count: int, seed: int) -> dict[str, int]:
    """``count`` requests at once: all are answered, and what waits takes a bounded memory."""
    rng = random.Random(seed)
    before = settled(url)
    requests = [(0.0, {"prompt": [rng.randrange(300, 4000) for _ in range(100)], "max_tokens": 4, "ignore_eos": True})
                for _ in range(count)]
    most = {"waiting": 0.0, "bytes": 0.0}

    async def watch() -> None:
        while True:
            now = await asyncio.to_thread(metrics, url)
            most["waiting"] = max(most["waiting"], now["vllm:num_requests_waiting"])
            most["bytes"] = max(most["bytes"], now["process_resident_memory_bytes"] - before["process_resident_memory_bytes"])
            await asyncio.sleep(0.05)

    async def main() -> list[dict[str, Any]]:
        watcher = asyncio.create_task(watch())
        try:
            return await send_all(*address(url), requests)
        finally:
            watcher.cancel()

    results = asyncio.run(main())
    return {"queued": count, "most_waiting": int(most["waiting"]), "most_bytes": int(most["bytes"]),
            "unanswered": sum(r["status"] != 200 or r["tokens"] != 4 for r in results),
            "unbounded": int(most["bytes"] > ONCE_BYTES + count * QUEUED_BYTES)}


def disconnect(url: str, count: int, seed: int) -> dict[str, int]:
    """``count`` clients that go away at random moments, of plain requests and of streams."""
    rng = random.Random(seed)
    asyncio.run(together(url, [(post("/v1/completions", json.dumps(GOOD).encode()), None)] * AT_ONCE))
    before = settled(url)
    requests: list[tuple[bytes, float | None]] = []
    for _ in range(count):
        body = {"prompt": "class A:\n" * rng.randint(1, 40), "max_tokens": rng.randint(1, 100), "stream": rng.random() < 0.5,
                "n": rng.choice([1, 1, 3]), "ignore_eos": True}
        moment = rng.choice([0.0, 0.001, 0.01, 0.1, 0.5]) * rng.random()
        requests.append((post("/v1/completions", json.dumps(body).encode()), moment))
    statuses = asyncio.run(together(url, requests))
    after = settled(url, before)
    return {"disconnected": statuses.count(0), "answered_first": count - statuses.count(0),
            **{f"leaked_{name}": int(max(0.0, after[metric] - before[metric]) > 0) for name, metric in HELD.items()}}


def malform(url: str, count: int, seed: int) -> dict[str, int]:
    """``count`` requests each of which is wrong somehow, and gets a 4xx."""
    rng = random.Random(seed)
    requests: list[tuple[bytes, float | None]] = []
    for _ in range(count):
        path = rng.choice(["/v1/completions", "/v1/chat/completions"])
        kind = rng.randrange(6)
        if kind < 3:
            field, value = rng.choice(WRONG)
            data = post("/v1/completions", json.dumps(GOOD | {field: value}).encode())
        elif kind == 3:
            whole = json.dumps(GOOD).encode()
            data = post(path, rng.choice([*BROKEN, whole[: rng.randrange(len(whole))], rng.randbytes(rng.randrange(1, 200))]))
        elif kind == 4:
            method, where = rng.choice(ELSEWHERE)
            data = post(where, b"{}", method)
        else:
            data = rng.choice(NO_HTTP)
        requests.append((data, None))
    statuses = asyncio.run(together(url, requests, whole=False))
    return {"malformed": count, "other": sum(not 400 <= status < 500 for status in statuses)}


def flat(url: str, count: int, seed: int) -> dict[str, int]:
    """``count`` requests; from the first tenth on, resident memory stays."""
    rng = random.Random(seed)

    def some(number: int) -> None:
        bodies = [{"prompt": [rng.randrange(300, 4000) for _ in range(rng.randint(1, 60))], "max_tokens": 4, "temperature": 0,
                   "stream": rng.random() < 0.5} for _ in range(number)]
        statuses = asyncio.run(together(url, [(post("/v1/completions", json.dumps(body).encode()), None) for body in bodies]))
        assert statuses == [200] * number, Counter(statuses)

    some(count // 10)
    before = settled(url)["process_resident_memory_bytes"]
    for _ in range(9):
        some(count // 10)
    after = settled(url)["process_resident_memory_bytes"]
    return {"requests": count // 10 * 10, "rss_before": int(before), "rss_after": int(after),
            "grew": int(after > before * (1 + FLAT))}


def step_of(proof: Callable[[str, int, int], dict[str, int]], count: int) -> Callable[[Path, int], dict[str, int]]:
    """A step of ``bench.soak``: ``count`` requests against a fresh server, which must be well afterwards."""
    def step(folder: Path, number: int) -> dict[str, int]:
        with Server(FLAGS) as server:
            counts = proof(server.url, count, number)
            time.sleep(6)  # an idle engine recomputes who owns its pages, and does not survive a wrong sum
            assert urllib.request.urlopen(f"{server.url}/health", timeout=30).status == 200
        return counts

    return step

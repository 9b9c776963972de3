"""An engine without a device, and a real HTTP server around any engine. The tokens are a fixed text, over and over."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import uvicorn

from jaxkv.runtime.engine import NO_HINTS
from jaxkv.runtime.metrics import EngineMetrics
from jaxkv.runtime.outputs import Delta, OutputProcessor
from jaxkv.runtime.structured.compiler import GrammarCompiler
from jaxkv.serve.app import build_app
from jaxkv.serve.dialect import ChatOptions
from jaxkv.serve.engine_loop import EngineLike, EngineLoop
from jaxkv.serve.limits import KeyRing, Limits
from jaxkv.serve.service import Service
from jaxkv.types import Logprobs, Request, Start, TokenEvent

ROOT = Path(__file__).parents[2]
REPLY = "The cat — naïve, 日本 🙂 — sat on the mat. def f(x):\n    return x\n"
EOS = 2
MODELS_OWN = ChatOptions()


class FakeEngine:
    """One token per open child and step; embeddings depend on the prompt's tokens only. Clearing ``run`` holds every step,
    ``crash`` makes the next one raise."""

    def __init__(self, tokenizer, *, max_model_len: int = 256, step_seconds: float = 0.0):
        self.tokenizer, self.max_model_len, self.step_seconds = tokenizer, max_model_len, step_seconds
        self.model_name = "fake"
        self.grammars = GrammarCompiler(tokenizer, tokenizer.vocab_size, (EOS,)) if tokenizer else None
        self.metrics = EngineMetrics(info={"attention": "none"})
        self.default_sampling: dict[str, float] = {}
        self.reply = tokenizer.encode(REPLY) if tokenizer else [7, 8, 9]
        self.children: dict[str, tuple[Request, OutputProcessor, int]] = {}
        self.requests: list[Request] = []  # every one ever added
        self.added: dict[str, float] = {}  # child -> when it came
        self.threads: set[int] = set()
        self.crash: Exception | None = None
        self.run = threading.Event()
        self.run.set()
        self.checks = 0
        self.token_seconds = 0.0  # of prefill, as learnt

    def describe(self):
        return ("fake engine",)

    @property
    def has_work(self) -> bool:
        return bool(self.children) and self.run.is_set()

    def add_request(self, request_id, prompt_token_ids, params, hints=NO_HINTS):
        self.threads.add(threading.get_ident())
        if max(prompt_token_ids) >= 4096:
            raise ValueError(f"prompt holds token id {max(prompt_token_ids)}, outside of the vocabulary of 4096")
        room = self.max_model_len - len(prompt_token_ids)
        for i in range(params.n):
            own = replace(params, prompt_logprobs=None) if i else params  # as the engine: the first reports for all
            request = Request(f"{request_id}#{i}", tuple(prompt_token_ids), own,
                              min(params.max_tokens or room, room), child=i, parent=request_id, priority=hints.priority,
                              namespace=hints.cache_salt, stop_ids=params.stop_token_ids, session_id=hints.session_id,
                              end_session=hints.end_session, retention=hints.retention, no_store=hints.no_store)
            self.children[request.id] = request, OutputProcessor(request, self.tokenizer), 0
            self.requests.append(request)
            self.added[request.id] = time.monotonic()
        self.metrics.prompt_tokens += len(prompt_token_ids)
        self.metrics.running = len(self.children)

    def abort(self, request_id):
        self.children = {k: v for k, v in self.children.items() if v[0].parent != request_id}
        self.metrics.running = len(self.children)

    def step(self) -> list[Delta]:
        self.threads.add(threading.get_ident())
        if self.crash:
            raise self.crash
        time.sleep(self.step_seconds)
        deltas = [self._advance(key) for key in list(self.children)[::-1]]  # the child that reports comes last
        self.metrics.generation_tokens += sum(len(delta.token_ids) for delta in deltas)
        self.metrics.running = len(self.children)
        return deltas

    def prefill_seconds(self, tokens):
        return self.token_seconds * tokens

    def check(self):
        self.checks += 1

    def inspect_kv(self, top):
        return {"nodes": [], "nodes_total": 0, "top": top}

    def report(self):
        return None

    def close(self, timeout=10.0):
        self.closed = True
        if self.grammars:
            self.grammars.close()

    def _advance(self, key: str) -> Delta:
        request, output, count = self.children[key]
        params = request.params
        start = int(hashlib.md5(repr((params.seed, request.child)).encode()).hexdigest(), 16) if params.seed else 0
        token = self.reply[(start + count) % len(self.reply)]
        stopped = token in request.stop_ids
        reason = "stop" if stopped else "length" if count + 1 == request.max_tokens else None
        prompt = ()
        if params.prompt_logprobs is not None and not count:
            prompt = tuple(self._logprobs(t, params.prompt_logprobs) for t in request.prompt[1:])
        logprobs = () if params.logprobs is None else (self._logprobs(token, params.logprobs),)
        start = None if count else Start(self.added.pop(key), time.monotonic())
        delta, stop = output.process(TokenEvent(key, (token,), logprobs, prompt, reason, token if stopped else None,
                                                len(request.prompt) // 2, start,
                                                self.hidden(request.prompt) if params.embed else ()))
        if stop is None and reason is None:
            self.children[key] = request, output, count + 1
        else:
            del self.children[key]
            self.metrics.finished[delta.finish_reason] += 1
        return delta

    @staticmethod
    def hidden(prompt) -> tuple[float, ...]:
        return tuple(float(sum(t % (k + 2) == 0 for t in prompt) - k) for k in range(4))

    @staticmethod
    def _logprobs(token: int, top: int) -> Logprobs:
        best = tuple((t, -0.5 - i) for i, t in enumerate([token, 5, 6, 7, 8][:top]))
        return Logprobs(token, float("-inf") if token == 6 else -0.5, 1, best)


class ScriptedEngine(FakeEngine):
    """Says ``script`` and then ends."""

    script = ""

    def add_request(self, request_id, prompt_token_ids, params, hints=NO_HINTS):
        self.reply = [*self.tokenizer.encode(self.script), EOS]
        super().add_request(request_id, prompt_token_ids, params, hints)
        for key, (request, output, count) in self.children.items():
            self.children[key] = replace(request, stop_ids=(EOS,)), output, count


class Running:
    """A server on a loopback port."""

    def __init__(self, url: str, loop: EngineLoop, thread: threading.Thread):
        self.url, self.loop, self.thread = url, loop, thread
        self.host, self.port = url.removeprefix("http://").split(":")

    @property
    def engine(self):
        return self.loop.engine


@contextlib.contextmanager
def serving(build: Callable[[], EngineLike], *, max_open: int = 256, max_body: int = 2**20,
            api_keys: tuple[str, ...] = (), name: str | None = None, start_seconds: float = 60, step_timeout: float = 0.0,
            limits: Mapping[str, Any] = MappingProxyType({}), service: Mapping[str, Any] = MappingProxyType({}),
            chat: ChatOptions = MODELS_OWN, **options: Any) -> Iterator[Running]:
    """Serves an engine from a thread of this process until the block ends. ``service``: more fields of ``Service``;
    ``options`` are those of ``build_app``."""
    loop = EngineLoop(build, max_open, step_timeout)
    shared = Service(loop, name, Limits(max_body=max_body, **limits), chat=chat, **service)
    app = build_app(shared, KeyRing(api_keys), **options)
    http = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None, log_level="warning", timeout_keep_alive=60,
                                         timeout_graceful_shutdown=1))
    sock = socket.create_server(("127.0.0.1", 0))
    up = threading.Event()

    async def main() -> None:
        ready, _ = loop.start()
        await ready
        up.set()
        await http.serve([sock])

    def run() -> None:
        import asyncio
        asyncio.run(main())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert up.wait(start_seconds)
    try:
        yield Running(f"http://127.0.0.1:{sock.getsockname()[1]}", loop, thread)
    finally:
        http.should_exit = True
        thread.join(10)
        assert not thread.is_alive()
        assert loop.stop(5)
        shared.cleanup.close()


class ServerProcess:
    """A server as a child process: ``python`` with these arguments."""

    def __init__(self, *args: str):
        self.child = subprocess.Popen([sys.executable, *args], env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.lines: list[str] = []

    def ready(self) -> str:
        """Waits for the ready line; the URL in it, which ends with /v1."""
        assert self.child.stdout
        for line in self.child.stdout:
            self.lines.append(line)
            if line.startswith("ready: "):
                return line.split()[1]
        raise AssertionError(f"ended before it was ready: {self.child.communicate()}")

    def end(self, seconds: float = 30) -> tuple[int, str]:
        """Exit code and stderr of a process that is about to end."""
        try:
            _, errors = self.child.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.child.kill()
            raise AssertionError("the server hangs") from None
        return self.child.returncode, errors


def raw_post(url: str, path: str = "/v1/completions", headers: Mapping[str, str] = MappingProxyType({}),
             **body: object) -> socket.socket:
    """A connection on which ``path`` was asked and nothing was read yet."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    sock = socket.create_connection((host, int(port)), timeout=5)
    more = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    sock.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{more}".encode()
                 + b"content-length: %d\r\n\r\n%s" % (len(data), data))
    return sock


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Until the condition holds; AssertionError if it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.005)

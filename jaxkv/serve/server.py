"""The process: signals, start-up lines and exit codes.

Owns the order of life after the socket is there: load on the engine thread while HTTP already answers 503, serve,
drain, stop. After a signal nothing waits longer than the shutdown timeout and a few
seconds; a second signal ends the waiting.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable

import uvicorn

from jaxkv.config import ConfigError, EngineConfig
from jaxkv.runtime.startup import build_engine
from jaxkv.serve.app import Service, build_app
from jaxkv.serve.engine_loop import EngineLoop
from jaxkv.serve.errors import shutting_down

FLUSH_S = 2.0  # time for last bytes and for the engine's step under way
LINGER_S = 1.0  # how long a failed engine's /health stays readable


def run(args: argparse.Namespace, config: EngineConfig, sock: socket.socket) -> int:
    """Serves on a listening socket until a signal or a failure; returns the exit code. Raises ConfigError."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for name in ("jaxkv", "pallas_kernels"):
        logging.getLogger(name).setLevel(logging.INFO)
    loop = EngineLoop(lambda: build_engine(config, show_progress=sys.stderr.isatty()), args.max_open_requests)
    server = Server(sock, loop, args)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        code = runner.run(server.run())
    if isinstance(loop.failure, ConfigError):
        raise loop.failure
    loop.stop(FLUSH_S)  # a thread inside a long compile or step is left behind: the process ends without it
    return code


class Server:
    """Runs uvicorn on the event loop beside the engine thread."""

    def __init__(self, sock: socket.socket, loop: EngineLoop, args: argparse.Namespace):
        self.sock, self.loop, self.grace = sock, loop, args.shutdown_timeout
        host, port = sock.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        self.service = Service(loop, args.served_model_name, args.max_body, chat=args.chat)
        self.http = uvicorn.Server(uvicorn.Config(
            build_app(self.service, args.api_key), lifespan="off", log_config=None, access_log=args.access_log,
            log_level="info" if args.access_log else "warning", timeout_keep_alive=60,
            timeout_graceful_shutdown=int(self.grace + FLUSH_S) + 1, server_header=False))
        self.http.capture_signals = contextlib.nullcontext  # type: ignore[assignment]  # signals are handled here
        self.signals = 0
        self._drain: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """Until everything is closed; the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self.on_signal)
        ready, dead = self.loop.start()
        serving = asyncio.create_task(self.http.serve([self.sock]))
        await asyncio.wait((ready, dead, serving), return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            self._announce()
            await asyncio.wait((dead, serving), return_when=asyncio.FIRST_COMPLETED)
        if dead.done() and not self.signals:
            await asyncio.sleep(LINGER_S if ready.done() else 0)
            self.http.should_exit = True
        await serving
        return 1 if self.loop.failure is not None else 0

    def on_signal(self) -> None:
        """First: no new requests, the open ones get the grace time. Second: everything ends now."""
        self.signals += 1
        self.loop.draining = True
        self.http.should_exit = True  # closes the listening socket, then waits for connections
        if self._drain is None:
            self._drain = asyncio.ensure_future(self._end_calls())
        else:
            self._end_now()

    async def _end_calls(self) -> None:
        await asyncio.sleep(self.grace)
        self.loop.abort_all(shutting_down())

    def _end_now(self) -> None:
        self.loop.abort_all(shutting_down())
        self.http.force_exit = True

    def _announce(self) -> None:
        engine = self.loop.engine
        assert engine is not None
        for line in engine.describe():
            print(line)
        print(self.service.dialect().describe())
        print(f"ready: {self.url}/v1 (model {engine.model_name}); stop with Ctrl+C", flush=True)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed."""
    return uvicorn.Config(app=None, log_config=None).get_loop_factory()  # type: ignore[arg-type]

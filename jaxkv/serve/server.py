"""The process: signals, start-up lines and exit codes.

Owns the order of life after the socket is there: load on the engine thread while HTTP already answers 503, serve,
drain, stop. After a signal nothing waits longer than the shutdown timeout and a few
seconds; a second signal ends the waiting.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import signal
import socket
import sys
import time
from collections.abc import Callable

import uvicorn

from jaxkv.config import ConfigError, EngineConfig
from jaxkv.runtime.startup import build_engine
from jaxkv.serve.announce import announcement
from jaxkv.serve.app import build_app
from jaxkv.serve.engine_loop import EngineLoop
from jaxkv.serve.errors import shutting_down
from jaxkv.serve.records import Record, set_up_logs
from jaxkv.serve.service import Service
from jaxkv.serve.traces import connect

FLUSH_S = 2.0  # time for last bytes and for the engine's step under way
LINGER_S = 1.0  # how long a failed engine's /health stays readable


def run(args: argparse.Namespace, config: EngineConfig, sock: socket.socket) -> int:
    """Serves on a listening socket until a signal or a failure; returns the exit code. Raises ConfigError."""
    set_up_logs(args.log_format, args.request_log)
    limits = args.limits
    loop = EngineLoop(lambda: build_engine(config, show_progress=sys.stderr.isatty()), limits.max_open_requests,
                      limits.step_timeout)
    server = Server(sock, loop, args)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        code = runner.run(server.run())
    server.service.cleanup.close()
    if server.traces is not None:
        server.traces.close(FLUSH_S)
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
        self.has_keys = len(args.keys) > 0
        self.traces = connect(args.otlp_endpoint, args.served_model_name) if args.otlp_endpoint else None
        self.service = Service(loop, args.served_model_name, args.limits, max_batch=args.max_batch,
                               max_wait_ms=args.max_wait_ms, batch_dir=args.batch_dir, chat=args.chat)
        app = build_app(self.service, args.keys, origins=args.allowed_origins, credentials=args.allow_credentials,
                        done=self.ended)
        self.http = uvicorn.Server(uvicorn.Config(
            app, lifespan="off", log_config=None, access_log=False, log_level="error", timeout_keep_alive=60,
            server_header=False))
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
            gc.collect()
            gc.freeze()  # every thread waits for a collection: what stays for good is no longer looked at
            self._announce()
            await asyncio.wait((dead, serving), return_when=asyncio.FIRST_COMPLETED)
        if dead.done() and not self.signals:
            await asyncio.sleep(LINGER_S if ready.done() else 0)
            self.http.should_exit = True
        await serving
        return 1 if self.loop.failure is not None else 0

    def ended(self, record: Record) -> None:
        """Every request comes here at its end."""
        record.write()
        if self.traces is not None:
            self.traces.add(record)

    def on_signal(self) -> None:
        """First: new requests are refused, the open ones get the grace time. Second: everything ends now."""
        self.signals += 1
        self.loop.draining = True
        if self._drain is None:
            self._drain = asyncio.ensure_future(self._end_calls())
        else:
            self.loop.abort_all(shutting_down())
            self.http.should_exit = self.http.force_exit = True

    async def _end_calls(self) -> None:
        """Closes the listening socket once no call is open or the grace time is over; until then it answers 503."""
        end = time.monotonic() + self.grace
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.grace):
                await self.loop.idle.wait()
        left = max(0.0, end - time.monotonic())  # for what is no call: uploads, answers that are still being sent
        asyncio.get_running_loop().call_later(left, self.loop.abort_all, shutting_down())
        self.http.config.timeout_graceful_shutdown = int(left + FLUSH_S) + 1
        self.http.should_exit = True

    def _announce(self) -> None:
        engine = self.loop.engine
        assert engine is not None
        dialect, tokenizer = self.service.dialect(), engine.tokenizer
        chat = tokenizer is not None and bool(dialect.template or tokenizer.hf.chat_template)
        lines = announcement(self.url, self.service.model_name(), text=tokenizer is not None, chat=chat, keys=self.has_keys)
        print("\n".join([*engine.describe(), dialect.describe(), *lines]), flush=True)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's where it is installed."""
    return uvicorn.Config(app=None, log_config=None).get_loop_factory()  # type: ignore[arg-type]

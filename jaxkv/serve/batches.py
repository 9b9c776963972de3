"""/v1/batches: the lines of a file, answered one by one by the routes that answer HTTP.

A line is a request to one of ``ENDPOINTS``, made inside the process and at low priority, at most ``LINES_AT_ONCE`` of them
under way. What is refused or fails gets a record in the error file; a batch itself fails only if its file cannot be read
or its answers cannot be kept.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from pathlib import Path
from typing import Any

import orjson
from fastapi import FastAPI, Request
from starlette.types import ASGIApp, Message

from jaxkv.serve.bounds import Metadata, check_levels, json_of
from jaxkv.serve.envelope import Envelope, envelope_of
from jaxkv.serve.errors import ApiError, bad_request
from jaxkv.serve.files import Draft, FileStore, Limit, Records, add_files, page
from jaxkv.serve.limits import owner_of
from jaxkv.serve.openapi import documented
from jaxkv.serve.pieces import PIECE, dumps
from jaxkv.serve.protocol import ApiRequest
from jaxkv.serve.schemas import BatchList, BatchObject
from jaxkv.serve.service import Service
from jaxkv.serve.worker import Worker

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
LINES_AT_ONCE = 8
MAX_LINES = 50_000  # of one batch, as in the OpenAI API
MAX_BATCHES = 1000  # remembered; the oldest ended ones are forgotten
PRIORITY = 1000  # of lines that name none: behind everything that came by HTTP
ATTEMPTS = 60  # at a line while the queue is full, one a second
_ENDED = ("completed", "failed", "cancelled")
_TIMES = ("in_progress_at", "finalizing_at", "completed_at", "failed_at", "cancelling_at", "cancelled_at", "expires_at",
          "expired_at")
log = logging.getLogger("jaxkv.serve")


class BatchRequest(ApiRequest):
    """POST /v1/batches."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: Metadata | None = None

    def check(self) -> None:
        if self.endpoint not in ENDPOINTS:
            raise bad_request(f"endpoint must be one of {', '.join(ENDPOINTS)}, got {self.endpoint[:80]!r}", "endpoint")
        if self.completion_window != "24h":
            raise bad_request(f"completion_window must be \"24h\", got {self.completion_window[:40]!r}", "completion_window")


class Batches:
    """Runs batches one after the other, in the order they came. Belongs to the event loop's thread."""

    def __init__(self, app: ASGIApp, files: FileStore, worker: Worker):
        self._app, self._files, self._json = app, files, worker
        self.records = Records(files.directory, "batch_")
        for batch in self.records.all():
            if batch["status"] not in _ENDED:
                self._end(batch, "failed", error=("server_ended", "the server ended before the batch did"))
        self._queue: dict[str, dict[str, Any]] = {}  # by id, next one first
        self._running: tuple[str, asyncio.Task[None]] | None = None  # id of the batch under way
        self._worker: asyncio.Task[None] | None = None

    def create(self, request: BatchRequest, owner: str) -> dict[str, Any]:
        """A new batch, last in the queue. Raises ApiError."""
        if self._files.records.get(request.input_file_id, owner, "input_file_id")["purpose"] != "batch":
            raise bad_request("input_file_id must be a file of purpose \"batch\"", "input_file_id")
        if len(self.records) >= MAX_BATCHES:
            old = next((b for b in reversed(self.records.all()) if b["status"] in _ENDED), None)
            if old is None:
                raise ApiError(429, f"there are {MAX_BATCHES} batches waiting", code="too_many_requests",
                               headers={"retry-after": "60"})
            self.records.drop(old["id"])
        batch = {"id": self.records.new_id(), "object": "batch", "endpoint": request.endpoint,
                 "input_file_id": request.input_file_id, "completion_window": request.completion_window,
                 "status": "validating", "output_file_id": None, "error_file_id": None, "errors": None,
                 "created_at": int(time.time()), **dict.fromkeys(_TIMES), "metadata": request.metadata,
                 "request_counts": {"total": 0, "completed": 0, "failed": 0}}
        self.records.add(batch, owner)
        self._queue[str(batch["id"])] = batch
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return batch

    def cancel(self, name: str, owner: str) -> dict[str, Any]:
        """Ends a batch; what is answered by then is kept. Raises ApiError if it has ended."""
        batch = self.records.get(name, owner)
        if batch["status"] in _ENDED:
            raise bad_request(f"the batch has ended: its status is {batch['status']}")
        if self._running is not None and self._running[0] == name:
            mark(self.records, batch, "cancelling")
            self._running[1].cancel()
        else:
            self._queue.pop(name, None)
            self._end(batch, "cancelled")
        return batch

    async def _work(self) -> None:
        while self._queue:
            batch = self._queue.pop(next(iter(self._queue)))
            task = asyncio.create_task(_Run(self._app, self._files, self.records, batch, self._json).run())
            self._running = batch["id"], task
            try:
                await task
                self._end(batch, "completed")
            except asyncio.CancelledError:
                if batch["status"] != "cancelling":  # the server ends
                    raise
                self._end(batch, "cancelled")
            except ApiError as error:
                self._end(batch, "failed", error=(error.code or "", error.message))
            except Exception:
                log.exception("batch %s failed", batch["id"])
                self._end(batch, "failed", error=("internal_error", "internal server error"))
            finally:
                self._running = None

    def _end(self, batch: dict[str, Any], status: str, error: tuple[str, str] | None = None) -> None:
        if error is not None:
            entry = {"code": error[0], "message": error[1], "line": None, "param": None}
            batch["errors"] = {"object": "list", "data": [entry]}
        mark(self.records, batch, status)


def mark(records: Records, batch: dict[str, Any], status: str) -> None:
    """A batch enters a status now."""
    batch |= {"status": status, f"{status}_at": int(time.time())}
    records.save(batch)


class _Run:
    """One batch while it runs: reads lines, hands them to the application, writes their records."""

    def __init__(self, app: ASGIApp, files: FileStore, records: Records, batch: dict[str, Any], worker: Worker):
        self._app, self._files, self._records, self._batch, self._worker = app, files, records, batch, worker
        self._counts, self._owner = batch["request_counts"], records.owner(batch["id"])
        self._drafts: dict[str, Draft] = {}  # "output" and "error", once they have a line

    async def run(self) -> None:
        """Until every line has its record. Raises ApiError for a file that is no batch."""
        path = self._files.path(self._batch["input_file_id"], self._owner)
        try:
            self._counts["total"] = total = await asyncio.to_thread(_count, path)
            if not 1 <= total <= MAX_LINES:
                raise bad_request(f"the input file must hold 1 to {MAX_LINES} lines, got {total}", code="invalid_input_file")
            mark(self._records, self._batch, "in_progress")
            free = asyncio.Semaphore(LINES_AT_ONCE)
            with open(path, "rb") as file:
                async with asyncio.TaskGroup() as group:
                    while line := await asyncio.to_thread(file.readline):
                        if line.strip():
                            await free.acquire()
                            group.create_task(self._answer(line)).add_done_callback(lambda _: free.release())
            mark(self._records, self._batch, "finalizing")
        except ExceptionGroup as errors:  # of ``_write``
            raise errors.exceptions[0] from None
        finally:
            for kind, draft in self._drafts.items():
                file_object = draft.keep(f"{self._batch['id']}_{kind}.jsonl", "batch_output", self._owner)
                self._batch[f"{kind}_file_id"] = file_object["id"]
            self._records.save(self._batch)

    async def _answer(self, line: bytes) -> None:
        envelope = Envelope(False, {"id": f"batch_req_{uuid.uuid4().hex}"})
        try:
            data = await self._worker.run(len(line), lambda: _parse(line))
            envelope = envelope_of(data, envelope)
            status, body = await self._ask(await self._worker.run(len(line), lambda: self._body_of(data)))
            record = envelope.answer(status, orjson.Fragment(body))
        except ApiError as error:
            status, record = error.status, envelope.refusal(error)
        except Exception as error:  # ends this line and not the batch
            log.error("a line of batch %s failed", self._batch["id"], exc_info=error)
            status, record = 500, envelope.refusal(ApiError(500, "internal server error", code="internal_error"))
        self._write("output" if status == 200 else "error", record)
        self._counts["completed" if status == 200 else "failed"] += 1

    def _body_of(self, data: dict[str, Any]) -> bytes:
        """The request a line makes. Raises ApiError."""
        body, endpoint = data.get("body"), self._batch["endpoint"]
        if data.get("method", "POST") != "POST":
            raise bad_request(f"method must be \"POST\", got {data['method']!r:.80}", "method")
        if data.get("url") != endpoint:
            raise bad_request(f"url must be the batch's endpoint {endpoint}, got {data.get('url')!r:.80}", "url")
        if not isinstance(body, dict):
            raise bad_request(f"body must be a JSON object, got {type(body).__name__}", "body")
        if body.get("stream"):
            raise bad_request("stream is not available in a batch", "stream")
        return b"".join(dumps(body | {"priority": PRIORITY if body.get("priority") is None else body["priority"]}))

    async def _ask(self, body: bytes) -> tuple[int, bytes]:
        """Status and answer of the line's request, which waits for room in the queue."""
        for _ in range(ATTEMPTS):
            status, answer = await post(self._app, self._batch["endpoint"], body)
            if status not in (429, 503):
                break
            await asyncio.sleep(1)
        return status, answer

    def _write(self, kind: str, record: dict[str, Any]) -> None:
        if kind not in self._drafts:
            self._drafts[kind] = self._files.draft()
        self._drafts[kind].write(orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE))


def _parse(line: bytes) -> dict[str, Any]:
    try:
        data = json_of(line, "the line")
    except ApiError as error:
        error.code = "invalid_json_line"
        raise
    if len(line) <= PIECE:
        check_levels(data, "the line")
    if not isinstance(data, dict) or "custom_id" not in data:
        raise bad_request("the line must be a JSON object with custom_id, method, url and body", code="invalid_request_line")
    return data


def _count(path: Path) -> int:
    """Lines that are not blank."""
    with open(path, "rb") as file:
        return sum(bool(line.strip()) for line in file)


async def post(app: ASGIApp, path: str, body: bytes) -> tuple[int, bytes]:
    """Status and body of the application's answer to JSON posted to ``path``, without a network."""
    parts = [{"type": "http.request", "body": body, "more_body": False}]
    status, answer = 500, bytearray()

    async def receive() -> Message:
        if parts:
            return parts.pop()
        await asyncio.Event().wait()  # this client never leaves
        raise AssertionError

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        answer.extend(message.get("body", b""))

    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
             "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": None, "server": None,
             "headers": [(b"content-type", b"application/json")]}
    with contextlib.suppress(Exception):  # answered with a 500 and logged by the application
        await app(scope, receive, send)
    return status, bytes(answer)


def add_batches(app: FastAPI, service: Service) -> None:
    """Adds the routes, and those of files."""
    files = add_files(app, service)
    made: list[Batches] = []

    def batches() -> Batches:
        if not made:
            made.append(Batches(app, files(), service.json))
        return made[0]

    @app.post("/v1/batches", **documented(BatchRequest, BatchObject))
    async def create_batch(request: Request) -> Any:
        return batches().create(await service.read(BatchRequest, request), owner_of(request.scope))

    @app.get("/v1/batches", **documented(None, BatchList))
    async def list_batches(request: Request, after: str | None = None, limit: Limit = 20) -> Any:
        return page(batches().records.all(owner_of(request.scope)), after, limit)

    @app.get("/v1/batches/{name}", **documented(None, BatchObject))
    async def get_batch(name: str, request: Request) -> Any:
        return batches().records.get(name, owner_of(request.scope))

    @app.post("/v1/batches/{name}/cancel", **documented(None, BatchObject))
    async def cancel_batch(name: str, request: Request) -> Any:
        return batches().cancel(name, owner_of(request.scope))

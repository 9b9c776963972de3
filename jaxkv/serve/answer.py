"""One HTTP answer from its first delta to its last byte, streamed or whole.

Owns the life of a request: submit, wait, write, and on any end (done, refused, client gone, server going) the abort
that frees its pages. Owns no field names: those are the ``Form`` of the endpoint.
"""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxkv.runtime.outputs import Delta
from jaxkv.runtime.structured.compiler import CompilerBusy, Grammar, grammar_or_error
from jaxkv.serve.calls import Call
from jaxkv.serve.engine_loop import EngineLoop
from jaxkv.serve.errors import ApiError, generation_failed
from jaxkv.serve.logprobs import TokenText
from jaxkv.serve.parsers.message import MessageReader, Parts
from jaxkv.serve.pieces import PIECE, dumps
from jaxkv.serve.protocol import GenerationRequest
from jaxkv.serve.records import RECORD, Record
from jaxkv.serve.worker import Worker
from jaxkv.types import Logprobs

log = logging.getLogger("jaxkv.serve")
_SSE_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no")]
ENTRY_BYTES = 32  # of a token, about, and of each of the likeliest in its place
COMPILE_WAIT_S = 15.0  # for a grammar, others that wait before it included


class _Gone(Exception):
    """The client closed the connection."""


@dataclass(slots=True)
class Choice:
    """What one child of one prompt has produced so far."""

    index: int
    call: Call
    reader: MessageReader | None = None  # of the text, where it is a message
    parts: list[Parts] = field(default_factory=list)  # what it read, an entry for each delta
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    num_cached: int = 0
    cached_below: tuple[int, int] = (0, 0)  # of those, from host and from disk
    started: bool = False  # the first chunk is written
    offset: int = 0  # characters of the logprobs written so far

    def add(self, delta: Delta) -> None:
        """Takes in one delta."""
        self.text.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or ()
        self.call.prompt_logprobs = delta.prompt_logprobs or self.call.prompt_logprobs
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        if self.reader is not None:
            self.parts.append(self.reader.feed(delta.text, delta.finish_reason is not None, len(delta.token_ids)))
        if delta.num_cached_tokens:
            self.num_cached, self.cached_below = delta.num_cached_tokens, delta.cached_below


def best_of(choices: list[Choice], n: int, keep: int) -> list[Choice]:
    """Of the ``n`` answers to each prompt the ``keep`` likeliest (by cumulative log-probability), best first, renumbered."""
    if keep == n:
        return choices
    likelihood = lambda choice: sum(entry.logprob for entry in choice.logprobs)  # noqa: E731
    best = [choice for start in range(0, len(choices), n)
            for choice in sorted(choices[start : start + n], key=likelihood, reverse=True)[:keep]]
    for index, choice in enumerate(best):
        choice.index = index
    return best


def usage_of(calls: Sequence[Call], choices: Sequence[Choice]) -> dict[str, Any]:
    """`usage` of all ``choices`` of the calls, in order. A prompt counts once for its n answers; so does what the cache held of
    it. Reasoning is counted where answers are messages."""
    prompt = sum(len(call.prompt) for call in calls)
    answer = sum(len(choice.token_ids) for choice in choices)
    first = choices[:: calls[0].params.n]
    cached = sum(choice.num_cached for choice in first)
    host, disk = (sum(choice.cached_below[i] for choice in first) for i in (0, 1))
    tiers = {"hbm": cached - host - disk, "host": host, "disk": disk}  # ours: the other fields are OpenAI's
    usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer,
                             "prompt_tokens_details": {"cached_tokens": cached, "cached_tokens_by_tier": tiers}}
    readers = [choice.reader for choice in choices if choice.reader is not None]
    reasoning = {"reasoning_tokens": sum(reader.reasoning_tokens for reader in readers)}
    return usage | ({"completion_tokens_details": reasoning} if readers else {})


class Form(ABC):
    """How an endpoint words its answer."""

    kind: str  # "object" of the whole answer
    chunk_kind: str

    def __init__(self, request_id: str, model: str, request: GenerationRequest, tokens: TokenText):
        self.tokens = tokens
        self.head: dict[str, Any] = {"id": request_id, "object": self.kind, "created": int(time.time()), "model": model}

    @abstractmethod
    def chunks(self, choice: Choice, delta: Delta) -> list[dict[str, Any]]:
        """Entries of `choices` to stream for the delta that ``choice`` has just taken in; often one, maybe none."""

    @abstractmethod
    def whole(self, choice: Choice) -> dict[str, Any]:
        """The entry of `choices` of a finished choice."""

    def reader(self) -> MessageReader | None:
        """What reads the text of one choice, if that is a message."""
        return None

    def extras(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Further top-level fields, for a first chunk or the whole answer."""
        return {}


class Answer(Response):
    """ASGI response to one generation request, whose ``calls`` share a mailbox."""

    background = None

    def __init__(self, loop: EngineLoop, calls: Sequence[Call], request: GenerationRequest, form: Form, worker: Worker):
        self.loop, self.calls, self.request, self.form, self.worker = loop, calls, request, form, worker
        self.mailbox = calls[0].mailbox
        n = calls[0].params.n
        self.choices = [Choice(call.position * n + child, call, form.reader()) for call in calls for child in range(n)]
        self.unfinished = len(self.choices)
        self._n = n
        self._held: list[tuple[Call, Delta]] = []  # of a stream, until the prompt is scored
        self.grammar: Grammar | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(self._watch(receive))
        record = scope.get(RECORD) or Record("", "")
        record.calls = self.calls
        started = False
        try:
            await self._compile()
            self.loop.submit(self.calls)
            first = await self._next()  # a refusal comes before the status line
            if self.request.stream:
                started = True
                await self._stream(first, send)
            else:
                await self._whole(first, send)
        except _Gone:
            pass
        except Exception as error:
            refusal = error if isinstance(error, ApiError) else _fault(error)
            record.error = refusal.code
            if started:
                await _body(send, self._last_event(refusal), more=False)
            else:
                await respond(send, refusal.status, refusal.render(), refusal.headers)
        finally:
            watcher.cancel()
            self.loop.abort(self.calls)

    async def _compile(self) -> None:
        """Has what the answer must follow compiled on neither this thread nor the engine's, and holds it: the engine will
        find it. ApiError when it cannot be, or too many wait."""
        structured, engine = self.calls[0].params.structured, self.loop.engine
        if structured is None or engine is None or engine.grammars is None:
            return
        try:
            async with asyncio.timeout(COMPILE_WAIT_S):
                found = await asyncio.shield(asyncio.wrap_future(engine.grammars.submit(structured)))
        except (CompilerBusy, TimeoutError):
            raise ApiError(429, "too many grammars wait to be compiled", code="too_many_requests",
                           headers={"retry-after": "1"}) from None
        try:
            self.grammar = grammar_or_error(found)
        except ValueError as error:
            raise self.request.api_error(error) from None

    async def _next(self) -> list[tuple[Call, Delta]]:
        """What has arrived. Raises ApiError for what the engine would not take."""
        try:
            return await self.mailbox.next()
        except ValueError as error:  # from engine.add_request
            raise self.request.api_error(error) from None

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.loop.abort(self.calls)
        self.mailbox.fail(_Gone())

    async def _whole(self, items: list[tuple[Call, Delta]], send: Send) -> None:
        while True:
            for call, delta in items:
                self._take(call, delta)
            if not self.unfinished:
                break
            items = await self._next()
        size = self._weight()
        write: Callable[[Any], bytes | list[bytes]] = dumps if size > PIECE else orjson.dumps
        await respond(send, 200, await self.worker.run(size, lambda: write(self._result())))

    def _weight(self) -> int:
        """About how many bytes the whole answer has."""
        params = self.calls[0].params
        entries = sum(len(choice.token_ids) + len(choice.call.prompt_logprobs) for choice in self.choices)
        return entries * (1 + max(params.logprobs or 0, params.prompt_logprobs or 0)) * ENTRY_BYTES

    def _result(self) -> dict[str, Any]:
        """The whole answer, once every choice has finished."""
        best = best_of(self.choices, self._n, self.request.kept(self._n))
        return self.form.head | {"choices": [self.form.whole(choice) for choice in best],
                                 "usage": self._usage()} | self.form.extras(best)

    def _last_event(self, refusal: ApiError) -> bytes:
        """What ends a stream that cannot go on."""
        return refusal.event()

    async def _stream(self, items: list[tuple[Call, Delta]], send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [*_SSE_HEADERS]})
        head = self.form.head | {"object": self.form.chunk_kind}
        while True:
            items = self._due(items)
            first = [call for call, delta in items if not self._choice(call, delta).started]
            size = sum(len(call.prompt_logprobs) for call in first) * ENTRY_BYTES
            events = await self.worker.run(size, lambda items=items: b"".join(self._events(items, head)))  # type: ignore[misc]
            await _body(send, events, more=bool(self.unfinished))
            if not self.unfinished:
                return
            items = await self._next()

    def _due(self, items: list[tuple[Call, Delta]]) -> list[tuple[Call, Delta]]:
        """What may be written of all that came: no answer starts before its prompt is scored, which only child 0 reports."""
        items = self._held + items
        for call, delta in items:
            call.prompt_logprobs = delta.prompt_logprobs or call.prompt_logprobs
        due = [(call, delta) for call, delta in items if call.scored or delta.finish_reason == "error"]
        self._held = [(call, delta) for call, delta in items if not call.scored]
        return due

    def _events(self, items: list[tuple[Call, Delta]], head: dict[str, Any]) -> list[bytes]:
        """Server-sent events of everything that arrived, so that one write carries it."""
        events: list[bytes] = []
        with_usage, every = self.request.include_usage, self.request.usage_in_every_chunk
        for call, delta in items:
            choice = self._choice(call, delta)
            extras = {} if choice.started else self.form.extras([choice])
            self._take(call, delta)
            for chunk in self.form.chunks(choice, delta):
                event = head | {"choices": [chunk]} | extras
                extras = {}
                if with_usage:
                    event["usage"] = self._usage() if every else None
                events.append(b"data: %b\n\n" % orjson.dumps(event))
        if not self.unfinished:
            if with_usage:
                events.append(b"data: %b\n\n" % orjson.dumps(head | {"choices": [], "usage": self._usage()}))
            events.append(b"data: [DONE]\n\n")
        return events

    def _take(self, call: Call, delta: Delta) -> None:
        if delta.finish_reason == "error":
            raise generation_failed(delta.error)
        self._choice(call, delta).add(delta)
        if delta.finish_reason is not None:
            self.unfinished -= 1

    def _choice(self, call: Call, delta: Delta) -> Choice:
        return self.choices[call.position * self._n + delta.index]

    def _usage(self) -> dict[str, Any]:
        return usage_of(self.calls, self.choices)


def _fault(error: Exception) -> ApiError:
    """The 500 of a fault of ours, which it logs."""
    log.error("a request failed", exc_info=error)
    return ApiError(500, "internal server error", code="internal_error")


async def respond(send: Send, status: int, body: bytes | list[bytes], headers: dict[str, str] | None = None) -> None:
    """A whole JSON response."""
    parts = [body] if isinstance(body, bytes) else body
    pairs = [(b"content-type", b"application/json"), (b"content-length", str(sum(map(len, parts))).encode())]
    pairs += [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    for number, part in enumerate(parts, 1):
        await _body(send, part, more=number < len(parts))


async def _body(send: Send, body: bytes, *, more: bool) -> None:
    if body or not more:
        await send({"type": "http.response.body", "body": body, "more_body": more})

"""The engine's one thread and the bridge to the event loop.

Owns the thread that builds the engine and does every dispatch to the device, the bounded set of open calls, and how
deltas travel: commands go in through an inbox under one lock, what a step produced comes out in one
``call_soon_threadsafe``. Nothing is polled: an idle thread sleeps on a condition, a waiting request on a future.
Owns no HTTP and no JSON.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from jaxkv.config import ConfigError
from jaxkv.params import CacheHints, SamplingParams
from jaxkv.runtime.metrics import EngineMetrics
from jaxkv.runtime.outputs import Delta
from jaxkv.runtime.structured.compiler import GrammarCompiler
from jaxkv.serve.burst import settle
from jaxkv.serve.calls import Call
from jaxkv.serve.errors import ApiError, shutting_down
from jaxkv.serve.metrics import Latencies

log = logging.getLogger("jaxkv.serve")
MAX_QUESTIONS = 8
ADD_TOKENS = 2**16  # of prompts that come between two steps, and one prompt more: running sequences wait meanwhile
REPORT_S = 10.0  # between two lines in the log about a busy engine
CLOSE_S = 3.0  # for what a disk tier is to keep when the server ends
LATE_S = 2.0  # by which closing may take longer, with a disk that is slow to the last
IDLE_CHECK_S = 5.0  # idle time after which the engine recomputes its page ownership, once


class EngineLike(Protocol):
    """What the server needs of ``jaxkv.runtime.engine.Engine``. All but the plain attributes: engine thread only."""

    model_name: str
    max_model_len: int
    tokenizer: Any
    grammars: GrammarCompiler | None
    metrics: EngineMetrics
    default_sampling: Mapping[str, Any]  # the model's own, for fields that a request leaves out

    def describe(self) -> Sequence[str]: ...
    @property
    def has_work(self) -> bool: ...
    def add_request(self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams,
                    hints: CacheHints = ...) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def step(self) -> list[Delta]: ...
    def prefill_seconds(self, tokens: int) -> float: ...
    def check(self) -> None: ...
    def inspect_kv(self, top: int) -> dict[str, Any]: ...
    def report(self) -> str | None: ...
    def close(self, timeout: float = ...) -> None: ...


Question = tuple[Callable[[EngineLike], Any], "asyncio.Future[Any]"]


class EngineLoop:
    """Runs one engine on one thread. Every method but ``_run`` and what it calls belongs to the event loop's thread."""

    def __init__(self, build: Callable[[], EngineLike], max_open: int, step_timeout: float = 0.0):
        self.latencies = Latencies()
        self.max_open = max_open  # sequences accepted and not finished, the n of each prompt counted
        self.engine: EngineLike | None = None  # set before `ready` resolves
        self.failure: BaseException | None = None
        self.draining = False
        self.calls: dict[str, Call] = {}
        self.idle = asyncio.Event()  # set while there are no calls
        self.idle.set()
        self._open = 0  # sequences of self.calls
        self._answers: set[asyncio.Future[Any]] = set()  # to questions that were asked
        self._ended: deque[float] = deque(maxlen=64)  # when the latest sequences finished
        self._build = build
        self._wakeup = threading.Condition()
        self._adds: list[Call] = []  # under _wakeup, like the next two
        self._aborts: list[str] = []
        self._questions: list[Question] = []
        self._stopping = self._closing = False
        self._step_timeout = step_timeout  # seconds; 0: a step may take any time
        self._busy_since = 0.0  # when the round under way began; 0: none is
        self._next_report = time.monotonic() + REPORT_S
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> tuple[asyncio.Future[None], asyncio.Future[None]]:
        """Starts the thread. Returns (ready, dead): dead resolves when the engine failed, or could not be built."""
        self._loop = asyncio.get_running_loop()
        self.ready, self.dead = self._loop.create_future(), self._loop.create_future()
        self._thread.start()
        return self.ready, self.dead

    def submit(self, calls: Sequence[Call]) -> None:
        """Hands prompts to the engine, all or none. Raises ApiError: 429 over the bound, 503 while draining or dead."""
        if self.failure is not None or self.engine is None:
            raise ApiError(503, "the engine is loading" if self.failure is None else "the engine has failed")
        if self.draining:
            raise shutting_down()
        more = sum(call.params.n for call in calls)
        if self._open + more > self.max_open:
            metrics = self.engine.metrics
            raise ApiError(429, f"too many open sequences: {self._open} of {self.max_open} ({metrics.running} running, "
                                f"{metrics.waiting} waiting), {more} more asked for", code="too_many_requests",
                           headers={"retry-after": str(self.retry_after(self._open + more - self.max_open))})
        self._open += more
        self.idle.clear()
        self.calls.update((call.id, call) for call in calls)
        with self._wakeup:
            self._adds.extend(calls)
            self._wakeup.notify()

    def retry_after(self, sequences: int) -> int:
        """Seconds until so many sequences will have finished, at the pace of the latest ones; 1 to 60."""
        if len(self._ended) < 2:
            return 1
        pace = (time.monotonic() - self._ended[0]) / len(self._ended)
        return max(1, min(60, math.ceil(sequences * pace)))

    def abort(self, calls: Sequence[Call]) -> None:
        """Forgets calls; the engine frees their pages before its next step. Finished ones are left alone."""
        ids = [call.id for call in calls if self._forget(call.id)]
        if ids:
            with self._wakeup:
                self._aborts.extend(ids)
                self._wakeup.notify()

    async def ask(self, question: Callable[[EngineLike], Any]) -> Any:
        """What ``question`` says of the engine between two steps. ApiError: 429 when too many ask at once, 503 when dead."""
        if self.failure is not None or self.engine is None or self.draining:
            raise ApiError(503, "the engine does not run")
        if len(self._answers) >= MAX_QUESTIONS:
            raise ApiError(429, f"too many ask at once: the limit is {MAX_QUESTIONS}", code="too_many_requests",
                           headers={"retry-after": "1"})
        answer = self._loop.create_future()
        self._answers.add(answer)
        with self._wakeup:
            self._questions.append((question, answer))
            self._wakeup.notify()
        try:
            return await answer
        finally:
            self._answers.discard(answer)

    def abort_all(self, error: Exception) -> None:
        """Ends every open call and question with an error."""
        calls = list(self.calls.values())
        self.abort(calls)
        for call in calls:
            call.mailbox.fail(error)
        for answer in self._answers:
            _settle(answer, error)

    def _forget(self, request_id: str) -> Call | None:
        call = self.calls.pop(request_id, None)
        if call is not None:
            self._open -= call.params.n
            if not self.calls:
                self.idle.set()
        return call

    def stop(self, timeout: float) -> bool:
        """Ends the thread after its current step, which gets ``timeout`` seconds, and closes the engine, which gets
        ``CLOSE_S``; False if it did not end in time. Blocks."""
        with self._wakeup:
            self._stopping = True
            self._wakeup.notify()
        self._thread.join(timeout)
        if self._closing:
            self._thread.join(CLOSE_S + LATE_S)
        return not self._thread.is_alive()

    # --- on the event loop, called from the engine thread

    def _post(self, function: Callable[..., None], *args: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the event loop is closed: nobody listens any more
            self._stopping = True

    def _deliver(self, deltas: list[Delta], refused: list[tuple[str, Exception]]) -> None:
        now = time.monotonic()
        for request_id, error in refused:
            if (call := self._forget(request_id)) is not None:
                call.mailbox.fail(error)
        for delta in deltas:
            call = self.calls.get(delta.request_id)
            if call is None:
                continue
            self.latencies.observe(call, delta, now)
            if delta.finish_reason is not None:
                self._ended.append(now)
                if len(call.reasons) == call.params.n:
                    self._forget(call.id)
            call.mailbox.put(call, delta)

    def _set_ready(self, engine: EngineLike) -> None:
        self.engine = engine
        self.ready.set_result(None)
        if self._step_timeout:
            self._watch_steps()

    def _watch_steps(self) -> None:
        """Looks now and then whether the thread hangs in a step, and gives the engine up if it does."""
        since, now = self._busy_since, time.monotonic()
        if since and now - since > self._step_timeout:
            log.critical("the engine hangs: one step has taken more than %g s", self._step_timeout)
            self._fail(TimeoutError("a step hangs"))
        elif not self._stopping and self.failure is None:
            self._loop.call_later(self._step_timeout / 4, self._watch_steps)

    def _fail(self, error: BaseException) -> None:
        if self.failure is not None:
            return
        self.failure = error
        self.dead.set_result(None)
        for call in list(self.calls.values()):
            self._forget(call.id)
            call.mailbox.fail(ApiError(500, f"the engine failed: {type(error).__name__}", code="engine_error"))
        for answer in self._answers:
            _settle(answer, ApiError(503, "the engine has failed", code="engine_error"))

    # --- the engine thread

    def _run(self) -> None:
        try:
            engine = self._build()
            self._post(self._set_ready, engine)
            while self._work(engine):
                pass
            self._closing = True
            engine.close(CLOSE_S)
        except BaseException as error:  # reported, then the process ends: a supervisor starts a fresh one
            if not isinstance(error, ConfigError):
                log.exception("the engine failed")
            self._post(self._fail, error)

    def _work(self, engine: EngineLike) -> bool:
        """One round: take commands, step. Sleeps first if there is nothing to do. False: stop."""
        self._busy_since = 0.0
        adds, aborts, questions = self._take(engine)
        if self._stopping:
            return False
        self._busy_since = time.monotonic()
        for question, answer in questions:
            try:
                value = question(engine)
            except Exception as error:  # what one question finds wrong must not end the requests
                log.exception("a question to the engine failed")
                value = error
            self._post(_settle, answer, value)
        refused: list[tuple[str, Exception]] = []
        for call in adds:
            try:
                engine.add_request(call.id, call.prompt, call.params, call.hints)
            except Exception as error:  # what one request holds must not end the others
                refused.append((call.id, error))
        for request_id in aborts:
            engine.abort(request_id)
        deltas = engine.step() if engine.has_work else []
        if (now := time.monotonic()) >= self._next_report:
            self._next_report = now + REPORT_S
            if line := engine.report():
                log.info(line)
        if deltas or refused:
            self._post(self._deliver, deltas, refused)
        return True

    def _take(self, engine: EngineLike) -> tuple[list[Call], list[str], list[Question]]:
        if not self._wait(engine, IDLE_CHECK_S):
            engine.check()
            self._wait(engine, None)
        with self._wakeup:
            if self._adds and not engine.has_work:
                settle(self._wakeup, self._adds, engine.prefill_seconds)
            aborts, self._aborts = self._aborts, []
            adds, self._adds = _first(self._adds, set(aborts))
            questions, self._questions = self._questions, []
        return adds, aborts, questions

    def _wait(self, engine: EngineLike, timeout: float | None) -> bool:
        """Sleeps until there is something to do; False after `timeout` seconds of nothing."""
        with self._wakeup:
            return self._wakeup.wait_for(
                lambda: bool(self._adds or self._aborts or self._questions or self._stopping or engine.has_work), timeout)


def _first(calls: list[Call], gone: set[str]) -> tuple[list[Call], list[Call]]:
    """The calls whose prompts the engine takes before its next step, and the others; without those that are gone."""
    calls = [call for call in calls if call.id not in gone] if gone else calls
    count = tokens = 0
    while count < len(calls) and tokens < ADD_TOKENS:
        tokens += len(calls[count].prompt)
        count += 1
    return calls[:count], calls[count:]


def _settle(answer: asyncio.Future[Any], value: Any) -> None:
    if answer.done():
        return
    if isinstance(value, Exception):
        answer.set_exception(value)
    else:
        answer.set_result(value)

"""The engine: decide (scheduler), execute (executor), learn (commit), once per ``step``, always on one thread.

Owns the open requests and the order of submit and read. With overlap on, step n + 1 is planned and submitted before
step n is read, so that the host's work hides behind the device's.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from jaxkv.cache.inspect import curve, inspect
from jaxkv.config import EngineConfig
from jaxkv.device.state import page_bytes
from jaxkv.params import MAX_STOP_IDS, CacheHints, SamplingParams
from jaxkv.runtime.cache_metrics import refresh_cache
from jaxkv.runtime.executor import JaxExecutor, LostStep
from jaxkv.runtime.memory import Capacity
from jaxkv.runtime.metrics import EngineMetrics
from jaxkv.runtime.outputs import Delta, OutputProcessor
from jaxkv.runtime.report import Reporter
from jaxkv.runtime.structured.compiler import Grammar, GrammarCompiler
from jaxkv.runtime.structured.matchers import Matchers
from jaxkv.sched.scheduler import Scheduler
from jaxkv.types import Request, StepHandle, StepPlan, Tier, TokenEvent

NO_HINTS = CacheHints()
CHECKED_NODES = 20_000  # of the trie, 0.2 s; 10 s were measured with a million
SAVE_PAGES = 64  # pages written at a time when the engine ends
log = logging.getLogger("jaxkv")
IDLE_WAIT_S = 0.01  # longest sleep while nothing but fetches is under way


class Engine:
    """Built by ``startup.build_engine``. ``add_request`` and ``abort`` are called between steps, on the engine's thread.

    An error that leaves ``step`` is the engine's end: what was planned and what ran no longer agree. ``has_work`` is then
    False, and ``add_request`` and ``step`` raise RuntimeError that names the error."""

    def __init__(
        self, config: EngineConfig, scheduler: Scheduler, executor: JaxExecutor, *, model_name: str, max_model_len: int,
        vocab_size: int, capacity: Capacity, weight_bytes: int = 0, tokenizer: Any = None, eos_ids: Sequence[int] = (),
        default_sampling: Mapping[str, Any] = MappingProxyType({}), grammars: GrammarCompiler | None = None,
        description: Sequence[str] = (), info: Mapping[str, str] = MappingProxyType({}),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config, self.scheduler, self.executor = config, scheduler, executor
        self.model_name, self.max_model_len, self.vocab_size = model_name, max_model_len, vocab_size
        self.tokenizer, self.eos_ids, self.grammars = tokenizer, tuple(eos_ids), grammars
        self.default_sampling = default_sampling  # SamplingParams fields that generation_config.json sets
        self.events: deque[tuple[str, int]] = deque(maxlen=4096)
        # ("submit" | "read", plan id) or ("fetch" | "arrived" | "failed", fetch id), newest last
        self.capacity, self.weight_bytes = capacity, weight_bytes
        self.metrics = EngineMetrics(info=dict(info))  # written here only; any thread may read
        self._page_bytes = page_bytes(executor.kv, executor.mesh)  # on the devices
        self._size_tiers()
        self._description = tuple(description)
        self._clock = clock
        self._reporter = Reporter(self.metrics, clock())
        self._outputs: dict[str, OutputProcessor] = {}  # by child id
        self._matchers = Matchers(vocab_size, self.eos_ids)
        self._unseen: set[str] = set()  # children that gave no event yet
        self._children: dict[str, list[str]] = {}  # user's request id -> ids of its open children
        self._pending: tuple[StepPlan, StepHandle] | None = None
        self._counter = 0
        self._failure: BaseException | None = None  # the first error that left a step

    def describe(self) -> tuple[str, ...]:
        """What was built, in lines for a person: pools and tiers in tokens and bytes, executables, implementations."""
        return self._description

    @property
    def has_work(self) -> bool:
        """Whether to step. Pages under way count: a step learns that they came, and lets go of them if nobody wants them."""
        return self._failure is None and (self._open or self.scheduler.cache.loading)

    @property
    def _open(self) -> bool:
        """Whether a request is, or a step that has not been read."""
        return self.scheduler.has_work or self._pending is not None

    def add_request(
        self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams,
        hints: CacheHints = NO_HINTS,
    ) -> None:
        """Queues a prompt; its ``params.n`` children share the prompt's KV. ValueError names the field and the limit."""
        self._check_alive()
        if request_id in self._children:
            raise ValueError(f"request_id {request_id!r} is already in use")
        prompt = tuple(prompt_token_ids)
        max_tokens = self._check(prompt, params)
        stop_ids = tuple(dict.fromkeys(params.stop_token_ids + (() if params.ignore_eos else self.eos_ids)))
        if len(stop_ids) > MAX_STOP_IDS:
            raise ValueError(f"stop_token_ids may hold at most {MAX_STOP_IDS} ids with the model's own, got {len(stop_ids)}")
        grammar = self._grammar(params)
        self._counter += 1
        seed = params.seed if params.seed is not None else self._draw_seed()
        now = self._clock()
        children = [f"{request_id}#{i}" for i in range(params.n)]
        quiet = replace(params, prompt_logprobs=None)  # one child reports for all: the others reuse its prompt
        requests = [
            Request(child, prompt, params if i == 0 else quiet, max_tokens, seed=seed, child=i, parent=request_id, arrival=now,
                    priority=hints.priority, namespace=hints.cache_salt, stop_ids=stop_ids, session_id=hints.session_id,
                    end_session=hints.end_session, retention=hints.retention, no_store=hints.no_store,
                    needs_last_token=grammar is not None)
            for i, child in enumerate(children)
        ]
        outputs = [OutputProcessor(request, self.tokenizer) for request in requests]
        for request, output in zip(requests, outputs):
            self.scheduler.add(request)
            self._outputs[request.id] = output
            self._unseen.add(request.id)
            if grammar is not None:
                self._matchers.add(request, grammar)
        self._children[request_id] = children
        self.metrics.prompt_tokens += len(prompt)
        self._refresh()

    def abort(self, request_id: str) -> None:
        """Ends a request and frees its pages now; unknown ids are ignored (it may just have finished)."""
        if self._failure is not None:
            return
        for child in self._children.pop(request_id, ()):
            if self._outputs.pop(child, None) is not None:
                self._unseen.discard(child)
                self._matchers.drop(child)
                self.scheduler.abort(child)
                self.metrics.finished["abort"] += 1
        self._refresh()

    def step(self) -> list[Delta]:
        """One iteration: plan and submit, then learn from the step before (or, without overlap, from this one)."""
        self._check_alive()
        try:
            return self._step()
        except BaseException as error:
            self._failure = error
            raise

    def _step(self) -> list[Delta]:
        t0 = time.thread_time()
        if self.executor.tiers.host_lost and self.scheduler.cache.has_host_tier:
            self.scheduler.lose_host_tier()
        for arrival in self.executor.arrivals():
            self.events.append(("arrived" if arrival.ok else "failed", arrival.fetch_id))
            self.scheduler.arrived(arrival)
        plan = self.scheduler.plan(self._clock())
        t1 = time.thread_time()
        lost = False  # no plan is made on pages whose contents are lost
        pending, self._pending = self._pending, None
        if plan is not None:
            self.events.append(("submit", plan.id))
            self.events.extend(("fetch", fetch.id) for fetch in plan.fetches)
            handle = self.executor.submit(plan, self._matchers.masks(plan))
            self._pending = plan, handle
            lost = isinstance(handle, LostStep)
            self.metrics.steps += 1
            self.metrics.computed_tokens += plan.num_tokens
        elif pending is None:
            self.executor.wait_for_fetch(IDLE_WAIT_S)
        self.metrics.stage_seconds["plan"] += t1 - t0
        deltas = self._learn(*pending) if pending else []
        if self._pending and (lost or not self.config.sched.overlap):
            pending, self._pending = self._pending, None
            deltas += self._learn(*pending)
        self._refresh()
        return deltas

    def prefill_seconds(self, tokens: int) -> float:
        """To compute a prompt of so many tokens of which nothing is cached, as learnt from steps; 0 before the first."""
        return self.scheduler.cache.costs.prefill_seconds(0, tokens)

    def inspect_kv(self, top: int) -> dict[str, Any]:
        """The cache as JSON: tiers, counters, the ``top`` nodes of the trie."""
        return inspect(self.scheduler.cache, top)

    def report(self) -> str | None:
        """A line about what happened since the last call; None if nothing did. Brings the hit-rate curve up to date."""
        page = sum(self._page_bytes)
        self.metrics.curve = tuple((point["pages"] * page, point["hit_rate"]) for point in curve(self.scheduler.cache))
        return self._reporter.line(self._clock())

    def close(self, timeout: float = 10.0) -> None:
        """Ends the threads that compile grammars, and the disk tier, if there is one: what memory holds is written first,
        as far as ``timeout`` seconds allow."""
        if self.grammars is not None:
            self.grammars.close()
        disk = self.executor.tiers.disk
        if disk is None:
            return
        end = self._clock() + timeout
        whole = self._failure is None and not self._open
        while whole and self._clock() < end and (plan := self.scheduler.plan_saves(SAVE_PAGES, self._clock())):
            self.scheduler.commit(plan, self.executor.submit(plan).read(), self._clock())
            disk.flush(max(0.0, end - self._clock()))
        disk.close(max(1.0, end - self._clock()))

    def check(self) -> None:
        """Recomputes all ownership of pages; AssertionError if anything is lost or shared twice. Not in a trie so large that
        the next request would wait for it."""
        if len(self.scheduler.cache.store.nodes) <= CHECKED_NODES:
            self.scheduler.check()

    def _size_tiers(self) -> None:
        m, c, page_size = self.metrics, self.capacity, self.scheduler.cache.page_size
        for usage, pages, size in ((m.device, c.num_pages, c.pool_bytes), (m.host, c.num_host_pages, c.host_bytes)):
            usage.pages_total, usage.tokens_total, usage.bytes_total = sum(pages), min(pages) * page_size, size

    def _refresh(self) -> None:
        """Brings the gauges up to date: a handful of numbers once a step."""
        m, scheduler, cache = self.metrics, self.scheduler, self.scheduler.cache
        m.running, m.waiting, m.preemptions = scheduler.num_running, scheduler.num_waiting, scheduler.num_preemptions
        stats = cache.stats
        refresh_cache(m, stats, self.executor.tiers, not self.has_work)
        m.stage_seconds |= self.executor.stage_seconds
        usage = cache.usage()
        m.device.pages_used, m.host.pages_used = sum(usage[Tier.HBM]), sum(usage[Tier.HOST])
        m.device.pages_active = m.device.pages_total - sum(map(cache.available, range(len(cache.groups))))
        m.device.bytes_used = sum(n * b for n, b in zip(usage[Tier.HBM], self._page_bytes))
        m.host.bytes_used = self.executor.host_bytes_held()

    def _learn(self, plan: StepPlan, handle: StepHandle) -> list[Delta]:
        result = handle.read()
        self.events.append(("read", plan.id))
        t0 = time.thread_time()
        events = self.scheduler.commit(plan, result, self._clock())
        t1 = time.thread_time()
        deltas = [delta for event in events if (delta := self._deliver(self._follow(event))) is not None]
        stages = self.metrics.stage_seconds
        stages["commit"] += t1 - t0
        stages["output"] += time.thread_time() - t1
        if result.failed:  # the pools went with the step, and so did the step submitted after it
            self._pending = None
            self.metrics.lost_steps += 1
            self.executor.restore(self.scheduler.cache.host_pages())
        return deltas

    def _follow(self, event: TokenEvent) -> TokenEvent:
        """The event as it is once the sequence's grammar, if it has one, knows the tokens."""
        end = self._matchers.advance(event.request_id, event.tokens)
        if end is None:
            return event
        if event.finish_reason is None:
            self.scheduler.finish(event.request_id, end)
        if end == "error":  # the last token is none that the request allows
            return replace(event, tokens=event.tokens[:-1], logprobs=event.logprobs[:-1], finish_reason=end)
        return replace(event, finish_reason=end)

    def _deliver(self, event: TokenEvent) -> Delta | None:
        output = self._outputs.get(event.request_id)
        if output is None:  # aborted meanwhile
            return None
        if event.request_id in self._unseen:
            self._unseen.remove(event.request_id)
            self.metrics.prefix_query_tokens += output.num_prompt_tokens
            self.metrics.prefix_hit_tokens += event.num_cached
        try:
            delta = output.process(event)[0]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of a tokenizer in Rust is no Exception, and must end this sequence only
            log.error("the text of %s cannot be made", event.request_id, exc_info=error)
            delta = output.broken()
        self.metrics.generation_tokens += len(delta.token_ids)
        if delta.finish_reason is not None and event.finish_reason is None:
            self.scheduler.finish(event.request_id, delta.finish_reason)
        if delta.finish_reason is not None:
            del self._outputs[event.request_id]
            self._matchers.drop(event.request_id)
            siblings = self._children[delta.request_id]
            siblings.remove(event.request_id)
            if not siblings:
                del self._children[delta.request_id]
            self.metrics.finished[delta.finish_reason] += 1
        return delta

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise RuntimeError(f"the engine has failed, and has to be built anew: {type(self._failure).__name__}: "
                               f"{self._failure}") from self._failure

    def _check(self, prompt: tuple[int, ...], params: SamplingParams) -> int:
        """The request's max_tokens, resolved against the window."""
        if not prompt:
            raise ValueError("prompt must hold at least one token")
        if len(prompt) >= self.max_model_len:
            raise ValueError(f"prompt has {len(prompt)} tokens; max_model_len is {self.max_model_len} "
                             "and leaves room for at least one new token")
        for name, ids in (("prompt", prompt), ("stop_token_ids", params.stop_token_ids),
                          ("logit_bias", [t for t, _ in params.logit_bias])):
            bad = [t for t in ids if not isinstance(t, int) or not 0 <= t < self.vocab_size]
            if bad:
                raise ValueError(f"{name} holds token id {bad[0]!r}, outside of the vocabulary of {self.vocab_size}")
        room = self.max_model_len - len(prompt)
        if params.min_tokens > room:
            raise ValueError(f"min_tokens must be at most {room}, what the prompt leaves of max_model_len, "
                             f"got {params.min_tokens}")
        return min(params.max_tokens or room, room)

    def _grammar(self, params: SamplingParams) -> Grammar | None:
        """What the answer must follow, compiled; at once if whoever asks compiled it before, as a server and a batch do.
        ``LLM`` adds all prompts before the first step, so that nobody waits there."""
        if params.structured is None:
            return None
        if self.grammars is None:
            raise ValueError("structured needs a tokenizer, and skip_tokenizer_init left it out")
        return self.grammars.compile(params.structured)

    def _draw_seed(self) -> int:
        """A request's own seed: differs between requests, repeats with the engine's seed and the order of arrival."""
        digest = hashlib.blake2b(f"{self.config.seed}/{self._counter}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)



"""/metrics: Prometheus text from the engine's counters and the server's latencies.

Owns the exported names: vLLM's where the meaning is the same, ``jaxkv:`` for the rest. Owns no counter that decides
anything. Latencies are taken where a client feels them: on the event loop, from submission to the delta handed over.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from jaxkv.runtime.metrics import EngineMetrics, Histogram
from jaxkv.runtime.outputs import Delta
from jaxkv.serve.calls import Call

TOKEN_BUCKETS = tuple(10**e * k for e in range(6) for k in (1, 2, 5))


class Latencies:
    """Histograms of requests, times in seconds, one writer: the event loop. A prompt with n answers counts once."""

    def __init__(self) -> None:
        self.first_token, self.between_tokens, self.whole = Histogram(), Histogram(), Histogram()
        self.queue, self.prefill, self.decode = Histogram(), Histogram(), Histogram()
        self.prompt, self.answer, self.n = (Histogram(TOKEN_BUCKETS) for _ in range(3))

    def observe(self, call: Call, delta: Delta, now: float) -> None:
        """Books one delta of a call that arrived at ``now``."""
        index, tokens = delta.index, len(delta.token_ids)
        if tokens:
            last = call.last.get(index)
            if last is not None:
                self.between_tokens.observe((now - last) / tokens, tokens)
            elif not call.first:
                self._begin(call, delta, now)
            call.last[index] = now
            call.tokens += tokens
        if delta.finish_reason is not None:
            call.reasons.append(delta.finish_reason)
            if len(call.reasons) == call.params.n:
                self._end(call, now)

    def _begin(self, call: Call, delta: Delta, now: float) -> None:
        call.first, call.start, call.cached = now, delta.start, delta.num_cached_tokens
        self.first_token.observe(now - call.arrival)
        if delta.start is not None:
            self.queue.observe(delta.start.admitted - call.arrival)
            self.prefill.observe(delta.start.first_token - delta.start.admitted)

    def _end(self, call: Call, now: float) -> None:
        self.whole.observe(now - call.arrival)
        if call.first:
            self.decode.observe(now - call.first)
        self.prompt.observe(len(call.prompt))
        self.answer.observe(call.tokens)
        self.n.observe(call.params.n)


class EngineCollector(Collector):
    """Reads the live counters when scraped; keeps nothing itself."""

    def __init__(self, metrics: EngineMetrics, latencies: Latencies, model: str):
        self.metrics, self.latencies, self.model = metrics, latencies, model

    def collect(self) -> Iterator[Metric]:
        m = self.metrics
        yield self._gauge("vllm:num_requests_running", "sequences in the running batch", m.running)
        yield self._gauge("vllm:num_requests_waiting", "sequences waiting for room", m.waiting)
        yield self._gauge("vllm:kv_cache_usage_perc", "share of device pages that running sequences hold, 0 to 1",
                          m.device.active_fraction)
        yield self._counter("vllm:prefix_cache_queries", "prompt tokens looked up", m.prefix_query_tokens)
        yield self._counter("vllm:prefix_cache_hits", "prompt tokens found in any tier", m.prefix_hit_tokens)
        yield self._counter("vllm:num_preemptions", "sequences put back to waiting", m.preemptions)
        yield self._counter("vllm:prompt_tokens", "prompt tokens of accepted requests", m.prompt_tokens)
        yield self._counter("vllm:generation_tokens", "tokens generated", m.generation_tokens)
        yield self._by("vllm:request_success", "finished sequences", "finished_reason", m.finished)
        yield self._histogram("vllm:time_to_first_token_seconds", "arrival to first token", self.latencies.first_token)
        yield self._histogram("vllm:inter_token_latency_seconds", "between tokens", self.latencies.between_tokens)
        yield self._histogram("vllm:e2e_request_latency_seconds", "arrival to last token", self.latencies.whole)
        yield self._histogram("vllm:request_queue_time_seconds", "arrival to a place in the batch", self.latencies.queue)
        yield self._histogram("vllm:request_prefill_time_seconds", "from there to the first token", self.latencies.prefill)
        yield self._histogram("vllm:request_decode_time_seconds", "first token to last", self.latencies.decode)
        yield self._histogram("vllm:request_prompt_tokens", "tokens of a prompt", self.latencies.prompt)
        yield self._histogram("vllm:request_generation_tokens", "tokens of a prompt's answers", self.latencies.answer)
        yield self._histogram("vllm:request_params_n", "answers asked for", self.latencies.n)
        yield from self._tiers()
        yield self._by("jaxkv:cache_hit_tokens", "tokens found and not computed", "tier", m.hit_tokens)
        yield self._counter("jaxkv:partial_page_copies", "partly matching pages copied", m.partial_copies)
        yield self._by("jaxkv:evicted_pages", "pages that left a tier for room", "reason", m.evictions)
        yield self._counter("jaxkv:offloaded_pages", "demoted pages that left ahead of need", m.offloads)
        yield self._counter("jaxkv:promoted_pages", "pages moved host to device", m.promotions)
        yield self._counter("jaxkv:saved_pages", "pages handed to the disk tier", m.saved_pages)
        yield self._counter("jaxkv:prefix_loads", "prefixes brought ahead of their sequences", m.loads)
        yield self._by("jaxkv:prefix_loads_ended", "prefixes that did not come", "reason",
                       {"failed": m.failed_loads, "cancelled": m.cancelled_loads})
        yield self._counter("jaxkv:recomputed_tokens", "found below the device, quicker to compute", m.recomputed_tokens)
        yield self._counter("jaxkv:page_waits", "sequences that waited for pages", m.page_waits)
        yield self._counter("jaxkv:page_wait_seconds", "time they waited", m.page_wait_seconds)
        yield self._gauge("jaxkv:event_loop_tasks", "asyncio tasks of the server", len(asyncio.all_tasks()))
        yield self._curve()
        yield self._by("jaxkv:moved_bytes", "KV moved", "link", m.bytes_moved)
        yield self._by("jaxkv:disk_faults", "what went wrong with the disk tier", "kind", m.disk_faults)
        yield self._gauge("jaxkv:disk_staging_bytes", "host memory with pages to or from the disk", m.disk_staging_bytes)
        yield self._counter("jaxkv:steps", "steps submitted", m.steps)
        yield self._counter("jaxkv:lost_steps", "steps that the device had no memory for", m.lost_steps)
        yield self._counter("jaxkv:computed_tokens", "positions run through the model", m.computed_tokens)
        yield self._by("jaxkv:step_host_seconds", "host time of steps by stage", "stage", m.stage_seconds)
        yield InfoMetricFamily("jaxkv:engine", "facts fixed at start", {"model_name": self.model, **m.info})

    def _tiers(self) -> Iterator[Metric]:
        names = (("pages_used", "pages referenced or cached"), ("pages_total", "pages"), ("bytes_used", "bytes held"),
                 ("bytes_total", "bytes allowed"), ("tokens_total", "tokens that fit"))
        tiers = {"device": self.metrics.device, "host": self.metrics.host, "disk": self.metrics.disk}
        for name, text in names:
            family = GaugeMetricFamily(f"jaxkv:tier_{name}", f"{text}, by memory tier", labels=["model_name", "tier"])
            for tier, usage in tiers.items():
                family.add_metric([self.model, tier], getattr(usage, name))
            yield family

    def _curve(self) -> Metric:
        family = GaugeMetricFamily("jaxkv:cache_curve_hit_rate", "page hit rate that so many bytes of KV would give",
                                   labels=["model_name", "bytes"])
        for size, rate in self.metrics.curve:
            family.add_metric([self.model, f"{size:.0f}"], rate)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self.model], value)
        return family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self.model], value)
        return family

    def _by(self, name: str, text: str, label: str, values: dict[str, Any]) -> Metric:
        family = CounterMetricFamily(name, text, labels=["model_name", label])
        for key, value in values.items():
            family.add_metric([self.model, key], value)
        return family

    def _histogram(self, name: str, text: str, histogram: Histogram) -> Metric:
        family = HistogramMetricFamily(name, text, labels=["model_name"])
        family.add_metric([self.model], histogram.buckets(), histogram.total)
        return family


def registry(metrics: EngineMetrics, latencies: Latencies, model: str) -> CollectorRegistry:
    """The server's own registry: its collector and the process's memory, CPU and file descriptors."""
    own = CollectorRegistry()
    own.register(EngineCollector(metrics, latencies, model))
    ProcessCollector(registry=own)
    PlatformCollector(registry=own)
    return own


def render(own: CollectorRegistry) -> bytes:
    """The registry as Prometheus text, format 0.0.4."""
    return generate_latest(own)

"""OpenTelemetry spans of finished requests: the request, and in it queue, swap, prefill and decode.

Owns the names of spans and attributes (the gen_ai and http ones are OpenTelemetry's). Spans are made at a request's end
from the times that its record and the engine took, so nothing is traced while tokens run; without --otlp-endpoint nothing
of OpenTelemetry is imported.
"""

from __future__ import annotations

import importlib
import time
from typing import Any

from jaxkv.config import ConfigError
from jaxkv.serve.calls import Call
from jaxkv.serve.records import Record

TIMEOUT_S = 2  # of one export: the end of the process waits for the last


class Traces:
    """Gives spans to an OpenTelemetry tracer provider."""

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("jaxkv")
        self._api = importlib.import_module("opentelemetry.trace")
        self._parents = importlib.import_module("opentelemetry.trace.propagation.tracecontext").TraceContextTextMapPropagator()

    def add(self, record: Record) -> None:
        """The spans of a request that has ended; a W3C traceparent makes them part of the client's trace."""
        epoch = time.time_ns() - round(1e9 * time.monotonic())  # of the clock of records, in ns since 1970
        at = lambda seconds: epoch + round(1e9 * seconds)  # noqa: E731
        parent = self._parents.extract({"traceparent": record.traceparent}) if record.traceparent else None
        fields = record.fields()
        method, _, path = record.route.partition(" ")
        attributes = {"http.request.method": method, "url.path": path, "http.response.status_code": record.status,
                      "request.id": record.id}
        if record.calls:
            attributes |= {"gen_ai.usage.input_tokens": fields["prompt_tokens"],
                           "gen_ai.usage.output_tokens": fields["output_tokens"],
                           "jaxkv.cached_tokens": fields["cached_tokens"], "jaxkv.finish_reason": fields["finish_reason"] or ""}
        span = self._tracer.start_span(record.route, context=parent, kind=self._api.SpanKind.SERVER, attributes=attributes,
                                       start_time=at(record.arrival))
        if record.status >= 500 or record.status == 200 and record.error:
            span.set_status(self._api.StatusCode.ERROR, record.error or "")
        inside = self._api.set_span_in_context(span)
        for call in record.calls:
            for name, start, end in _parts(call, record.end):
                part = self._tracer.start_span(name, context=inside, start_time=at(start))
                part.end(at(end))
        span.end(at(record.end))

    def close(self, timeout: float) -> None:
        """Sends what is left, for up to ``timeout`` seconds."""
        self._provider.force_flush(int(1000 * timeout))


def _parts(call: Call, end: float) -> list[tuple[str, float, float]]:
    """(name, start, end) of what a prompt went through; the swap, a wait for pages of its prefix, lies in the queue."""
    start = call.start
    if start is None:
        return [("queue", call.arrival, end)]
    parts = [("queue", call.arrival, start.admitted), ("prefill", start.admitted, start.first_token),
             ("decode", start.first_token, max(call.last.values()))]
    return parts + ([("swap", start.admitted - start.page_wait, start.admitted)] if start.page_wait else [])


def connect(endpoint: str, model: str | None) -> Traces:
    """Traces to an OTLP endpoint over HTTP. ConfigError without the packages of the extra ``otel``."""
    try:
        load = importlib.import_module
        exporters = load("opentelemetry.exporter.otlp.proto.http.trace_exporter")
        exporter = exporters.OTLPSpanExporter(endpoint=endpoint, timeout=TIMEOUT_S)
        resource = load("opentelemetry.sdk.resources").Resource.create(
            {"service.name": "jaxkv", **({"jaxkv.model": model} if model else {})})
        provider = load("opentelemetry.sdk.trace").TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(load("opentelemetry.sdk.trace.export").BatchSpanProcessor(exporter))
    except ImportError:
        raise ConfigError("otlp_endpoint needs the extra packages of jaxkv[otel]") from None
    return Traces(provider)

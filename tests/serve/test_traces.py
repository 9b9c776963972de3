"""Spans of requests, in memory instead of a collector, and that nothing is imported for them when they are off."""

import http.server
import subprocess
import sys
import threading

import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from serve_fakes import ROOT, FakeEngine, serving, wait_for

from jaxkv.params import SamplingParams
from jaxkv.serve.calls import Call, Mailbox
from jaxkv.serve.records import Record
from jaxkv.serve.traces import Traces, connect
from jaxkv.types import Start

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans():
    return InMemorySpanExporter()


@pytest.fixture
def traces(spans):
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    return Traces(provider)


def test_spans_of_a_request_are_in_the_clients_trace(tokenizer, spans, traces):
    with serving(lambda: FakeEngine(tokenizer, step_seconds=0.005), done=traces.add) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json={"prompt": "hello there", "max_tokens": 8, "ignore_eos": True},
                            headers={"traceparent": PARENT, "x-request-id": "mine"}).json()
        wait_for(lambda: len(spans.get_finished_spans()) == 4)
        found = {span.name: span for span in spans.get_finished_spans()}
        whole = found["POST /v1/completions"]
        assert format(whole.context.trace_id, "032x") == PARENT[3:35] and format(whole.parent.span_id, "016x") == PARENT[36:52]
        assert whole.attributes["request.id"] == "mine" and whole.attributes["http.response.status_code"] == 200
        assert whole.attributes["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
        assert whole.attributes["gen_ai.usage.output_tokens"] == 8 and whole.attributes["jaxkv.finish_reason"] == "length"
        queue, prefill, decode = (found[name] for name in ("queue", "prefill", "decode"))
        assert all(part.parent.span_id == whole.context.span_id for part in (queue, prefill, decode))
        assert whole.start_time <= queue.start_time <= queue.end_time == prefill.start_time <= prefill.end_time
        assert prefill.end_time == decode.start_time < decode.end_time <= whole.end_time
        assert decode.end_time - decode.start_time > 7 * 5_000_000
        spans.clear()
        httpx.post(f"{server.url}/v1/completions", json={}, headers={"traceparent": "rubbish"})
        wait_for(lambda: len(spans.get_finished_spans()) == 1)
        alone = spans.get_finished_spans()[0]
        assert alone.parent is None and alone.attributes["http.response.status_code"] == 400 and not alone.status.description


def test_a_wait_for_pages_is_a_swap_in_the_queue(spans, traces):
    call = Call("r", [1, 2], SamplingParams(), Mailbox(), arrival=100.0, first=103.6, last={0: 104.0},
                start=Start(103.0, 103.5, 2.0))
    traces.add(Record("r", "POST /v1/completions", arrival=99.0, end=105.0, status=200, calls=[call]))
    found = {span.name: span for span in spans.get_finished_spans()}
    queue, swap = found["queue"], found["swap"]
    assert queue.end_time - queue.start_time == 3 * 10**9 and swap.end_time - swap.start_time == 2 * 10**9
    assert swap.end_time == queue.end_time == found["prefill"].start_time
    call.start = None
    spans.clear()
    traces.add(Record("r", "POST /v1/completions", arrival=99.0, end=105.0, status=504, calls=[call]))
    assert {span.name for span in spans.get_finished_spans()} == {"queue", "POST /v1/completions"}
    assert not spans.get_finished_spans()[-1].status.is_ok


def test_spans_reach_a_collector():
    got = []

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        traces = connect(f"http://127.0.0.1:{server.server_port}/v1/traces", "tiny")
        traces.add(Record("r1", "GET /health", arrival=1.0, end=2.0, status=200))
        traces.close(5.0)
        server.shutdown()
    assert [path for path, _ in got] == ["/v1/traces"] and b"GET /health" in got[0][1]


def test_nothing_is_imported_when_off():
    code = "import sys, jaxkv.serve.server\nassert not [name for name in sys.modules if 'jaxkv' in name and 'otel' in name]\n" \
           "assert 'opentelemetry.sdk' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr

"""Connections that go away, bounds, failures, metrics: against the fake engine."""

import asyncio
import contextlib
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serve_fakes import FakeEngine, raw_post, serving, wait_for

from jaxkv.serve import engine_loop
from jaxkv.serve.calls import Call, Mailbox

BODY = {"prompt": "a", "max_tokens": 250, "ignore_eos": True}


def samples(server):
    """{(name, labels without the model): value} of /metrics."""
    text = httpx.get(f"{server.url}/metrics").text
    return {(s.name, *(v for k, v in s.labels.items() if k != "model_name")): s.value
            for family in text_string_to_metric_families(text) for s in family.samples}


@pytest.fixture
def slow(tokenizer):
    """A server that takes 10 ms per token."""
    with serving(lambda: FakeEngine(tokenizer, step_seconds=0.01), max_open=8) as server:
        yield server


@pytest.mark.parametrize("extra", [{}, {"stream": True}, {"stream": True, "n": 3, "prompt": ["a", "b"]}])
def test_disconnect_frees_everything_at_once(slow, extra):
    sock = raw_post(slow.url, **BODY | extra)
    wait_for(lambda: slow.engine.metrics.running > 0)
    sock.close()
    wait_for(lambda: slow.engine.metrics.running == 0, 0.5)
    assert not slow.loop.calls and not slow.engine.children
    assert httpx.post(f"{slow.url}/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200


def test_disconnect_while_queued(slow):
    slow.engine.run.clear()
    sock = raw_post(slow.url, **BODY)
    wait_for(lambda: slow.engine.children)
    sock.close()
    wait_for(lambda: not slow.engine.children and not slow.loop.calls)


def test_client_that_stops_reading_does_not_hold_others(slow):
    sock = raw_post(slow.url, **BODY | {"stream": True, "max_tokens": 200})
    start = time.monotonic()
    assert httpx.post(f"{slow.url}/v1/completions", json={"prompt": "a", "max_tokens": 5}).status_code == 200
    assert time.monotonic() - start < 1
    sock.close()


def test_queue_bound(slow):
    slow.engine.run.clear()
    socks = [raw_post(slow.url, **BODY) for _ in range(8)]
    wait_for(lambda: len(slow.loop.calls) == 8)
    response = httpx.post(f"{slow.url}/v1/completions", json=BODY)
    assert response.status_code == 429 and response.headers["retry-after"]
    assert response.json()["error"]["code"] == "too_many_requests"
    for sock in socks:
        sock.close()
    wait_for(lambda: not slow.loop.calls)
    slow.engine.run.set()
    for many in ({"prompt": ["a"] * 9}, {"prompt": ["a"] * 3, "n": 3}):  # all or none
        assert httpx.post(f"{slow.url}/v1/completions", json=BODY | many).status_code == 429
    assert not slow.engine.children and not slow.loop._open


@pytest.mark.parametrize("stream", [False, True])
def test_engine_failure(tokenizer, stream, caplog):
    with serving(lambda: FakeEngine(tokenizer, step_seconds=0.01)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
        threading.Timer(0.2, lambda: setattr(server.engine, "crash", RuntimeError("device lost"))).start()
        with pytest.raises(openai.APIError, match="engine failed"):
            list(client.completions.create(model="fake", prompt="a", max_tokens=200, stream=stream))
        assert httpx.get(f"{server.url}/health").status_code == 503
        assert httpx.post(f"{server.url}/v1/completions", json=BODY).status_code == 503
        assert "device lost" in caplog.text
        client.close()


@pytest.mark.parametrize("step_timeout", [0.0, 0.2])
def test_engine_failure_ends_questions(tokenizer, step_timeout):
    """Asked while the engine is in a step that then crashes, or never ends."""
    engine, go = FakeEngine(tokenizer), threading.Event()

    def step():
        go.wait(10)
        raise RuntimeError("device lost")

    with serving(lambda: engine, step_timeout=step_timeout) as server, ThreadPoolExecutor() as pool:
        engine.step_seconds = 0.01
        sock = raw_post(server.url, **BODY)
        wait_for(lambda: engine.metrics.generation_tokens > 0)
        engine.step = step
        asked = [pool.submit(httpx.get, f"{server.url}/debug/kv", timeout=5) for _ in range(3)]
        wait_for(lambda: len(server.loop._answers) == 3 or server.loop.failure is not None)
        if not step_timeout:
            go.set()
        assert [answer.result().status_code for answer in asked] == [503] * 3
        go.set()
        sock.close()


def test_a_question_that_fails_ends_nothing_else(tokenizer, caplog):
    with serving(lambda: FakeEngine(tokenizer)) as server:
        inspect = server.engine.inspect_kv
        server.engine.inspect_kv = lambda top: 1 / 0
        assert httpx.get(f"{server.url}/debug/kv").status_code == 500 and "division by zero" in caplog.text
        server.engine.inspect_kv = inspect
        assert httpx.get(f"{server.url}/debug/kv").status_code == 200 and not server.loop._answers
        assert httpx.post(f"{server.url}/v1/completions", json=BODY).status_code == 200


def test_loading_server_answers_503(tokenizer):
    go = threading.Event()

    def build():
        go.wait(10)
        return FakeEngine(tokenizer)

    loop = engine_loop.EngineLoop(build, 8)
    from jaxkv.serve.app import build_app
    from jaxkv.serve.service import Service

    async def main():
        ready, _ = loop.start()
        transport = httpx.ASGITransport(build_app(Service(loop)))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
            for path in ("/health", "/v1/models", "/metrics"):
                assert (await http.get(path)).status_code == 503
            assert (await http.post("/v1/completions", json=BODY)).json()["error"]["code"] == "model_loading"
            go.set()
            await ready
            assert (await http.get("/health")).status_code == 200

    asyncio.run(main())
    assert loop.stop(5)


def test_one_engine_thread_that_sleeps_when_idle(tokenizer, monkeypatch):
    monkeypatch.setattr(engine_loop, "IDLE_CHECK_S", 0.05)
    with serving(lambda: FakeEngine(tokenizer)) as server:
        httpx.post(f"{server.url}/v1/completions", json=BODY)
        time.sleep(0.3)
        checks, cpu = server.engine.checks, time.process_time()
        assert checks in (1, 2)  # once per idle time, of which the first may have been too short
        time.sleep(0.5)
        assert server.engine.checks == checks and time.process_time() - cpu < 0.1
        httpx.post(f"{server.url}/v1/completions", json=BODY)
        assert len(server.engine.threads) == 1
        wait_for(lambda: server.engine.checks == checks + 1)


def test_32_clients(fake, http):
    alone = http.post("/v1/completions", json=BODY).json()["choices"][0]["text"]

    async def one(client, i):
        stream = await client.completions.create(model="fake", prompt="a", max_tokens=250, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{fake.url}/v1", api_key="x", max_retries=0) as client:
            return await asyncio.gather(*(one(client, i) for i in range(32)))

    assert asyncio.run(main()) == [alone] * 32
    assert not fake.loop.calls


def test_metrics(tokenizer):
    with serving(lambda: FakeEngine(tokenizer)) as server:
        usage = [httpx.post(f"{server.url}/v1/completions", json=BODY | {"max_tokens": 20, "n": 2}).json()["usage"]
                 for _ in range(3)]
        found = samples(server)
        assert found["vllm:prompt_tokens_total",] == sum(u["prompt_tokens"] for u in usage)
        assert found["vllm:generation_tokens_total",] == sum(u["completion_tokens"] for u in usage) == 120
        assert found["vllm:request_success_total", "length"] == 6
        assert found["vllm:num_requests_running",] == 0 and found["vllm:num_requests_waiting",] == 0
        assert found["vllm:time_to_first_token_seconds_count",] == 3
        assert found["vllm:e2e_request_latency_seconds_count",] == 3
        assert found["vllm:inter_token_latency_seconds_count",] == 6 * 19
        for name in ("vllm:kv_cache_usage_perc", "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total",
                     "vllm:num_preemptions_total", "jaxkv:steps_total"):
            assert (name,) in found
        assert ("jaxkv:tier_bytes_used", "host") in found and ("jaxkv:step_host_seconds_total", "plan") in found


def test_status_routes(http):
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/version").json()["version"]
    assert http.get("/v1/models").json()["data"][0]["max_model_len"] == 256
    assert http.get("/v1/models/fake").json()["id"] == "fake"
    assert "/v1/completions" in http.get("/openapi.json").json()["paths"]


def test_random_disconnects_leave_nothing(slow):
    async def main():
        async with httpx.AsyncClient(base_url=slow.url) as http:
            for i in range(40):
                with contextlib.suppress(httpx.TimeoutException):
                    await http.post("/v1/completions", json=BODY | {"stream": bool(i % 2)}, timeout=(i % 10 + 1) / 500)

    asyncio.run(main())
    wait_for(lambda: not slow.loop.calls and not slow.engine.children)

    def left():
        gc.collect()
        return [o for o in gc.get_objects() if type(o) in (Mailbox, Call)]

    wait_for(lambda: not left())  # the last request's task may still be ending


def test_long_prompts_enter_a_few_between_two_steps(tokenizer, monkeypatch):
    monkeypatch.setattr(engine_loop, "ADD_TOKENS", 10)
    engine, rounds, go = FakeEngine(tokenizer), [0], threading.Event()
    add, step = engine.add_request, engine.step

    def counted(*args):
        rounds[-1] += 1
        add(*args)

    def held():
        rounds.append(0)
        go.wait(10)
        return step()

    engine.add_request, engine.step = counted, held
    with serving(lambda: engine) as server:
        socks = [raw_post(server.url, prompt=[5], max_tokens=5)]
        wait_for(lambda: len(rounds) == 2)  # the engine is in a step
        socks += [raw_post(server.url, prompt=[[5] * 4] * 8, max_tokens=5) for _ in range(2)]
        wait_for(lambda: len(server.loop.calls) == 17)
        socks.pop().close()  # what has not entered never does
        wait_for(lambda: len(server.loop.calls) == 9)
        go.set()
        assert all(sock.recv(15) == b"HTTP/1.1 200 OK" for sock in socks)
        for sock in socks:
            sock.close()
    assert [count for count in rounds if count] == [1, 3, 3, 2]

"""Keys, shares, ids, deadlines and records of requests, against the fake engine."""

import contextlib
import json
import logging
import socket
import threading
import time

import httpx
import pytest
from serve_fakes import FakeEngine, raw_post, serving, wait_for
from test_bad_input import refused

from jaxkv.cli import OneLineParser
from jaxkv.config import ConfigError
from jaxkv.serve import gate
from jaxkv.serve.limits import add_limit_args, keys_of, limits_of
from jaxkv.serve.records import JsonFormatter

BODY = {"prompt": "hello", "max_tokens": 3}
LONG = {"prompt": "a", "max_tokens": 250, "ignore_eos": True}


@pytest.fixture(scope="module")
def records():
    return []


@pytest.fixture(scope="module")
def gated(tokenizer, records):
    """A slow server with two keys, a deadline of a second and small limits."""
    with serving(lambda: FakeEngine(tokenizer, step_seconds=0.01), api_keys=("sesame", "second"), origins=["https://a.example"],
                 limits={"request_timeout": 1.0, "max_requests_per_key": 3, "max_n": 4, "max_prompt_tokens": 50},
                 done=records.append) as server:
        yield server


@pytest.fixture
def http(gated):
    with httpx.Client(base_url=gated.url, headers={"authorization": "Bearer sesame"}, timeout=20) as client:
        yield client


def options(*args):
    parser = OneLineParser("test")
    add_limit_args(parser.add_argument_group())
    return parser.parse_args(args)


def test_keys_from_options_file_and_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("# of the team\nalpha\n\n  beta \nalpha\n")
    ring = keys_of(options("--api-key", "gamma", "--api-key-file", str(file)))
    assert len(ring) == 3 and ring.find(b"wrong") is None is ring.find(b"")
    assert {ring.find(key) for key in (b"gamma", b"alpha", b"beta")} == {0, 1, 2}
    assert not any(key in repr(vars(ring)) for key in ("alpha", "beta", "gamma"))
    monkeypatch.setenv("JAXKV_API_KEY", "delta")
    assert keys_of(options()).find(b"delta") == 0
    monkeypatch.setenv("JAXKV_API_KEY", "delta, epsilon")
    assert len(keys_of(options())) == 2
    assert keys_of(options("--api-key", "gamma")).find(b"delta") is None
    file.write_text("\n# nothing\n")
    for args, word in ((["--api-key-file", str(file)], "holds no key"), (["--api-key-file", str(tmp_path)], "cannot be read"),
                       (["--api-key", ""], "empty")):
        with pytest.raises(ConfigError, match=word):
            keys_of(options(*args))
    monkeypatch.delenv("JAXKV_API_KEY")
    with pytest.raises(ConfigError, match="max_requests_per_key"):
        keys_of(options("--max-requests-per-key", "2"))


@pytest.mark.parametrize("args", [
    ("--max-n", "0"), ("--max-prompt-tokens", "-1"), ("--request-timeout", "nan"), ("--step-timeout", "-1"),
    ("--max-body", "0"), ("--max-open-requests", "0"), ("--allowed-origins", "*", "--allow-credentials")])
def test_bad_limits(args):
    with pytest.raises(ConfigError, match=args[-1].strip("-").replace("-", "_") if len(args) > 2 else
                       args[0].strip("-").replace("-", "_")):
        limits_of(options(*args))


@pytest.mark.parametrize(("path", "kwargs"), [
    ("/v1/completions", {"json": BODY}), ("/v1/completions", {"json": BODY | {"stream": True}}), ("/v1/nope", {"json": {}}),
    ("/v1/completions", {"json": {}}), ("/v1/completions", {"json": BODY, "headers": {"authorization": "Bearer no"}}),
    ("/v1/completions", {"content": b"{"})])
def test_request_id_is_echoed(http, path, kwargs):
    given = {"x-request-id": "trace-7/a.b:c"}
    response = http.post(path, **kwargs | {"headers": kwargs.get("headers", {}) | given})
    assert response.headers.get_list("x-request-id") == ["trace-7/a.b:c"]
    names = [http.post(path, **kwargs | {"headers": kwargs.get("headers", {}) | {"x-request-id": bad}}).headers["x-request-id"]
             for bad in ("x" * 200, "a b", "ü".encode(), "")]
    assert len(set(names)) == 4 and all(len(name) == 32 and name.isalnum() for name in names)


def test_other_origins_get_no_answer(http):
    good, bad = ({"origin": origin, "access-control-request-method": "POST",
                  "access-control-request-headers": "authorization,content-type"} for origin in ("https://a.example", "https://b"))
    assert http.options("/v1/completions", headers=good).headers["access-control-allow-origin"] == "https://a.example"
    assert http.options("/v1/completions", headers=bad).status_code == 400
    refusal = http.post("/v1/completions", json={}, headers={"origin": "https://a.example"})
    assert refusal.status_code == 400 and refusal.headers["access-control-allow-origin"] == "https://a.example"
    assert "access-control-allow-origin" not in http.get("/health", headers={"origin": "https://b"}).headers


def test_what_asks_for_a_key(gated):
    with httpx.Client(base_url=gated.url) as http:
        for method, path in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("POST", "/tokenize"), ("GET", "/debug/kv")):
            refused(http.request(method, path), 401, code="invalid_api_key")
        assert http.get("/v1/models", headers={"x-api-key": "second"}).status_code == 200  # as Anthropic's clients send it
        assert {http.get(path).status_code for path in ("/health", "/metrics", "/version")} == {200}


def test_share_of_a_key(gated, http):
    socks = [raw_post(gated.url, headers={"authorization": "Bearer sesame"}, **LONG) for _ in range(3)]
    wait_for(lambda: len(gated.loop.calls) == 3)
    response = http.post("/v1/completions", json=BODY)
    assert "3 under way, the limit is 3" in refused(response, 429, code="too_many_requests")
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert http.get("/v1/models").status_code == 200  # no work
    assert http.post("/v1/completions", json=BODY, headers={"authorization": "Bearer second"}).status_code == 200
    for sock in socks:
        sock.close()
    wait_for(lambda: not gated.loop.calls)
    wait_for(lambda: http.post("/v1/completions", json=BODY).status_code == 200)


def test_open_posts_are_bounded(tokenizer):
    engine = FakeEngine(tokenizer, step_seconds=0.01)
    with serving(lambda: engine, limits={"max_open_requests": 1}) as server, httpx.Client(base_url=server.url) as http:
        socks = [raw_post(server.url, **LONG) for _ in range(4)]
        wait_for(lambda: len(server.loop.calls) == 4)
        response = http.post("/v1/completions", json=BODY)
        assert "the limit is 4" in refused(response, 429, code="too_many_requests") and response.headers["retry-after"]
        assert http.get("/v1/models").status_code == 200
        for sock in socks:
            sock.close()
        wait_for(lambda: http.post("/v1/completions", json=BODY).status_code == 200)


def test_bodies_being_read_are_bounded_in_bytes_and_time(tokenizer, monkeypatch):
    with serving(lambda: FakeEngine(tokenizer), max_body=1000) as server, httpx.Client(base_url=server.url) as http, \
            contextlib.ExitStack() as stack:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1000\r\n\r\n"

        def half():
            sock = stack.enter_context(socket.create_connection((server.host, int(server.port)), timeout=5))
            sock.sendall(head + b" " * 990)
            return sock

        socks = [half() for _ in range(8)]
        wait_for(lambda: http.post("/v1/completions", json=BODY | {"user": "x" * 100}).status_code == 429)
        assert "the limit is 8000" in refused(http.post("/v1/completions", json=BODY | {"user": "x" * 100}), 429)
        for sock in socks:
            sock.close()
        wait_for(lambda: http.post("/v1/completions", json=BODY | {"user": "x" * 900}).status_code == 200)
        monkeypatch.setattr(gate, "BODY_WAIT_S", 0.2)
        assert http.post("/v1/completions", json=LONG | {"max_tokens": 200}).status_code == 200
        answer = half().makefile("rb").read()  # until the server closes the connection
        assert answer.startswith(b"HTTP/1.1 408 ") and b"no byte of the body came for 0.2 s" in answer


def test_bytes_of_a_running_request_do_not_count(tokenizer):
    engine = FakeEngine(tokenizer, step_seconds=0.01)
    with serving(lambda: engine, max_body=300) as server, httpx.Client(base_url=server.url) as http:
        engine.run.clear()
        socks = []
        while len(socks) < 12:
            socks.append(raw_post(server.url, **LONG, user="x" * 200))
            wait_for(lambda: len(server.loop.calls) == len(socks))
        engine.run.set()
        assert http.post("/v1/completions", json=BODY).status_code == 200
        for sock in socks:
            sock.close()


def test_prompt_and_n_limits(http):
    long = http.post("/v1/completions", json={"prompt": [5] * 51})
    assert "takes 50" in refused(long, param="prompt", code="context_length_exceeded")
    assert "at most 4" in refused(http.post("/v1/completions", json=BODY | {"n": 5}), param="n")
    assert http.post("/v1/completions", json={"prompt": [5] * 50, "n": 4, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(("asked", "least", "most"), [(None, 0.9, 2), ("0.2", 0.15, 0.9), ("100", 0.9, 2)])
def test_deadline(gated, http, asked, least, most):
    headers = {"x-request-timeout": asked} if asked else {}
    start = time.monotonic()
    refused(http.post("/v1/completions", json=LONG, headers=headers), 504, code="deadline_exceeded")
    assert least < time.monotonic() - start < most
    wait_for(lambda: not gated.loop.calls and not gated.engine.children, 0.5)


def test_deadline_in_a_stream(gated, http, records):
    text = http.post("/v1/completions", json=LONG | {"stream": True}, headers={"x-request-timeout": "0.3"}).text
    *tokens, error, done = [line[6:] for line in text.splitlines() if line]
    assert len(tokens) > 3 and done == "[DONE]" and json.loads(error)["error"]["code"] == "deadline_exceeded"
    wait_for(lambda: not gated.loop.calls and not gated.engine.children, 0.5)
    assert records[-1].error == "deadline_exceeded" and records[-1].status == 200


@pytest.mark.parametrize("asked", ["soon", "0", "-1", "nan", "1e9", ""])
def test_bad_deadline(http, asked):
    refused(http.post("/v1/completions", json=BODY, headers={"x-request-timeout": asked}), param="x-request-timeout")


def test_record_of_a_request(gated, http, records):
    usage = http.post("/v1/completions", json=BODY | {"n": 2, "prompt": ["hello there", "you"]},
                      headers={"x-request-id": "mine"}).json()["usage"]
    wait_for(lambda: records[-1].id == "mine")
    fields = records[-1].fields()
    assert fields | {"queue_ms": 0, "ttft_ms": 0, "total_ms": 0} == {
        "id": "mine", "route": "POST /v1/completions", "status": 200, "prompt_tokens": usage["prompt_tokens"],
        "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"], "output_tokens": usage["completion_tokens"],
        "finish_reason": "length", "queue_ms": 0, "ttft_ms": 0, "total_ms": 0}
    assert 0 <= fields["queue_ms"] <= fields["ttft_ms"] <= fields["total_ms"]
    http.get("/v1/a%0a%20b%00", headers={"x-request-id": "odd"})
    wait_for(lambda: records[-1].id == "odd")
    assert records[-1].fields()["route"] == "GET /v1/a??b?" and records[-1].status == 404


def test_log_lines(http, records, caplog):
    for method, path, body, name in (("POST", "/v1/completions", BODY, "told"), ("GET", "/v1/models", None, "untold")):
        assert http.request(method, path, json=body, headers={"x-request-id": name}).status_code == 200
    wait_for(lambda: {"told", "untold"} <= {r.id for r in records})
    record, quiet = (next(r for r in records if r.id == name) for name in ("told", "untold"))
    with caplog.at_level(logging.INFO):
        record.write()
        quiet.write()
    assert len(caplog.records) == 1 and f"id={record.id} route=POST /v1/completions status=" in caplog.text
    line = json.loads(JsonFormatter().format(caplog.records[0]))
    assert line["id"] == record.id and line["level"] == "INFO" and line["total_ms"] == record.fields()["total_ms"]
    assert not any(secret in json.dumps([r.fields() for r in records]) for secret in ("sesame", "second", "hello"))


def test_a_client_gone_is_recorded_without_a_status(gated, records):
    sock = raw_post(gated.url, headers={"authorization": "Bearer second"}, **LONG)
    wait_for(lambda: gated.loop.calls)
    before = len(records)
    sock.close()
    wait_for(lambda: len(records) > before)
    assert records[-1].status == 0 and records[-1].fields()["output_tokens"] >= 0


def test_full_queue_says_who_is_there_and_when_to_come_back(tokenizer):
    slow = FakeEngine(tokenizer, step_seconds=0.02)
    with serving(lambda: slow, max_open=4) as server, httpx.Client(base_url=server.url) as http:
        assert server.loop.retry_after(100) == 1  # nothing is known
        for _ in range(4):
            http.post("/v1/completions", json=BODY)
        socks = [raw_post(server.url, **LONG) for _ in range(4)]
        wait_for(lambda: slow.metrics.running == 4)
        response = http.post("/v1/completions", json=BODY | {"n": 2})
        assert "4 of 4 (4 running, 0 waiting), 2 more" in refused(response, 429)
        assert server.loop.retry_after(10**6) == 60 and int(response.headers["retry-after"]) < 10
        for sock in socks:
            sock.close()


def test_draining_server_refuses_work_only(gated, http):
    gated.loop.draining = True
    try:
        refused(http.post("/v1/completions", json=BODY), 503, code="shutting_down")
        refused(http.get("/health"), 503, code="shutting_down")
        assert http.get("/metrics").status_code == 200
    finally:
        gated.loop.draining = False


def test_a_tokenizer_that_crashes_fails_one_request(tokenizer, caplog):
    class Panic(BaseException):
        """As a panic in Rust arrives."""

    class Broken:
        byte_level = tokenizer.byte_level

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def encode(self, text, **kwargs):
            if "bad" in text:
                raise Panic("index out of bounds")
            return tokenizer.encode(text, **kwargs)

    with serving(lambda: FakeEngine(Broken())) as server, httpx.Client(base_url=server.url, timeout=20) as http:
        for prompt in ("bad", "bad" * 4000):  # on the event loop and off it
            refused(http.post("/v1/completions", json={"prompt": prompt}), 500, code="tokenizer_error")
        assert "index out of bounds" in caplog.text
        assert http.post("/v1/completions", json=BODY).status_code == 200


def test_what_the_engine_cannot_take_fails_one_request(tokenizer):
    with serving(lambda: FakeEngine(tokenizer)) as server, httpx.Client(base_url=server.url) as http:
        add = server.engine.add_request
        server.engine.add_request = lambda name, ids, *rest: add(name, ids, *rest) if len(ids) < 9 else 1 / 0
        refused(http.post("/v1/completions", json={"prompt": [5] * 9}), 500, code="internal_error")
        assert http.post("/v1/completions", json=BODY).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_sequence_that_ends_with_an_error_fails_one_request(tokenizer, stream):
    """As after NaN: the third token of the bad one does not come, and its other answers go with it."""
    engine = FakeEngine(tokenizer, step_seconds=0.01)
    step = engine.step

    def failing():
        deltas = step()
        for delta in deltas:
            request, _, count = engine.children.get(f"{delta.request_id}#{delta.index}", (None, None, 0))
            if request and len(request.prompt) == 3 and count == 3 and not delta.index:
                del engine.children[request.id]
                delta.token_ids, delta.text, delta.finish_reason, delta.error = (), "", "error", "no memory"
        return deltas

    engine.step = failing
    with serving(lambda: engine) as server, httpx.Client(base_url=server.url, timeout=20) as http:
        sock = raw_post(server.url, prompt=[5], max_tokens=40, ignore_eos=True)
        bad = http.post("/v1/completions", json={"prompt": [5, 6, 7], "max_tokens": 20, "n": 2, "stream": stream})
        if stream:
            *_, error, done = [line[6:] for line in bad.text.splitlines() if line]
            error = json.loads(error)["error"]
            assert bad.status_code == 200 and done == "[DONE]"
            assert (error["code"], error["message"]) == ("generation_failed", "no memory")
        else:
            refused(bad, 500, code="generation_failed")
        wait_for(lambda: len(engine.children) == 1 and len(server.loop.calls) == 1)  # the other one goes on
        assert b"200 OK" in sock.recv(100)
        sock.close()


def test_an_engine_that_hangs_turns_health_red(tokenizer, caplog):
    engine = FakeEngine(tokenizer)
    with serving(lambda: engine, step_timeout=0.2) as server, httpx.Client(base_url=server.url, timeout=20) as http:
        time.sleep(0.5)
        assert http.get("/health").status_code == 200  # idle is no hang
        go = threading.Event()
        engine.step = lambda: go.wait(10) and []
        try:
            refused(http.post("/v1/completions", json=BODY), 500, code="engine_error")
            refused(http.get("/health"), 503, code="engine_error")
            assert "hangs" in caplog.text
        finally:
            go.set()

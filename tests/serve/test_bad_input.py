"""Whatever is wrong with a request gets a 4xx with an error object that names the field, and the server goes on."""

import json
import socket

import httpx
import pytest
from serve_fakes import FakeEngine, serving

GOOD = {"model": "fake", "prompt": "hello", "max_tokens": 2}
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


def refused(response, status=400, param=None, code=None):
    """Checks the shape of an error and returns its message."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"]
    assert error["param"] == param, error
    if code:
        assert error["code"] == code
    return error["message"]


@pytest.mark.parametrize(("field", "value"), [
    ("max_tokens", -1), ("max_tokens", 0), ("max_tokens", "5"), ("max_tokens", 1.5), ("max_tokens", True),
    ("max_tokens", 10**30), ("temperature", -0.1), ("temperature", "hot"), ("temperature", 101), ("top_p", 0),
    ("top_p", 1.1), ("top_k", -2), ("min_p", 2), ("n", 0), ("n", 1000), ("seed", 2**63), ("seed", "x"),
    ("presence_penalty", 3), ("frequency_penalty", -3), ("repetition_penalty", 0), ("repetition_penalty", -1),
    ("logit_bias", {"x": 1}), ("logit_bias", {"5": 101}), ("logit_bias", [1]), ("logit_bias", {"--5": 1}),
    ("logit_bias", {"9" * 5000: 1}), ("logit_bias", {"\u0663": 1}),
    ("stop", ""), ("stop", [""]), ("stop", 7), ("stop", ["a"] * 65), ("stop_token_ids", ["a"]), ("stop_token_ids", [-1]),
    ("min_tokens", -1), ("min_tokens", 3), ("logprobs", -1), ("logprobs", 21), ("logprobs", True),
    ("prompt_logprobs", 50), ("echo", "yes"), ("stream", 1), ("ignore_eos", "no"), ("priority", 2**40),
    ("cache_salt", 5), ("cache_salt", "x" * 300), ("session_id", "x" * 300), ("end_session", True), ("retention", -1),
    ("retention", 1e9), ("no_store", "yes"), ("best_of", 0), ("best_of", 200), ("best_of", "x"), ("suffix", "end"),
    ("use_beam_search", True),
    ("response_format", "json"), ("structured_outputs", {}), ("guided_json", 5), ("guided_regex", "(a"),
    ("guided_regex", "a" * 70_000), ("guided_choice", []), ("guided_grammar", "start: ("), ("guided_regex", ""),
    ("guided_json", '{"type": "wizard"}'), ("guided_json", "[]"), ("structural_tag", "x"),
    ("truncate_prompt_tokens", 0), ("truncate_prompt_tokens", -2), ("truncate_prompt_tokens", 257),
    ("allowed_token_ids", [5]), ("bad_words", ["x"]), ("chat_template", "{{ 1 }}"), ("logits_processors", ["x"]),
    ("stream_options", {"include_usage": True}), ("user_", None),
    ("prompt", None), ("prompt", []), ("prompt", ""), ("prompt", {}), ("prompt", 5), ("prompt", [1, "a"]),
    ("prompt", ["a", 1]), ("prompt", [[]]), ("prompt", [[1], "a"]), ("prompt", [-1]), ("prompt", [1.5]),
    ("prompt", [True]), ("prompt", [None]), ("prompt", [[1], [None]]),
    ("prompt", [[1], [2, -3]]), ("prompt", [2**70]), ("prompt", [5000]), ("prompt", ["a", ""]),
])
def test_field(http, field, value):
    response = http.post("/v1/completions", json={**GOOD, field: value})
    if field == "user_":
        assert response.status_code == 200
    else:
        assert field in refused(response, param="stop_token_ids[0]" if value == ["a"] else field)


@pytest.mark.parametrize(("field", "value", "param"), [
    ("messages", [], "messages"), ("messages", "hi", "messages"), ("messages", None, "messages"),
    ("messages", [{"content": "x"}], "messages[0].role"),
    ("messages", [{"role": "wizard", "content": "x"}], "messages[0].role"),
    ("messages", [{"role": "user"}], "messages[0].content"),
    ("messages", [{"role": "user", "content": 5}], "messages[0].content"),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
     "messages[0].content[0].type"),
    ("messages", [{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text"),
    ("messages", [{"role": "assistant", "tool_calls": [{"id": "x"}]}], "messages[0].tool_calls[0].function"),
    ("tools", [{"type": "function", "function": {"name": "f"}}], "tools"), ("tool_choice", "required", "tool_choice"),
    ("response_format", {"type": "json_schema"}, "response_format.json_schema"),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {}}}, "response_format.json_schema.name"),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}},
     "response_format.json_schema.name"),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x"}}, "response_format.json_schema.schema"),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "http://127.0.0.1:9/"}}},
     "response_format.json_schema"),
    ("response_format", {"type": "yaml"}, "response_format.type"),
    ("structured_outputs", {"regex": "[z-a]"}, "structured_outputs.regex"),
    ("structured_outputs", {"choice": ["a", ""]}, "structured_outputs.choice"),
    ("structured_outputs", {"choice": "a"}, "structured_outputs.choice"),
    ("structured_outputs", {"regex": "a", "grammar": "start: \"a\""}, "structured_outputs.grammar"),
    ("structured_outputs", {"regex": "a", "whitespace_pattern": " "}, "structured_outputs.whitespace_pattern"),
    ("logprobs", 3, "logprobs"), ("top_logprobs", 2, "top_logprobs"), ("max_completion_tokens", -4,
                                                                      "max_completion_tokens"),
    ("chat_template_kwargs", {"chat_template": "{{ 1 }}"}, "chat_template_kwargs"),
    ("chat_template_kwargs", {"tokenize": True}, "chat_template_kwargs"), ("audio", {"voice": "x"}, "audio"),
    ("modalities", ["audio"], "modalities"), ("n", -1, "n"),
])
def test_chat_field(http, field, value, param):
    refused(http.post("/v1/chat/completions", json={**CHAT, field: value}), param=param)


def test_top_logprobs_limit(http):
    refused(http.post("/v1/chat/completions", json={**CHAT, "logprobs": True, "top_logprobs": 21}),
            param="top_logprobs")


COMPLETIONS, CHATS, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
FORM = {"format": {"type": "json_object"}}


@pytest.mark.parametrize(("path", "fields", "param", "limit"), [
    (COMPLETIONS, {"echo": True, "logprobs": 5, "prompt_logprobs": -1}, "prompt_logprobs", "[0, 20]"),
    (COMPLETIONS, {"echo": True, "logprobs": 5, "prompt_logprobs": -1, "max_tokens": 0}, "prompt_logprobs", "[0, 20]"),
    (COMPLETIONS, {"best_of": 2, "n": 0}, "n", "[1, 128]"), (CHATS, {"best_of": 2, "n": -3}, "n", "[1, 128]"),
    (CHATS, {"max_tokens": -2, "max_completion_tokens": 3}, "max_tokens", "at least 1"),
    (CHATS, {"max_tokens": 0, "max_completion_tokens": 3}, "max_tokens", "at least 1"),
    (CHATS, {"max_tokens": 3, "max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
    (RESPONSES, {"top_logprobs": -1}, "top_logprobs", "[0, 20]"), (RESPONSES, {"top_logprobs": 99}, "top_logprobs", "[0, 20]"),
    (RESPONSES, {"max_tokens": -2, "max_output_tokens": 3}, "max_tokens", "at least 1"),
    (RESPONSES, {"max_output_tokens": 0, "max_completion_tokens": 3}, "max_output_tokens", "at least 1"),
    (RESPONSES, {"response_format": {"type": "json_schema"}, "text": FORM}, "response_format", "only one"),
])
def test_a_field_that_another_replaces_is_checked_too(http, path, fields, param, limit):
    good = {COMPLETIONS: GOOD, CHATS: CHAT, RESPONSES: {"input": "hi"}}[path]
    message = refused(http.post(path, json=good | fields), param=param)
    assert param in message and limit in message


def test_a_good_field_that_another_replaces_is_taken(http):
    for path, fields in ((COMPLETIONS, {"echo": True, "logprobs": 5, "prompt_logprobs": 2, "max_tokens": 0}),
                         (CHATS, {"max_completion_tokens": 3}), (RESPONSES, {"max_output_tokens": 3, "top_logprobs": 20})):
        good = {COMPLETIONS: GOOD, CHATS: CHAT, RESPONSES: {"input": "hi", "max_tokens": 2}}[path]
        assert http.post(path, json=good | fields).status_code == 200


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b'"x"', b'{"prompt": "\\ud800"}', b"\xff\xfe", b"[" * 5000, b'{"prompt": "a",}', b"NaN",
    b'{"prompt": "a", "temperature": NaN,}', b'{"prompt": "a", "temperature": nan}', b"[" * 5000 + b"NaN" + b"]" * 5000,
])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_malformed_json(http, path, body):
    refused(http.post(path, content=body, headers={"content-type": "application/json"}))


@pytest.mark.parametrize(("fields", "param"), [
    ('"temperature": NaN', "temperature"), ('"top_p": Infinity', "top_p"), ('"min_p": -Infinity', "min_p"),
    ('"seed": 1e999', "seed"), ('"max_tokens": 1' + "0" * 5000, "max_tokens"), ('"logit_bias": {"5": 1e400}', "logit_bias.5"),
    ('"stop_token_ids": [3, -1e999]', "stop_token_ids[1]"), ('"x": [{"a": 1}, {"b": [NaN]}]', "x[1].b[0]"),
    ('"\\ud800": NaN', "?"), (f'"{"x" * 999}": NaN', "x" * 200),
])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_numbers_that_are_not_finite(http, path, fields, param):
    response = http.post(path, content=f'{{"prompt": "a", {fields}}}'.encode(), headers={"content-type": "application/json"})
    assert refused(response, param=param) == f"{param} must be a finite number"


def nested(levels, inner="1"):
    return '{"a": [' * (levels // 2) + inner + "]}" * (levels // 2)


@pytest.mark.parametrize("levels", [120, 400, 1000])
@pytest.mark.parametrize(("path", "before", "after"), [
    ("/v1/completions", '"prompt":', ""), ("/v1/completions", '"model":', ""), ("/v1/completions", '"stop":', ""),
    ("/v1/completions", '"prompt": "a", "guided_json":', ""), ("/v1/completions", '"prompt": "a", "x":', ""),
    ("/v1/chat/completions", '"messages": [{"role": "user", "content": [', "]}]"),
    ("/v1/chat/completions", '"messages": [{"role": "user", "content": "a"}], "tool_choice":', ""),
    ("/v1/responses", '"input": "a", "text":', ""), ("/v1/responses", '"input": [', "]"), ("/v1/embeddings", '"input":', ""),
])
def test_deep_nesting(http, path, before, after, levels):
    body = "{" + before + nested(levels) + after + "}"
    param = before.split('"')[-2] if not after else before.split('"')[1]
    assert "nested at most 100" in refused(http.post(path, content=body.encode()), param=param, code="nested_too_deeply")


def test_nesting_within_the_bound(http):
    for body in ('"prompt": "a", "max_tokens": 1, "x": ' + nested(98), '"prompt": [' + "[5]," * 200 + '[6]], "max_tokens": 1'):
        assert http.post("/v1/completions", content=f"{{{body}}}".encode()).status_code == 200


@pytest.mark.parametrize(("path", "field", "item", "param"), [
    ("/v1/completions", "stop", 1, "stop"), ("/v1/completions", "stop_token_ids", "a", "stop_token_ids[0]"),
    ("/v1/completions", "guided_choice", 1, "guided_choice[0]"), ("/v1/chat/completions", "messages", 1, "messages"),
    ("/v1/chat/completions", "tools", 1, "tools"), ("/v1/responses", "input", 1, "input"),
    ("/detokenize", "tokens", "a", "tokens[0]"), ("/v1/score", "text_2", 1, "text_2"),
])
def test_a_list_of_many_wrong_elements_is_refused_at_the_first(http, path, field, item, param):
    good = {"prompt": "a", "input": "a", "text_1": "a", "messages": CHAT["messages"]} if field != "tokens" else {}
    message = refused(http.post(path, json={**good, field: [item] * 100_000}), param=param)
    assert len(message) < 300


def test_an_object_of_many_wrong_entries_is_refused_by_its_size(http):
    for path, field, most in (("/v1/completions", "logit_bias", 300), ("/v1/responses", "metadata", 16),
                              ("/v1/batches", "metadata", 16), ("/v1/completions", "structured_outputs", 16)):
        good = {"prompt": "a"} if "completions" in path else {"input": "a"}
        good |= {"input_file_id": "x", "endpoint": "/v1/completions", "completion_window": "24h"} if "batches" in path else {}
        message = refused(http.post(path, json={**good, field: {f"k{i}": [] for i in range(20_000)}}), param=field)
        assert f"at most {most} entries, not 20000" in message and len(message) < 300


def test_metadata_has_the_bounds_of_openai(http):
    for metadata in ({"k" * 65: "v"}, {"k": "v" * 513}):
        response = http.post("/v1/responses", json={"input": "a", "max_output_tokens": 1, "metadata": metadata})
        assert response.status_code == 400 and len(response.json()["error"]["message"]) < 500
    fits = {f"{i:064}": "v" * 512 for i in range(16)}
    assert http.post("/v1/responses", json={"input": "a", "max_output_tokens": 1, "metadata": fits}).status_code == 200


def test_prompts_and_answers_together_are_bounded(http):
    for more, param in (({"n": 128}, "prompt"), ({"n": 1, "best_of": 100}, "prompt"),
                        ({"prompt": "a", "best_of": 1025}, "best_of"), ({"prompt": ["a"] * 1025}, "prompt")):
        assert "1024" in refused(http.post("/v1/completions", json={"prompt": [[1]] * 5000, **more}), param=param)
    assert http.post("/v1/completions", json={"prompt": [[1]] * 20, "n": 3, "max_tokens": 1}).status_code == 200


def test_a_refusal_shows_the_value_shortened(http):
    message = refused(http.post("/v1/completions", json={**GOOD, "suffix": "end" * 1000}), param="suffix")
    assert "'endend" in message and len(message) < 200


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_longer_than_the_window(http, stream):
    for prompt in (list(range(100, 400)), "word " * 400):
        message = refused(http.post("/v1/completions", json={"prompt": prompt, "stream": stream}), param="prompt",
                          code="context_length_exceeded")
        assert "256" in message
    assert "300" in refused(http.post("/v1/completions", json={"prompt": [9] * 300}), param="prompt")
    long = [{"role": "user", "content": "word " * 400}]
    refused(http.post("/v1/chat/completions", json={"messages": long, "stream": stream}), param="messages",
            code="context_length_exceeded")


def test_refusal_by_the_engine_comes_before_the_stream(http):
    refused(http.post("/v1/completions", json={"prompt": [5000], "stream": True}), param="prompt")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_unknown_model(http, path):
    body = {**(GOOD if "chat" not in path else CHAT), "model": "gpt-9"}
    assert "gpt-9" in refused(http.post(path, json=body), 404, "model", "model_not_found")
    refused(http.get("/v1/models/gpt-9"), 404, "model", "model_not_found")


def test_routes_and_methods(http):
    refused(http.get("/nope"), 404)
    refused(http.post("/v1/nope", json={}), 404)
    refused(http.get("/v1/completions"), 405)
    refused(http.delete("/v1/models"), 405)


def test_broken_http_does_not_end_the_server(fake, http):
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: "
    for junk in (b"\x00\x01\x02\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", head + b"50\r\n\r\n{", head + b"-1\r\n\r\n"):
        with socket.create_connection((fake.host, int(fake.port)), timeout=5) as sock:
            sock.sendall(junk)
            sock.shutdown(socket.SHUT_WR)
            sock.recv(1000)
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize(("headers", "status"), [
    ({}, 200), ({"content-type": "Application/JSON; charset=utf-8"}, 200), ({"content-type": "application/x+json"}, 200),
    ({"content-type": "application/x-www-form-urlencoded"}, 415), ({"content-type": "text/plain"}, 415),
    ({"content-type": "application/jsonp"}, 415), ({"content-type": ""}, 415), ({"origin": "https://evil.example"}, 415)])
def test_content_type(http, headers, status):
    response = http.post("/v1/completions", content=json.dumps(GOOD), headers=headers)
    assert response.status_code == status
    if status == 415:
        assert "send the header \"content-type: application/json\"" in refused(response, 415, param="content-type")


def test_body_limit(http):
    big = {"prompt": "x" * (2**20 + 1)}
    refused(http.post("/v1/completions", json=big), 413)

    def parts():
        for _ in range(300):
            yield b"x" * 8192

    try:
        refused(http.post("/v1/completions", content=parts()), 413)
    except httpx.TransportError:  # refused while the client was still writing
        pass
    assert http.post("/v1/completions", json=GOOD).status_code == 200


def test_api_key(tokenizer):
    with serving(lambda: FakeEngine(tokenizer), api_keys=("sesame", "second"), name="named") as server:
        with httpx.Client(base_url=server.url) as http:
            for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "sesame"},
                           {"authorization": "Basic sesame"}):
                for path in ("/v1/models", "/v1/nope"):
                    refused(http.get(path, headers=header), 401, code="invalid_api_key")
            for key in ("sesame", "second"):
                models = http.get("/v1/models", headers={"authorization": f"Bearer {key}"}).json()
                assert models["data"][0]["id"] == "named"
            assert http.get("/health").status_code == 200
            assert "named" in http.get("/metrics").text


def test_without_tokenizer():
    with serving(lambda: FakeEngine(None)) as server, httpx.Client(base_url=server.url) as http:
        refused(http.post("/v1/completions", json={"prompt": "text"}), param="prompt")
        refused(http.post("/v1/completions", json={"prompt": [5], "stop": "x"}), param="stop")
        refused(http.post("/v1/chat/completions", json={**CHAT, "model": None}), param="messages")
        choice = http.post("/v1/completions", json={"prompt": [5], "max_tokens": 4, "return_token_ids": True,
                                                    "logprobs": 1}).json()["choices"][0]
        assert choice["token_ids"] == [7, 8, 9, 7] and choice["text"] == ""
        assert choice["logprobs"]["tokens"][0] == "token_id:7"


def test_server_lives_after_all_this(http):
    assert http.post("/v1/completions", json=GOOD).status_code == 200


def test_a_text_that_cannot_fit_is_not_tokenised(http, fake, monkeypatch):
    monkeypatch.setattr(type(fake.engine.tokenizer), "encode", lambda *_, **__: pytest.fail("tokenised"))
    each = fake.engine.tokenizer.characters_per_token
    text = "a" * (255 * each + 1)
    for path, body, param in (("/v1/completions", {"prompt": ["a", text]}, "prompt"),
                              ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}, "messages"),
                              ("/v1/embeddings", {"input": text}, "input"),
                              ("/v1/score", {"text_1": "a", "text_2": ["a", text]}, "text_2")):
        message = refused(http.post(path, json=body), param=param, code="context_length_exceeded")
        assert f"characters, of which a token holds at most {each}, do not fit" in message and "256" in message
    monkeypatch.undo()
    for prompt in (text[1:], "a b" * 4000):
        assert "tokens do not fit" in refused(http.post("/v1/completions", json={"prompt": prompt}), param="prompt")
    assert http.post("/v1/completions", json={"prompt": text, "truncate_prompt_tokens": 9, "max_tokens": 1}).status_code == 200


def test_a_body_of_many_lists_is_refused_before_it_is_parsed(http):
    for item in ("[],", "{},"):
        message = refused(http.post("/v1/completions", content=f'{{"prompt": [{item * 110_000}[]]}}'.encode()))
        assert "at most 100000 lists and objects, got 110003" in message


def test_a_list_of_more_than_a_million_items_is_refused(tokenizer):
    with serving(lambda: FakeEngine(tokenizer), max_body=2**22) as server, httpx.Client(base_url=server.url) as http:
        body = b'{"prompt": [' + b"1," * 2**20 + b"1]}"
        assert "a list may hold at most 1048576 items" in refused(http.post("/v1/completions", content=body))


def test_large_bodies_are_read_as_small_ones(http):
    padding = {"user": "é\\\"" * 30_000}
    answer = http.post("/v1/completions", json=GOOD | padding).json()["choices"]
    assert answer == http.post("/v1/completions", json=GOOD).json()["choices"]
    assert "nested at most 100" in refused(http.post("/v1/completions", json=padding | {"x": json.loads(nested(120))}),
                                           code="nested_too_deeply")
    broken = b'{"prompt": ["' + b"a" * 100_000
    assert "not valid JSON" in refused(http.post("/v1/completions", content=broken), code="invalid_json")
    assert "integers from 0" in refused(http.post("/v1/completions", json={"prompt": [5] * 90_000 + [True]}), param="prompt")


def test_many_calls_are_refused_before_they_are_looked_at(http):
    calls = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}] * 2049}
    message = refused(http.post("/v1/chat/completions", json={"messages": [calls, calls, 1]}), param="messages")
    assert "at most 4096 tool_calls, not 4098" in message
    refused(http.post("/v1/chat/completions", json={"messages": [calls, 1]}), param="messages[1]")

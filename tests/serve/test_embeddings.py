"""/v1/embeddings, /v1/score, /tokenize and /detokenize against the fake engine."""

import base64

import numpy as np
import pytest
from serve_fakes import FakeEngine, raw_post, wait_for
from test_bad_input import refused
from test_completions import post

from jaxkv.serve.embeddings import Embeddings
from jaxkv.serve.schemas import EmbeddingResponse, ScoreResponse, TokenizeResponse


def vector(tokenizer, prompt):
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    hidden = np.array(FakeEngine.hidden(ids))
    return hidden / np.linalg.norm(hidden)


@pytest.mark.parametrize("given", ["one text", ["one", "two and more", "three"], [5, 6, 7], [[5, 6], [7]]])
def test_shapes_of_input(client, tokenizer, given):
    prompts = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    for answer in (client.embeddings.create(model="fake", input=given),  # the client asks for base64
                   client.embeddings.create(model="fake", input=given, encoding_format="float")):
        assert [row.index for row in answer.data] == list(range(len(prompts)))
        for row, prompt in zip(answer.data, prompts, strict=True):
            np.testing.assert_allclose(row.embedding, vector(tokenizer, prompt), atol=1e-6)
        count = sum(len(tokenizer.encode(p)) if isinstance(p, str) else len(p) for p in prompts)
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == count


def test_more_inputs_than_a_batch(http, fake):
    rows = [[7, 8, i % 50] for i in range(100)]
    body = post(http, "/v1/embeddings", input=rows, encoding_format="float")
    EmbeddingResponse.model_validate(body)
    np.testing.assert_allclose([row["embedding"] for row in body["data"]], [vector(None, r) for r in rows], atol=1e-6)
    assert body["usage"]["completion_tokens"] == 0 and not fake.loop.calls


def test_base64_is_little_endian_float32(http):
    row = post(http, "/v1/embeddings", input=[5, 6, 7], encoding_format="base64")["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(row), "<f4"), vector(None, [5, 6, 7]), atol=1e-6)


def test_truncation_priority_and_salt(http, fake):
    post(http, "/v1/embeddings", input=[5, 6, 7, 8], truncate_prompt_tokens=2, priority=3, cache_salt="s")
    request = fake.engine.requests[-1]
    assert (request.prompt, request.priority, request.namespace) == ((7, 8), 3, "s")
    assert request.params.embed and request.max_tokens == 1
    post(http, "/v1/embeddings", input=[9] * 600, truncate_prompt_tokens=-1)
    assert len(fake.engine.requests[-1].prompt) == 255


@pytest.mark.parametrize(("field", "value"), [
    ("input", None), ("input", []), ("input", ""), ("input", [1, "a"]), ("input", [None, None]),
    ("input", {"a": 1}), ("input", ["a", ""]),
    ("input", [9] * 300), ("input", ["a"] * 2049), ("input", [5000]), ("dimensions", 64), ("encoding_format", "int8"),
    ("priority", "x"), ("truncate_prompt_tokens", 0),
])
def test_bad_input(http, field, value):
    assert refused(http.post("/v1/embeddings", json={"input": "a", field: value}), param=field)


def test_a_fault_of_ours_is_not_the_clients(http, monkeypatch):
    def broken(answer, deltas):
        raise ValueError("input is ours")

    monkeypatch.setattr(Embeddings, "data", broken)
    refused(http.post("/v1/embeddings", json={"input": "a"}), status=500)


def test_scores(http, tokenizer):
    cosine = lambda a, b: float(vector(tokenizer, a) @ vector(tokenizer, b))  # noqa: E731
    for path in ("/v1/score", "/score"):
        for first, second in (("a cat", "a dog"), ("a cat", ["a dog", "a car"]), (["a", "b c"], ["d e", "f"])):
            body = post(http, path, text_1=first, text_2=second)
            ScoreResponse.model_validate(body)
            pairs = list(zip([first] * 9 if isinstance(first, str) else first,
                             [second] if isinstance(second, str) else second))
            assert [row["score"] for row in body["data"]] == pytest.approx([cosine(*pair) for pair in pairs], abs=1e-6)
            assert body["usage"]["prompt_tokens"] == sum(len(tokenizer.encode(t)) for pair in pairs for t in pair)


def test_a_text_is_encoded_once_for_all_its_pairs(http, tokenizer, monkeypatch):
    texts, encode = [], tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text, **more: texts.append(text) or encode(text, **more))
    post(http, "/v1/score", text_1="a cat", text_2=["a dog", "a car", "a dog"])
    assert sorted(texts) == ["a car", "a cat", "a dog"]


@pytest.mark.parametrize(("first", "second", "param"), [
    ("a", ["b"] * 1025, "text_2"), (["b"] * 1025, "a", "text_1"),
    (["a", "b"], "c", "text_1"), (["a", "b"], ["a", "b", "c"], "text_1"), ([], "a", "text_1"), ("a", [""], "text_2"),
    ("a", None, "text_2"), (5, "a", "text_1"), ("word " * 400, "a", "text_1"), ("a", "word " * 400, "text_2"),
])
def test_bad_texts(http, first, second, param):
    assert refused(http.post("/v1/score", json={"text_1": first, "text_2": second}), param=param)


def test_disconnect_ends_an_embedding(fake):
    fake.engine.run.clear()
    try:
        sock = raw_post(fake.url, "/v1/embeddings", input=[[5]] * 40)
        wait_for(lambda: len(fake.engine.children) == 32)
        sock.close()
        wait_for(lambda: not fake.engine.children and not fake.loop.calls)
    finally:
        fake.engine.run.set()


def test_tokenize_and_back(http, tokenizer):
    text = "def f(x): # naïve 日本\n"
    body = post(http, "/tokenize", prompt=text, return_token_strs=True)
    TokenizeResponse.model_validate(body)
    assert body["tokens"] == tokenizer.encode(text) and body["count"] == len(body["tokens"])
    assert body["max_model_len"] == 256 and len(body["token_strs"]) == body["count"]
    assert post(http, "/tokenize", prompt=text)["token_strs"] is None
    assert post(http, "/detokenize", tokens=body["tokens"]) == {"prompt": text}
    assert post(http, "/tokenize", prompt="")["count"] == len(tokenizer.encode(""))
    assert post(http, "/detokenize", tokens=[]) == {"prompt": ""}


def test_tokenized_conversation_is_the_prompt_of_a_chat(http, client):
    messages = [{"role": "user", "content": "hi"}]
    usage = client.chat.completions.create(model="fake", messages=messages, max_tokens=1).usage
    assert post(http, "/tokenize", messages=messages)["count"] == usage.prompt_tokens
    bare = post(http, "/tokenize", messages=messages, add_generation_prompt=False)
    assert bare["count"] < usage.prompt_tokens
    assert post(http, "/detokenize", tokens=bare["tokens"])["prompt"].startswith("<|im_start|>user\nhi")


@pytest.mark.parametrize(("path", "body", "param"), [
    ("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": 5}, "prompt"), ("/tokenize", {"prompt": "\ud800"}, None),
    ("/tokenize", {"prompt": "a", "messages": []}, "prompt"), ("/tokenize", {"messages": []}, "messages"),
    ("/tokenize", {"messages": [{"role": "x"}]}, "messages[0].role"), ("/detokenize", {}, "tokens"),
    ("/detokenize", {"tokens": [-1]}, "tokens"), ("/detokenize", {"tokens": [10**6]}, "tokens"),
    ("/detokenize", {"tokens": ["a"]}, "tokens[0]"), ("/detokenize", {"tokens": [1], "model": "other"}, "model"),
])
def test_bad_tokens(http, path, body, param):
    content = b'{"prompt": "\\ud800"}' if param is None else None
    response = http.post(path, content=content) if content else http.post(path, json=body)
    refused(response, 404 if param == "model" else 400, param=param)

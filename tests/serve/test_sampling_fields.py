"""Fields of vLLM beyond OpenAI's, and the model's own sampling defaults, against the fake engine."""

import httpx
import pytest
from serve_fakes import FakeEngine, serving
from test_bad_input import refused
from test_completions import post, stream

from jaxkv.serve.answer import Choice, best_of
from jaxkv.types import Logprobs

CHAT = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def test_the_likeliest_answers_are_kept_best_first():
    def choice(index, *values):
        return Choice(index, None, logprobs=[Logprobs(1, value, 1, ()) for value in values], token_ids=[index])

    choices = [choice(0, -3.0), choice(1, -1.0, -0.5), choice(2, -0.1), choice(3, -5.0), choice(4, -2.0), choice(5, -9.0)]
    assert [c.token_ids for c in best_of(choices, 3, 2)] == [[2], [1], [4], [3]]
    assert [c.index for c in best_of(choices, 6, 2)] == [0, 1]
    assert best_of(choices, 6, 6) is choices


@pytest.mark.parametrize(("path", "prompt"), [("/v1/completions", {"prompt": ["a", "b"]}), (CHAT, {"messages": HI})])
def test_best_of_runs_all_and_returns_n(http, fake, path, prompt):
    count = len(prompt.get("prompt", [1]))
    body = post(http, path, **prompt, n=2, best_of=4, max_tokens=5)
    assert [c["index"] for c in body["choices"]] == list(range(2 * count))
    assert body["usage"]["completion_tokens"] == 4 * 5 * count, "what ran is counted"
    assert all(c["logprobs"] is None for c in body["choices"])
    assert fake.engine.requests[-1].params.logprobs == 0
    assert "best_of" in refused(http.post(path, json={**prompt, "best_of": 2, "stream": True}), param="best_of")
    assert "at least n (3)" in refused(http.post(path, json={**prompt, "best_of": 2, "n": 3}), param="best_of")
    assert len(stream(http, path, **prompt, n=2, best_of=2, max_tokens=1)) >= 2
    refused(http.post(path, json={**prompt, "best_of": 129}), param="best_of")


def test_truncated_prompts(http, fake):
    cut = lambda **body: list(fake.engine.requests[-1].prompt) if post(http, **body) else None  # noqa: E731
    long = list(range(100, 500))
    assert cut(prompt=[5, 6, 7], truncate_prompt_tokens=2) == [6, 7]
    assert cut(prompt=[5, 6, 7], truncate_prompt_tokens=9) == [5, 6, 7]
    assert cut(prompt=long, truncate_prompt_tokens=-1) == long[-240:], "room for the 16 tokens of the default"
    assert cut(prompt=long, truncate_prompt_tokens=-1, max_tokens=56) == long[-200:]
    assert cut(path=CHAT, messages=[{"role": "user", "content": "word " * 999}], truncate_prompt_tokens=-1)
    assert len(fake.engine.requests[-1].prompt) == 255
    refused(http.post("/v1/completions", json={"prompt": long, "truncate_prompt_tokens": 256}), param="prompt")
    body = post(http, prompt="one two three four", truncate_prompt_tokens=2, echo=True, max_tokens=1, return_token_ids=True,
                logprobs=0)
    choice = body["choices"][0]
    assert len(choice["prompt_token_ids"]) == body["usage"]["prompt_tokens"] == 2
    assert choice["text"].startswith("".join(choice["logprobs"]["tokens"][:2])), "echo shows what the model saw"


def test_truncation_goes_by_the_servers_own_limit_too(tokenizer):
    with serving(lambda: FakeEngine(tokenizer), limits={"max_prompt_tokens": 7}) as server, \
            httpx.Client(base_url=server.url) as http:
        assert post(http, prompt=[5] * 20, truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] == 7
        refused(http.post("/v1/completions", json={"prompt": [5] * 20, "truncate_prompt_tokens": 8}), param="prompt")


def test_tokens_as_ids(http, tokenizer):
    names = [f"token_id:{t}" for t in tokenizer.encode("x")]
    choice = post(http, prompt="x", echo=True, logprobs=1, max_tokens=1, return_tokens_as_token_ids=True)["choices"][0]
    assert choice["logprobs"]["tokens"][:len(names)] == names and choice["text"].startswith("x")
    entry = post(http, CHAT, messages=HI, logprobs=True, max_tokens=1, return_tokens_as_token_ids=True)
    content = entry["choices"][0]["logprobs"]["content"][0]
    assert content["token"].startswith("token_id:") and bytes(content["bytes"]).decode() == "The"


@pytest.fixture(scope="module")
def tuned(tokenizer):
    def build():
        engine = FakeEngine(tokenizer)
        engine.default_sampling = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1, "max_tokens": 50}
        return engine

    with serving(build) as server, httpx.Client(base_url=server.url) as http:
        yield server.engine, http


@pytest.mark.parametrize(("path", "prompt", "limit"), [
    ("/v1/completions", {"prompt": [5]}, 16), (CHAT, {"messages": HI}, 50), ("/v1/responses", {"input": "hi"}, 50),
])
def test_the_models_defaults_are_for_fields_left_out(tuned, path, prompt, limit):
    engine, http = tuned
    seen = lambda: (p := engine.requests[-1].params, p.temperature, p.top_k, p.top_p, p.repetition_penalty,  # noqa: E731
                    p.max_tokens)[1:]
    post(http, path, **prompt)
    assert seen() == (0.6, 20, 0.95, 1.1, limit)
    name = "max_output_tokens" if "responses" in path else "max_tokens"
    post(http, path, **prompt, temperature=0, top_k=0, top_p=1, repetition_penalty=1, **{name: 99})
    assert seen() == (0, 0, 1.0, 1.0, 99)
    post(http, path, **prompt, temperature=None, top_p=0.5)
    assert seen() == (0.6, 20, 0.5, 1.1, limit)


def test_a_short_max_new_tokens_holds_for_completions_too(tokenizer):
    engine = FakeEngine(tokenizer)
    engine.default_sampling = {"max_tokens": 3}
    with serving(lambda: engine) as server, httpx.Client(base_url=server.url) as http:
        assert post(http, prompt=[5])["usage"]["completion_tokens"] == 3
        assert post(http, CHAT, messages=HI, max_completion_tokens=9)["usage"]["completion_tokens"] == 9


def test_prompt_logprobs_of_a_chat_and_of_echo_are_complete(http):
    body = post(http, CHAT, messages=HI, max_tokens=1, prompt_logprobs=1)
    assert len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"] and body["prompt_logprobs"][0] is None
    echoed = post(http, prompt=[9, 8, 7], echo=True, logprobs=1, max_tokens=0)["choices"][0]["logprobs"]
    assert len(echoed["tokens"]) == 3 and echoed["token_logprobs"][0] is None and None not in echoed["token_logprobs"][1:]

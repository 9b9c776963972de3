"""The server over the real engine and the built-in model: one server for all tests of this file."""

from __future__ import annotations

import asyncio
import sys
import time

import httpx
import openai
import pytest
from conftest import CHECKPOINT
from serve_fakes import serving, wait_for
from test_completions import post, stream

from jaxkv.config import CacheConfig, EngineConfig, ModelConfig, SchedConfig
from jaxkv.runtime.startup import build_engine

CODE = "def add(first, second):\n    return first +"


@pytest.fixture(scope="module")
def real():
    config = EngineConfig(ModelConfig(str(CHECKPOINT), max_model_len=512), CacheConfig(kv_cache_memory=8 * 2**20,
                          host_kv_memory=4 * 2**20), SchedConfig(max_num_seqs=8, max_num_batched_tokens=128))
    with serving(lambda: build_engine(config)) as server:
        yield server


@pytest.fixture(scope="module")
def client(real):
    with openai.OpenAI(base_url=f"{real.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


@pytest.fixture(scope="module")
def http(real):
    with httpx.Client(base_url=real.url, timeout=120) as http:
        yield http


def free(real) -> int:
    return real.engine.metrics.running + real.engine.metrics.waiting


def test_text_and_stream_agree_and_the_second_turn_is_cached(http, tokenizer):
    whole = post(http, prompt=CODE * 8, temperature=0, max_tokens=24, ignore_eos=True, return_token_ids=True)
    choice = whole["choices"][0]
    events = stream(http, prompt=CODE * 8, temperature=0, max_tokens=24, ignore_eos=True, return_token_ids=True,
                    stream_options={"include_usage": True})
    assert sum((e["choices"][0]["token_ids"] for e in events[:-1]), []) == choice["token_ids"]
    assert "".join(e["choices"][0]["text"] for e in events[:-1]) == choice["text"]
    assert events[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == whole["usage"]["prompt_tokens"] - 1
    turn = choice["prompt_token_ids"] + choice["token_ids"] + tokenizer.encode("\n", add_special_tokens=False)
    usage = post(http, prompt=turn, max_tokens=1)["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] >= len(turn) - 3  # the last token was never computed


def test_cache_salt_shares_nothing(http):
    prompt = "A private prompt that nobody else shall time. " * 4
    cached = [post(http, prompt=prompt, max_tokens=1, cache_salt=salt)["usage"]["prompt_tokens_details"]["cached_tokens"]
              for salt in ("a", "b", "a")]
    assert cached[:2] == [0, 0] and cached[2] > 0


def test_echo_scores_equal_decode_scores(http):
    scored = post(http, prompt=CODE, temperature=0, max_tokens=10, logprobs=1, return_token_ids=True)["choices"][0]
    tokens = scored["prompt_token_ids"] + scored["token_ids"]
    for _ in range(2):  # the second time the prompt is cached
        echoed = post(http, prompt=tokens, max_tokens=0, echo=True, logprobs=1)["choices"][0]["logprobs"]
        assert len(echoed["tokens"]) == len(tokens) and echoed["token_logprobs"][0] is None
        tail = echoed["token_logprobs"][-len(scored["token_ids"]):]
        assert tail == pytest.approx(scored["logprobs"]["token_logprobs"], abs=2e-3)


def test_n_seed_and_sampling(client):
    ask = lambda seed: [c.text for c in client.completions.create(  # noqa: E731
        model=client.models.list().data[0].id, prompt=CODE, n=3, seed=seed, temperature=1.0, max_tokens=12).choices]
    first = ask(5)
    assert ask(5) == first and ask(6) != first and len(set(first)) > 1


def test_chat_stream(client):
    name = client.models.list().data[0].id
    messages = [{"role": "user", "content": "alpha -> red blue\nbeta -> green stone\nWhat is beta?"}]
    plain = client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=12)
    chunks = list(client.chat.completions.create(model=name, messages=messages, temperature=0, max_tokens=12,
                                                 stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == plain.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == plain.usage.completion_tokens


def test_stop_string(http):
    text = post(http, prompt=CODE, temperature=0, max_tokens=24, ignore_eos=True)["choices"][0]["text"]
    stop = text[len(text) // 2:][:5]
    cut = post(http, prompt=CODE, temperature=0, max_tokens=24, ignore_eos=True, stop=stop)["choices"][0]
    assert cut["text"] == text[:text.index(stop)] and cut["stop_reason"] == stop


def test_disconnect_frees_pages(http, real):
    pages = real.engine.metrics.device.pages_active
    for streaming in (False, True):
        with pytest.raises(httpx.TimeoutException):
            http.post("/v1/completions", json={"prompt": CODE, "max_tokens": 400, "ignore_eos": True, "n": 4,
                                               "stream": streaming}, timeout=0.3)
    wait_for(lambda: free(real) == 0)
    assert not real.engine.has_work and not real.loop.calls
    wait_for(lambda: real.engine.metrics.device.pages_active == pages)


def test_bad_input_leaves_the_engine_alone(http):
    for body in ({"prompt": [10**6]}, {"prompt": [1] * 600}, {"prompt": "x", "logit_bias": {"999999": 1}},
                 {"prompt": "x", "stop_token_ids": [999999]}, {"prompt": "x", "stop_token_ids": list(range(3, 99))}):
        response = http.post("/v1/completions", json=body)
        assert response.status_code == 400 and response.json()["error"]["param"] in body, response.text
    assert "compiles_after_start_total" in http.get("/metrics").text


def test_32_clients_get_what_one_gets(real):
    prompts = [f"class Item{i % 8}:\n    def __init__(self" for i in range(32)]

    async def one(client, prompt):
        answer = await client.completions.create(model=real.engine.model_name, prompt=prompt, max_tokens=16,
                                                 temperature=0, stream=True)
        return "".join([chunk.choices[0].text async for chunk in answer])

    async def main():
        async with openai.AsyncOpenAI(base_url=f"{real.url}/v1", api_key="x", max_retries=0) as client:
            alone = {p: await one(client, p) for p in set(prompts)}
            together = await asyncio.gather(*(one(client, p) for p in prompts))
            return sum(text != alone[p] for p, text in zip(prompts, together))

    assert asyncio.run(main()) <= 1  # a near tie may fall the other way in another batch shape
    assert free(real) == 0


def test_metrics_match_usage(http, real):
    before = real.engine.metrics.generation_tokens, real.engine.metrics.prompt_tokens
    usage = post(http, prompt=CODE, n=2, max_tokens=7, ignore_eos=True)["usage"]
    m = real.engine.metrics
    assert m.generation_tokens - before[0] == usage["completion_tokens"]
    assert m.prompt_tokens - before[1] == usage["prompt_tokens"]
    assert m.compiles_after_start == 0


def test_health_answers_while_a_huge_prompt_is_tokenised(real, http):
    async def main():
        async with httpx.AsyncClient(base_url=real.url, timeout=60) as http:
            huge = asyncio.create_task(http.post("/v1/completions", json={"prompt": "word é " * 100_000}))
            worst = 0.0
            while not huge.done():
                start = time.monotonic()
                assert (await http.get("/health")).status_code == 200
                worst = max(worst, time.monotonic() - start)
            assert (await huge).status_code == 400
            return worst

    print(f"slowest /health: {asyncio.run(main()) * 1e3:.0f} ms", file=sys.stderr)

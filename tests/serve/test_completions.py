"""/v1/completions against the fake engine: every field, streamed and not."""

import orjson
import pytest
from serve_fakes import REPLY

from jaxkv.serve import engine_loop
from jaxkv.serve.completions import CompletionForm


def stream(http, path="/v1/completions", **body):
    """Events of a stream, without the last [DONE]."""
    with http.stream("POST", path, json={"stream": True, **body}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [orjson.loads(line[6:]) for line in lines[:-1]]


def post(http, path="/v1/completions", **body):
    response = http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_plain_answer_and_usage(client, tokenizer):
    answer = client.completions.create(model="fake", prompt="Hello there", max_tokens=20)
    assert REPLY.startswith(answer.choices[0].text) and answer.choices[0].finish_reason == "length"
    assert answer.object == "text_completion" and answer.model == "fake" and answer.id.startswith("cmpl-")
    prompt = len(tokenizer.encode("Hello there"))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 20)
    assert answer.usage.total_tokens == prompt + 20
    assert answer.usage.prompt_tokens_details.cached_tokens == prompt // 2


def test_max_tokens_default_is_16(client):
    assert client.completions.create(model="fake", prompt="x").usage.completion_tokens == 16


def test_stream_is_the_same_text_without_broken_characters(client):
    plain = client.completions.create(model="fake", prompt="a", max_tokens=60).choices[0].text
    chunks = list(client.completions.create(model="fake", prompt="a", max_tokens=60, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == plain
    assert not any("\ufffd" in c.choices[0].text for c in chunks)
    assert [c.choices[0].finish_reason for c in chunks][-1] == "length"
    assert len({c.id for c in chunks}) == 1


def test_a_character_that_max_tokens_cuts_is_in_no_text(client, tokenizer):
    ids = tokenizer.encode(REPLY)
    cut = [n for n in range(1, len(ids)) if tokenizer.decode(ids[:n]).endswith("\ufffd")]
    assert len(cut) > 4
    for n in cut:
        for more in ({}, {"stop": ["never"]}):
            plain = client.completions.create(model="fake", prompt="a", max_tokens=n, **more)
            chunks = list(client.completions.create(model="fake", prompt="a", max_tokens=n, stream=True, **more))
            assert plain.choices[0].text == "".join(c.choices[0].text for c in chunks)
            assert plain.choices[0].text == tokenizer.decode(ids[:n]).removesuffix("\ufffd")
            assert plain.usage.completion_tokens == n


def test_stream_usage_only_when_asked(http):
    assert all("usage" not in event for event in stream(http, prompt="a"))
    events = stream(http, prompt="a", stream_options={"include_usage": True})
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 16
    every = stream(http, prompt=[5], ignore_eos=True, stream_options={"include_usage": True,
                                                                   "continuous_usage_stats": True})
    counts = [event["usage"]["completion_tokens"] for event in every]
    assert counts == sorted(counts) and counts[-1] == 16 and counts[0] < 16


@pytest.mark.parametrize(("prompt", "count"), [
    ("text", 1), (["one", "two", "three"], 3), ([5, 6, 7], 1), ([[5, 6], [7]], 2),
])
def test_prompt_shapes(http, prompt, count):
    whole = post(http, prompt=prompt, n=2, max_tokens=3)
    assert [c["index"] for c in whole["choices"]] == list(range(2 * count))
    assert whole["usage"]["completion_tokens"] == 6 * count
    events = stream(http, prompt=prompt, n=2, max_tokens=3)
    texts = ["".join(e["choices"][0]["text"] for e in events if e["choices"][0]["index"] == i)
             for i in range(2 * count)]
    assert texts == [c["text"] for c in whole["choices"]]


def test_prompt_counts_once_for_n(http):
    assert post(http, prompt=[5, 6, 7, 8], n=3)["usage"] == {
        "prompt_tokens": 4, "completion_tokens": 48, "total_tokens": 52, "prompt_tokens_details":
            {"cached_tokens": 2, "cached_tokens_by_tier": {"hbm": 2, "host": 0, "disk": 0}}}


def test_stop_string_across_tokens(http, tokenizer):
    stop = "on the m"
    assert all(stop not in tokenizer.decode([t]) for t in tokenizer.encode(REPLY))
    whole = post(http, prompt="a", max_tokens=60, stop=["never", stop])["choices"][0]
    assert whole["text"] == REPLY[:REPLY.index(stop)]
    assert (whole["finish_reason"], whole["stop_reason"]) == ("stop", stop)
    events = stream(http, prompt="a", max_tokens=60, stop=stop)
    assert "".join(e["choices"][0]["text"] for e in events) == whole["text"]
    kept = post(http, prompt="a", max_tokens=60, stop=stop, include_stop_str_in_output=True)["choices"][0]
    assert kept["text"] == whole["text"] + stop


def test_stop_token_ids(http, tokenizer):
    ids = tokenizer.encode(REPLY)
    choice = post(http, prompt="a", max_tokens=60, stop_token_ids=[ids[3]], return_token_ids=True)["choices"][0]
    assert choice["token_ids"] == ids[:ids.index(ids[3]) + 1] and choice["stop_reason"] == ids[3]


def test_return_token_ids(http, tokenizer):
    ids = tokenizer.encode(REPLY)[:10]
    choice = post(http, prompt=[5, 6], max_tokens=10, return_token_ids=True)["choices"][0]
    assert choice["token_ids"] == ids and choice["prompt_token_ids"] == [5, 6]
    events = stream(http, prompt=[5, 6], max_tokens=10, return_token_ids=True,
                    stream_options={"include_usage": True})
    choices = [e["choices"][0] for e in events[:-1]]
    assert [t for c in choices for t in c["token_ids"]] == ids
    assert choices[0]["prompt_token_ids"] == [5, 6] and "prompt_token_ids" not in choices[1]


def test_echo(http):
    assert post(http, prompt="Say: ", echo=True, max_tokens=4)["choices"][0]["text"].startswith("Say: The")
    assert post(http, prompt="Say: ", echo=True, max_tokens=0)["choices"][0]["text"] == "Say: "
    events = stream(http, prompt=["Say: ", "Do: "], echo=True, max_tokens=4)
    texts = ["".join(e["choices"][0]["text"] for e in events if e["choices"][0]["index"] == i) for i in (0, 1)]
    assert texts[0].startswith("Say: The") and texts[1].startswith("Do: The")


def test_logprobs(http, tokenizer):
    lp = post(http, prompt="a", max_tokens=30, logprobs=2)["choices"][0]["logprobs"]
    assert len(lp["tokens"]) == len(lp["token_logprobs"]) == len(lp["top_logprobs"]) == len(lp["text_offset"]) == 30
    assert lp["text_offset"] == sorted(lp["text_offset"]) and lp["text_offset"][0] == 0
    assert all(lp["tokens"][i] in lp["top_logprobs"][i] for i in range(30))
    events = stream(http, prompt="a", max_tokens=30, logprobs=2)
    parts = [e["choices"][0]["logprobs"] for e in events]
    for name in lp:
        assert [item for part in parts for item in part[name]] == lp[name]
    assert post(http, prompt="a", logprobs=0)["choices"][0]["logprobs"]["top_logprobs"] is None


def test_echo_logprobs_score_the_prompt(http, tokenizer):
    prompt = [9, 6, 7]
    for max_tokens, extra in ((0, 0), (2, 2)):
        lp = post(http, prompt=prompt, echo=True, max_tokens=max_tokens, logprobs=1)["choices"][0]["logprobs"]
        assert len(lp["tokens"]) == 3 + extra
        assert lp["token_logprobs"][:3] == [None, -9999.0, -0.5]  # the first has none; -inf is not JSON
        assert lp["top_logprobs"][0] is None


def test_prompt_logprobs(http):
    rows = post(http, prompt=[9, 6, 7], prompt_logprobs=1)["choices"][0]["prompt_logprobs"]
    assert rows[0] is None and rows[1]["6"]["rank"] == 1 and "decoded_token" in rows[2]["7"]


def test_every_answer_has_the_log_probabilities_of_its_prompt(http):
    ask = {"prompt": [[9, 6, 7], [5], [4, 8]], "n": 2, "echo": True, "logprobs": 1, "max_tokens": 2}
    choices = post(http, **ask, prompt_logprobs=1)["choices"]
    assert [len(c["logprobs"]["tokens"]) for c in choices] == [5, 5, 3, 3, 4, 4]
    assert [len(c["prompt_logprobs"]) for c in choices] == [3, 3, 1, 1, 2, 2]
    assert choices[0]["prompt_logprobs"] == choices[1]["prompt_logprobs"]
    parts = [event["choices"][0] for event in stream(http, **ask)]
    for choice in choices:
        own = [part["logprobs"] for part in parts if part["index"] == choice["index"]]
        assert {name: [item for part in own for item in part[name]] for name in own[0]} == choice["logprobs"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_fault_of_ours_is_not_the_clients(http, caplog, monkeypatch, streaming):
    def broken(form, choice, *_):
        raise ValueError("max_tokens is ours")

    monkeypatch.setattr(CompletionForm, "chunks" if streaming else "whole", broken)
    response = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, "stream": streaming})
    assert response.status_code == (200 if streaming else 500)
    error = orjson.loads(response.text.removeprefix("data: ").splitlines()[0])["error"]
    assert (error["code"], error["param"]) == ("internal_error", None)
    assert "max_tokens is ours" in caplog.text


def test_a_prompt_that_is_refused_later_is_the_clients(http, monkeypatch):
    monkeypatch.setattr(engine_loop, "ADD_TOKENS", 1)
    response = http.post("/v1/completions", json={"prompt": [[5, 6], [5000]]})
    assert response.status_code == 400 and response.json()["error"]["param"] == "prompt", response.text


def test_every_sampling_field_reaches_the_engine(http, fake):
    post(http, prompt="a", n=2, temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, repetition_penalty=1.1,
         presence_penalty=0.2, frequency_penalty=-0.3, logit_bias={"5": -100, "7": 3.5}, seed=-3, max_tokens=9,
         min_tokens=2, stop=["q"], stop_token_ids=[3], ignore_eos=True, skip_special_tokens=False,
         include_stop_str_in_output=True, logprobs=3, priority=-2, cache_salt="tenant", user="u", best_of=2,
         session_id="s", end_session=True, retention=60, no_store=True)
    request = fake.engine.requests[-1]
    p = request.params
    assert (p.n, p.temperature, p.top_p, p.top_k, p.min_p) == (2, 0.5, 0.9, 5, 0.1)
    assert (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) == (1.1, 0.2, -0.3)
    assert p.logit_bias == ((5, -100.0), (7, 3.5)) and (p.seed, p.max_tokens, p.min_tokens) == (-3, 9, 2)
    assert (p.stop, p.stop_token_ids, p.ignore_eos, p.logprobs) == (("q",), (3,), True, 3)
    assert not p.skip_special_tokens and p.include_stop_str_in_output
    assert (request.priority, request.namespace) == (-2, "tenant")
    assert (request.session_id, request.end_session, request.retention, request.no_store) == ("s", True, 60, True)


def test_seed_repeats(http):
    texts = [post(http, prompt="a", seed=s, max_tokens=12)["choices"][0]["text"] for s in (1, 1, 2)]
    assert texts[0] == texts[1]


def test_nulls_and_unknown_fields_are_ignored(http, caplog):
    for _ in range(2):
        post(http, prompt="a", stop=None, logprobs=None, suffix=None, stream_options=None, seed=None, made_up_field=1)
    assert sum("made_up_field" in record.message for record in caplog.records) <= 1


def test_long_prompt_of_text_is_encoded_off_the_event_loop(http):
    assert http.post("/v1/completions", json={"prompt": "word " * 20_000}).status_code == 400
    assert http.post("/v1/completions", json={"prompt": " " * 10_000, "max_tokens": 1}).status_code in (200, 400)

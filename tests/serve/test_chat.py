"""/v1/chat/completions against the fake engine."""

import openai
import pytest
from serve_fakes import REPLY
from test_completions import post, stream

PATH = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]


def prompt_text(http, fake, tokenizer, messages, **more):
    post(http, PATH, messages=messages, max_tokens=1, **more)
    return tokenizer.decode(fake.engine.requests[-1].prompt, skip_special_tokens=False)


def test_plain(client):
    answer = client.chat.completions.create(model="fake", messages=HI, max_completion_tokens=20)
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.role == "assistant" and REPLY.startswith(answer.choices[0].message.content)
    assert answer.usage.completion_tokens == 20 and answer.usage.prompt_tokens_details.cached_tokens > 0


def test_default_max_tokens_is_the_rest_of_the_window(client):
    usage = client.chat.completions.create(model="fake", messages=HI).usage
    assert usage.total_tokens == 256


def test_stream(client):
    plain = client.chat.completions.create(model="fake", messages=HI, max_tokens=40).choices[0].message.content
    chunks = list(client.chat.completions.create(model="fake", messages=HI, max_tokens=40, stream=True, n=2,
                                                 stream_options={"include_usage": True}))
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 80
    for i in (0, 1):
        mine = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == i]
        assert mine[0].delta.role == "assistant" and all(c.delta.role is None for c in mine[1:])
        assert "".join(c.delta.content or "" for c in mine) == plain
        assert [c.finish_reason for c in mine if c.finish_reason] == ["length"]
    assert all(c.object == "chat.completion.chunk" for c in chunks)


def test_template_is_the_models_and_bos_is_not_doubled(http, fake, tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "yes"}, {"role": "user", "content": "more"}]
    expected = tokenizer.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt_text(http, fake, tokenizer, messages) == expected
    ids = tokenizer.hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(fake.engine.requests[-1].prompt) == list(ids)
    assert not prompt_text(http, fake, tokenizer, messages, add_generation_prompt=False).endswith("assistant\n")


def test_content_parts_and_empty_assistant(http, fake, tokenizer):
    parts = [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
             {"role": "assistant", "content": None}, {"role": "user", "content": "x"}]
    assert "one\ntwo" in prompt_text(http, fake, tokenizer, parts)


def test_logprobs(client):
    answer = client.chat.completions.create(model="fake", messages=HI, max_tokens=30, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert len(content) == 30 and all(len(c.top_logprobs) == 2 for c in content)
    assert b"".join(bytes(c.bytes) for c in content).decode("utf-8", "ignore") == answer.choices[0].message.content
    assert any(c.token.startswith("bytes:") for c in content)  # parts of one character
    chunks = list(client.chat.completions.create(model="fake", messages=HI, max_tokens=30, logprobs=True, stream=True))
    streamed = [entry for c in chunks if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    assert [e.token for e in streamed] == [c.token for c in content] and not streamed[0].top_logprobs


def test_token_ids_and_prompt_logprobs(http, tokenizer):
    whole = post(http, PATH, messages=HI, max_tokens=8, return_token_ids=True, prompt_logprobs=0)
    assert len(whole["choices"][0]["token_ids"]) == 8
    assert len(whole["prompt_logprobs"]) == len(whole["prompt_token_ids"]) == whole["usage"]["prompt_tokens"]
    events = stream(http, PATH, messages=HI, max_tokens=8, return_token_ids=True)
    assert events[0]["prompt_token_ids"] == whole["prompt_token_ids"] and "prompt_token_ids" not in events[1]
    ids = [t for e in events for t in e["choices"][0].get("token_ids", [])]
    assert ids == whole["choices"][0]["token_ids"]


def test_stop(client):
    choice = client.chat.completions.create(model="fake", messages=HI, stop=["sat on"]).choices[0]
    assert choice.finish_reason == "stop" and choice.message.content == REPLY[:REPLY.index("sat on")]


def test_inert_openai_fields_are_accepted(http):
    post(http, PATH, messages=HI, max_tokens=1, user="me", store=False, metadata={}, tools=[], tool_choice="none",
         response_format={"type": "text"}, modalities=["text"], service_tier="auto", chat_template_kwargs={"x": True})


def test_errors_reach_the_client_as_its_exceptions(client):
    with pytest.raises(openai.BadRequestError, match="tools"):
        tool = {"type": "function", "function": {"name": "f"}}
        client.chat.completions.create(model="fake", messages=HI, tools=[tool])
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=HI)

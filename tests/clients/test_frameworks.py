"""langchain-openai and litellm, as their users call them."""

import asyncio
import importlib
import importlib.util
import os

import pytest

pytestmark = [  # what their dependencies warn of is not ours to mend
    pytest.mark.filterwarnings("ignore"),
    *(pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed: extra clients")
      for name in ("langchain_openai", "litellm"))]
QUESTION = "alpha -> red blue\nbeta -> green stone\nWhat is beta?"


@pytest.fixture(scope="module")
def chat_model(server):
    langchain = importlib.import_module("langchain_openai")
    return langchain.ChatOpenAI(model=server.model, base_url=server.url, api_key=server.key, temperature=0, max_tokens=12,
                                max_retries=0, stream_usage=True)


def test_langchain_chat(chat_model):
    whole = chat_model.invoke([("system", "Be brief."), ("human", QUESTION)])
    parts = list(chat_model.stream([("system", "Be brief."), ("human", QUESTION)]))
    assert "".join(part.content for part in parts) == whole.content != ""
    streamed = [part.usage_metadata for part in parts if part.usage_metadata]
    assert len(streamed) == 1 and streamed[0]["output_tokens"] == whole.usage_metadata["output_tokens"] > 0
    assert streamed[0]["input_token_details"]["cache_read"] > 0, "the prompt was cached by then"


def test_langchain_batch_and_async(chat_model):
    answers = chat_model.batch([QUESTION] * 4)
    again = asyncio.run(chat_model.ainvoke(QUESTION))
    assert {answer.content for answer in answers} == {again.content}


def test_langchain_logprobs_stop_and_errors(chat_model):
    answer = chat_model.bind(logprobs=True, top_logprobs=3).invoke(QUESTION)
    content = answer.response_metadata["logprobs"]["content"]
    assert len(content) == answer.usage_metadata["output_tokens"] and len(content[0]["top_logprobs"]) == 3
    word = answer.content.split()[1]
    stopped = chat_model.bind(stop=[word]).invoke(QUESTION)
    assert stopped.content == answer.content.split(word)[0] and stopped.response_metadata["finish_reason"] == "stop"
    with pytest.raises(Exception, match="temperature must be in"):
        chat_model.bind(temperature=-1).invoke(QUESTION)


def test_langchain_completion(server):
    langchain = importlib.import_module("langchain_openai")
    model = langchain.OpenAI(model=server.model, base_url=server.url, api_key=server.key, temperature=0, max_tokens=8,
                             max_retries=0)
    prompt = "def add(a, b):\n    return"
    assert "".join(model.stream(prompt)) == model.invoke(prompt) != ""


@pytest.fixture(scope="module")
def litellm():
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would ask the network for prices
    module = importlib.import_module("litellm")
    module.telemetry = False
    return module


def test_litellm(litellm, server):
    settings = {"api_base": server.url, "api_key": server.key, "temperature": 0, "max_tokens": 12, "num_retries": 0}
    messages = [{"role": "user", "content": QUESTION}]
    whole = litellm.completion(f"openai/{server.model}", messages, **settings)
    parts = list(litellm.completion(f"openai/{server.model}", messages, stream=True, stream_options={"include_usage": True},
                                    **settings))
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content != ""
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens
    again = asyncio.run(litellm.acompletion(f"openai/{server.model}", messages, **settings))
    assert again.choices[0].message.content == text
    plain = litellm.text_completion("def add(a, b):\n    return", f"text-completion-openai/{server.model}", **settings)
    assert plain.choices[0].text and plain.usage.completion_tokens == 12


def test_litellm_knows_our_errors(litellm, server):
    ask = lambda **changes: litellm.completion(  # noqa: E731
        **{"model": f"openai/{server.model}", "messages": [{"role": "user", "content": "x"}], "api_base": server.url,
           "api_key": server.key, "num_retries": 0, "max_tokens": 4} | changes)
    with pytest.raises(litellm.BadRequestError):
        ask(temperature=-1)
    with pytest.raises(litellm.NotFoundError):
        ask(model="openai/other")
    with pytest.raises(litellm.AuthenticationError):
        ask(api_key="wrong")
    with pytest.raises(litellm.ContextWindowExceededError):
        ask(messages=[{"role": "user", "content": "word " * 600}])

"""Structured output over HTTP, with the built-in model and the openai client: whatever ends by itself is valid."""

import asyncio
import enum
import json
import re
import time
from typing import Literal

import httpx
import jsonschema
import openai
import pydantic
import pytest
from serve_fakes import serving

from jaxkv.cli import engine_config
from jaxkv.runtime.startup import build_engine
from jaxkv.serve.dialect import ChatOptions

MODEL = "jaxkv-tiny"
CODE = "def add(first, second):\n    return first +"
ITEM = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "size": {"enum": ["S", "M", "L"]},
                                         "price": {"type": "number", "minimum": 0, "exclusiveMaximum": 1000}},
        "required": ["name", "size", "price"], "additionalProperties": False}
SCHEMAS = {
    "object": ITEM,
    "array": {"type": "array", "items": ITEM, "minItems": 1, "maxItems": 2},
    "recursive": {"$defs": {"node": {"type": "object", "properties": {
        "value": {"type": "boolean"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
        "required": ["value", "next"], "additionalProperties": False}}, "$ref": "#/$defs/node"},
    "pattern": {"type": "object", "properties": {"id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
                                                 "day": {"type": "string", "format": "date"}}, "required": ["id", "day"]},
    "union": {"anyOf": [{"type": "integer", "minimum": 10, "maximum": 99}, {"type": "string", "maxLength": 5},
                        {"const": {"x": [None, True]}}]},
    "tagged": {"$defs": {kind: {"type": "object", "properties": {"kind": {"const": kind}, "size": {"enum": [1, 2]}},
                                "required": ["kind", "size"], "additionalProperties": False} for kind in ("box", "bag")},
               "type": "array", "minItems": 1, "maxItems": 2,
               "items": {"oneOf": [{"$ref": "#/$defs/box"}, {"$ref": "#/$defs/bag"}]}},
    "names of special tokens": {"type": "object", "properties": {"size": {"enum": [1, 2]}, "end": {"const": "<|im_end|>"}},
                                "required": ["size", "end"], "additionalProperties": False},
}


@pytest.fixture(scope="module")
def server():
    config = engine_config({"max_model_len": 512, "max_num_seqs": 8, "max_num_batched_tokens": 128, "kv_cache_memory": "8M",
                            "host_kv_memory": 0})
    with serving(lambda: build_engine(config), start_seconds=280, chat=ChatOptions(tool_parser="hermes")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as http:
        yield http


def complete(http, **fields):
    response = http.post("/v1/completions", json={"prompt": CODE, "max_tokens": 150, **fields})
    assert response.status_code == 200, response.text
    return response.json()["choices"]


@pytest.mark.parametrize("name", list(SCHEMAS))
def test_what_ends_by_itself_is_valid(http, name):
    schema, ended = SCHEMAS[name], 0
    for fields in ({"temperature": 0}, {"temperature": 1.5, "n": 4, "seed": 1}, {"temperature": 1, "top_p": 0.5, "n": 2}):
        form = {"type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": schema}}
        for choice in complete(http, response_format=form, **fields):
            if choice["finish_reason"] == "stop":
                jsonschema.validate(json.loads(choice["text"]), schema)
                ended += 1
    assert ended >= 3


def test_every_field_in_every_spelling(http):
    pattern, words, grammar = "[a-c]{3}-[0-9]{2,4}", ["red", "green", "a \"quoted\" é"], 'root ::= "<" [a-z]+ ">"'
    for field in ({"structured_outputs": {"regex": pattern}}, {"guided_regex": pattern}):
        assert all(re.fullmatch(pattern, c["text"]) for c in complete(http, n=3, temperature=1.5, **field))
    for field in ({"structured_outputs": {"choice": words}}, {"guided_choice": words}):
        assert all(c["text"] in words for c in complete(http, n=3, temperature=1.5, **field))
    for field in ({"structured_outputs": {"grammar": grammar}}, {"guided_grammar": grammar}):
        for choice in complete(http, temperature=1.5, **field):
            assert re.fullmatch("<[a-z]+>", choice["text"]) or choice["finish_reason"] == "length"
    for field in ({"structured_outputs": {"json": ITEM}}, {"guided_json": ITEM}, {"guided_json": json.dumps(ITEM)}):
        for choice in complete(http, temperature=1.5, seed=2, n=2, **field):
            if choice["finish_reason"] == "stop":
                jsonschema.validate(json.loads(choice["text"]), ITEM)
    for field in ({"structured_outputs": {"json_object": True}}, {"response_format": {"type": "json_object"}}):
        choice, = complete(http, temperature=0, **field)
        assert choice["finish_reason"] == "length" or isinstance(json.loads(choice["text"]), dict)
    assert complete(http, response_format={"type": "text"}, temperature=0) == complete(http, temperature=0)


def test_the_openai_client_parses(client):
    class Size(enum.Enum):
        SMALL = "small"
        LARGE = "large"

    class Answer(pydantic.BaseModel):
        size: Size
        count: int = pydantic.Field(ge=0, le=99)

    messages = [{"role": "user", "content": "How many?"}]
    answer = client.chat.completions.parse(model=MODEL, messages=messages, response_format=Answer, temperature=0,
                                           max_tokens=200)
    assert isinstance(answer.choices[0].message.parsed, Answer) and answer.choices[0].finish_reason == "stop"
    with client.chat.completions.stream(model=MODEL, messages=messages, response_format=Answer, temperature=0,
                                        max_tokens=200) as events:
        streamed = "".join(event.delta for event in events if event.type == "content.delta")
        assert events.get_final_completion().choices[0].message.parsed == answer.choices[0].message.parsed
    assert streamed == answer.choices[0].message.content


def test_a_format_beside_tools_gives_calls_or_content(client, tokenizer):
    class Answer(pydantic.BaseModel):
        size: Literal["small", "large"]

    form = {"type": "json_schema", "json_schema": {"name": "it", "schema": Answer.model_json_schema()}}
    zone = {"type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"],
            "additionalProperties": False}
    tool = {"type": "function", "function": {"name": "clock", "parameters": zone}}
    ask = {"model": MODEL, "messages": [{"role": "user", "content": "When?"}], "tools": [tool], "response_format": form, "n": 4,
           "temperature": 1.5, "max_tokens": 120, "seed": 1, "parallel_tool_calls": False}
    for first, finish in (("{", "stop"), ("<", "tool_calls")):
        token, = tokenizer.encode(first, add_special_tokens=False)
        choices = client.chat.completions.create(**ask, logit_bias={str(token): 100}).choices
        ended = [choice.message for choice in choices if choice.finish_reason != "length"]
        assert ended and {choice.finish_reason for choice in choices} <= {finish, "length"}
        for message in ended:
            if finish == "stop":
                assert message.tool_calls is None and Answer.model_validate_json(message.content)
            else:
                assert message.content is None
                assert all(json.loads(call.function.arguments)["zone"] in ("UTC", "CET") for call in message.tool_calls)


def test_calls_through_the_responses_api(client):
    tool = {"type": "function", "name": "resize", "strict": True, "parameters": {
        "type": "object", "properties": {"size": {"enum": ["S", "M"]}}, "required": ["size"], "additionalProperties": False}}
    ask = {"model": MODEL, "input": "Smaller?", "tools": [tool], "tool_choice": "required", "temperature": 0,
           "parallel_tool_calls": False, "max_output_tokens": 150}
    plain = client.responses.create(**ask)
    call, = plain.output
    assert (plain.status, call.name) == ("completed", "resize") and json.loads(call.arguments)["size"] in "SM"
    with client.responses.stream(**ask) as events:
        streamed = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
        final = events.get_final_response().output[0]
    assert streamed == final.arguments == call.arguments and final.parsed_arguments == json.loads(call.arguments)


def test_stop_strings_logprobs_and_usage(http):
    body = {"prompt": CODE, "max_tokens": 60, "temperature": 0, "guided_regex": "[a-z]{4}[0-9]{4}", "logprobs": 1,
            "return_token_ids": True}
    whole = http.post("/v1/completions", json=body).json()
    choice = whole["choices"][0]
    assert re.fullmatch(body["guided_regex"], choice["text"]) and choice["finish_reason"] == "stop"
    assert len(choice["logprobs"]["token_logprobs"]) == len(choice["token_ids"]) == whole["usage"]["completion_tokens"]
    assert all(value <= 0 for value in choice["logprobs"]["token_logprobs"])
    cut = http.post("/v1/completions", json=body | {"stop": choice["text"][3:5]}).json()["choices"][0]
    assert cut["text"] == choice["text"][:3] and cut["stop_reason"] == choice["text"][3:5]


def test_free_requests_beside_structured_ones_get_what_they_get_alone(server):
    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            async def one(i, **extra):
                answer = await client.completions.create(model=MODEL, prompt=f"class Item{i}:\n    def", max_tokens=24,
                                                         temperature=0, extra_body=extra)
                return answer.choices[0].text

            alone = [await one(i) for i in range(4)]
            held = [await one(i, guided_regex=f"[a-z]{{8}}-{i}") for i in range(4)]
            mixed = await asyncio.gather(*(f for i in range(4) for f in (one(i), one(i, guided_regex=f"[a-z]{{8}}-{i}"))))
            return alone, held, mixed

    alone, held, mixed = asyncio.run(main())
    assert all(re.fullmatch(f"[a-z]{{8}}-{i}", text) for i, text in enumerate(held))
    assert sum(a != b for a, b in zip(mixed, [text for pair in zip(alone, held) for text in pair])) <= 1, "but for a near tie"


def test_an_error_comes_before_the_stream_and_the_same_grammar_is_compiled_once(http, server):
    for stream in (False, True):
        error = http.post("/v1/completions", json={"prompt": "x", "guided_regex": "(a", "stream": stream})
        assert error.status_code == 400 and error.json()["error"]["param"] == "guided_regex"
        assert "unclosed" in error.json()["error"]["message"]
    before = server.engine.grammars.compiled
    for _ in range(3):
        complete(http, guided_regex="once{3}")
    assert server.engine.grammars.compiled == before + 1


def test_health_answers_while_a_grammar_is_hopeless(server):
    """Cut by the time limit; the engine goes on with other requests meanwhile, structured ones too."""
    hopeless = "start: T\nT: " + " & ".join(f"/(.*[a-{chr(98 + i % 24)}]){{{i % 7 + 1}}}.*x/" for i in range(300)) + "\n"

    async def main():
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
            task = asyncio.create_task(http.post("/v1/completions", json={"prompt": "x", "guided_grammar": hopeless}))
            worst, rounds = 0.0, 0
            while not task.done():
                start = time.monotonic()
                assert (await http.get("/health")).status_code == 200
                worst = max(worst, time.monotonic() - start)
                answer = await http.post("/v1/completions", json={"prompt": "x", "max_tokens": 4, "guided_regex": "ab"})
                assert answer.json()["choices"][0]["text"] == "ab"
                rounds += 1
            return (await task), worst, rounds

    refusal, worst, rounds = asyncio.run(main())
    assert refusal.status_code == 400 and "longer than" in refusal.json()["error"]["message"]
    assert refusal.json()["error"]["param"] == "guided_grammar"
    assert worst < 1 and rounds > 20

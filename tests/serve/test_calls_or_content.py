"""A response format beside tools: whatever the grammar lets through is read as valid calls or as valid content."""

import json
import random

import httpx
import jsonschema
import llguidance
import pytest
from serve_fakes import ScriptedEngine, serving
from test_bad_input import refused
from test_completions import post, stream

from jaxkv.params import Structured
from jaxkv.runtime.structured.grammar import grammar_of, make_matcher
from jaxkv.runtime.tokenizer import Tokenizer, load_tokenizer
from jaxkv.serve.dialect import ChatOptions
from jaxkv.serve.parsers import TOOL_PARSERS
from jaxkv.serve.parsers.forced import CallsOrContent
from jaxkv.serve.parsers.message import MessageReader, joined
from jaxkv.serve.parsers.reasoning import ThinkParser
from jaxkv.serve.thinking import after_reasoning, token_of
from jaxkv.serve.tools import Tool, tool_use_of

FORMATS = ("hermes", "llama3_json", "mistral")
TOOLS = {"paint": {"type": "object", "properties": {"colour": {"$ref": "#/$defs/C"}, "n": {"enum": [1, 2]}},
                   "required": ["colour"], "additionalProperties": False, "$defs": {"C": {"enum": ["red", "a \"b\"]}"]}}},
         "stop": {"type": "object", "properties": {}, "additionalProperties": False}}
SCHEMA = {"type": "object", "properties": {"answer": {"enum": ["yes", "<no>"]}}, "required": ["answer"],
          "additionalProperties": False}
FORM = {"type": "json_schema", "json_schema": {"name": "it", "schema": SCHEMA}}
HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "paint", "parameters": TOOLS["paint"]}}


@pytest.fixture(scope="module", params=["markers are tokens", "markers are text"])
def model(request, tokenizer):
    """A tokenizer and llguidance's view of it."""
    if request.param == "markers are tokens":
        hf = load_tokenizer(tokenizer.hf.name_or_path).hf
        markers = {m for name in FORMATS for m in TOOL_PARSERS[name].markers} | {"[ARGS]"}
        hf.add_special_tokens({"additional_special_tokens": sorted(markers)})
        hf.add_tokens(["<think>", "</think>"])
        tokenizer = Tokenizer(hf)
    return tokenizer, llguidance.LLTokenizer(tokenizer.to_json(), eos_token=2)


def grammar(name, tokenizer, inside=None, many=True, structured=None):
    calls = TOOL_PARSERS[name].grammar(TOOLS, many, lambda marker: token_of(marker, tokenizer))
    return after_reasoning(structured or Structured("json_schema", json.dumps(SCHEMA)), inside, tokenizer, calls).value


def drawn(model, grammar, seed):
    """Token ids of a text that the grammar allows, a random way through it; None for one that does not end."""
    tokenizer, known = model
    matcher, draw, ids = make_matcher(known, grammar), random.Random(seed), []
    while len(ids) < 400:
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [i for i in range(mask.bit_length()) if mask >> i & 1]
        assert allowed
        end = [i for i in allowed if i == 2]
        token = end[0] if end and draw.random() < 0.15 else draw.choice(allowed)
        if token == 2:
            return ids
        assert matcher.consume_token(token)
        ids.append(token)
    return None


@pytest.mark.parametrize("name", FORMATS)
def test_what_the_grammar_lets_through_is_calls_or_content(model, name):
    tokenizer, seen = model[0], []
    for seed in range(40):
        many = bool(seed % 2)
        ids = drawn(model, grammar(name, tokenizer, many=many), seed)
        if ids is None:
            continue
        reader = MessageReader(None, CallsOrContent(TOOL_PARSERS[name](), TOOLS), True)
        parts = reader.feed(tokenizer.decode(ids, skip_special_tokens=False), True)
        assert bool(parts.calls) != bool(parts.content.strip()) and (many or len(parts.calls) < 2)
        for call in parts.calls:
            jsonschema.validate(json.loads(call.arguments), TOOLS[call.name])
        if not parts.calls:
            jsonschema.validate(json.loads(parts.content), SCHEMA)
        seen.append(len(parts.calls))
    assert {0, 1} <= set(seen) and max(seen) > 1


@pytest.mark.parametrize(("name", "good", "bad"), [
    ("hermes", '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>', '<tool_call>\n{"name": "halt"'),
    ("llama3_json", '{"name": "paint", "parameters": {"colour": "red"}}', '{"name": "paint", "arguments"'),
    ("mistral", '[TOOL_CALLS][{"name": "stop", "arguments": {}}]', '[TOOL_CALLS][]'),
    ("mistral", '[TOOL_CALLS]paint[ARGS]{"colour": "red", "n": 2}', '[TOOL_CALLS]paint[ARGS]{"n"'),
])
@pytest.mark.parametrize("inside", [None, False, True])
def test_what_a_model_writes(model, name, good, bad, inside):
    tokenizer, known = model

    def takes(text):
        matcher = make_matcher(known, grammar(name, tokenizer, inside))
        ids = tokenizer.encode(text, add_special_tokens=False)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    thought = "" if inside is None else "hm</think>\n\n" if inside else "<think>hm</think>\n\n"
    assert takes(thought + good) and takes(thought + '{"answer": "yes"}')
    assert not takes(thought + bad) and not takes(f"{thought}So: {good}") and not takes(thought + '{"answer": "no"}')
    assert takes(good) is (not inside)
    reader = MessageReader(None if inside is None else ThinkParser(inside), TOOL_PARSERS[name]())
    assert len(reader.feed(thought + good, True).calls) == 1


TREE = {"type": "object", "properties": {"n": {"type": "integer"}, "m": {"$ref": "#/properties/n"},
                                         "kids": {"type": "array", "items": {"$ref": "#"}}, "twin": {"$ref": "#/$defs/T"}},
        "required": ["n"], "additionalProperties": False, "$defs": {"T": {"$ref": "#"}}}


@pytest.mark.parametrize("name", [*FORMATS, "required"])
def test_references_of_arguments_follow_them(model, name):
    tokenizer, known = model
    if name == "required":
        tools = [Tool.model_validate({"type": "function", "function": {"name": "tree", "parameters": TREE}})]
        rules, form = grammar_of(tool_use_of(tools, name, None).grammar()), '[{"name": "tree", "parameters": %s}]'
    else:
        rules = "start: calls\n" + TOOL_PARSERS[name].grammar({"tree": TREE}, False, lambda marker: token_of(marker, tokenizer))
        form = {"hermes": '<tool_call>{"name": "tree", "arguments": %s}</tool_call>', "mistral":
                '[TOOL_CALLS][{"name": "tree", "arguments": %s}]', "llama3_json": '{"name": "tree", "parameters": %s}'}[name]
    for good in (True, False):
        leaf = {"n": 1} if good else {"name": "tree", "arguments": {"n": 1}, "parameters": {"n": 1}}
        for tree in ({"n": 2, "m": 1, "kids": [leaf]}, {"n": 2, "twin": {"n": 3, "kids": [leaf]}}):
            matcher, ids = make_matcher(known, rules), tokenizer.encode(form % json.dumps(tree), add_special_tokens=False)
            assert (matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()) == good


def test_other_kinds_of_content(model):
    tokenizer, known = model
    for structured, text in ((Structured("regex", "[a-z<]+"), "a<b"), (Structured("choice", '["<tool_x", "no"]'), "<tool_x"),
                             (Structured("json_object"), '{"a": [1]}')):
        for content in (text, '<tool_call>\n{"name": "stop", "arguments": {}}\n</tool_call>'):
            matcher = make_matcher(known, grammar("hermes", tokenizer, structured=structured))
            ids = tokenizer.encode(content, add_special_tokens=False)
            assert matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting(), content
    with pytest.raises(ValueError, match="part of another"):
        grammar("hermes", tokenizer, structured=Structured("grammar", "start: /a/"))


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=20) as http:
        yield http


MARKED = "[TOOL_CALLS]paint{<|python_tag|>} <tool_call>{}</tool_call>"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("size", [1, 3, 1000])
def test_markers_within_content_are_content(name, size):
    for text in (json.dumps({"answer": MARKED}), f" So: {MARKED}", '{"name": "Bob", "parameters": {}}', "<", "[TOOL"):
        reader = MessageReader(None, CallsOrContent(TOOL_PARSERS[name](), TOOLS))
        pieces = [reader.feed(text[i : i + size], i + size >= len(text)) for i in range(0, len(text), size)]
        assert joined(pieces).content == text and not reader.called


def test_content_with_markers_over_http(tokenizer):
    text = json.dumps({"answer": MARKED})
    with serving(lambda: ScriptedEngine(tokenizer, max_model_len=1024), chat=ChatOptions(tool_parser="mistral")) as other, \
            httpx.Client(base_url=other.url, timeout=20) as http:
        other.engine.script = text
        ask = {"messages": HI, "tools": [TOOL], "response_format": FORM}
        message = post(http, "/v1/chat/completions", **ask)["choices"][0]["message"]
        assert message["content"] == text and "tool_calls" not in message
        chunks = stream(http, "/v1/chat/completions", **ask)
        assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == text


def test_over_http(http, server):
    path, ask = "/v1/chat/completions", {"messages": HI, "tools": [TOOL], "response_format": FORM}
    server.engine.script = '{"answer": "yes"}'
    assert post(http, path, **ask)["choices"][0]["message"]["content"] == '{"answer": "yes"}'
    structured = server.engine.requests[-1].params.structured
    assert structured.kind == "grammar" and "calls: tagged" in structured.value and "tagged)*" in structured.value
    server.engine.script = '<tool_call>\n{"name": "paint", "arguments": {"colour": "red"}}\n</tool_call>'
    message = post(http, path, **ask, parallel_tool_calls=False)["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["arguments"] == '{"colour": "red"}' and message["content"] is None
    assert "tagged)*" not in server.engine.requests[-1].params.structured.value
    tool = {"type": "function", **TOOL["function"]}
    text = {"format": {"type": "json_schema", "name": "it", "schema": SCHEMA}}
    body = post(http, "/v1/responses", input="hi", tools=[tool], text=text)
    assert [item["type"] for item in body["output"]] == ["function_call"]
    assert server.engine.requests[-1].params.structured == structured


def test_a_forced_call_has_no_content_to_format(http, server):
    path, ask = "/v1/chat/completions", {"messages": HI, "tools": [TOOL], "tool_choice": "required"}
    server.engine.script = '[{"name": "paint", "parameters": {"colour": "red"}}]'
    forced = post(http, path, **ask) and server.engine.requests[-1].params.structured
    assert post(http, path, **ask, response_format=FORM)["choices"][0]["message"]["tool_calls"]
    assert server.engine.requests[-1].params.structured == forced
    refused(http.post(path, json={**ask, "guided_regex": "a"}), param="tool_choice")


def test_refusals(http, server, tokenizer):
    path, ask = "/v1/chat/completions", {"messages": HI, "tools": [TOOL]}
    assert "part of another" in refused(http.post(path, json={**ask, "guided_grammar": "start: /a/"}), param="guided_grammar")
    odd = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "x"}}}}}
    for url, more, param in ((path, {"messages": HI, "response_format": FORM, "tools": [odd]}, "response_format.json_schema"),
                             ("/v1/responses", {"input": "hi", "text": {"format": {"type": "json_object"}},
                                                "tools": [{"type": "function", **odd["function"]}]}, "text")):
        assert "calls of tools" in refused(http.post(url, json=more), param=param)
    with serving(lambda: ScriptedEngine(tokenizer), chat=ChatOptions(tool_parser="pythonic")) as other:
        message = refused(httpx.post(other.url + path, json={**ask, "response_format": FORM}), param="tool_choice")
    assert "response_format" in message and "pythonic" in message

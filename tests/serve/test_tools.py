"""Tools and reasoning over HTTP: a scripted engine behind the real server, read by the openai client."""

import json

import openai
import pytest
from chat_templates import R1
from serve_fakes import ScriptedEngine, serving
from test_bad_input import refused
from test_completions import post, stream

from jaxkv.runtime.tokenizer import Tokenizer, load_tokenizer
from jaxkv.serve.dialect import ChatOptions
from jaxkv.serve.tools import MAX_TOOL_BYTES, MAX_TOOLS, Tool, tool_use_of

PATH = "/v1/chat/completions"
HI = [{"role": "user", "content": "hi"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "", "parameters": CITY}}
CLOCK = {"type": "function", "function": {"name": "clock"}}
ONE = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Kö\\"ln 日本 {}"}}\n</tool_call>'
TWO = 'I look. \n' + ONE + '\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
NO_THINKING = {"chat_template_kwargs": {"enable_thinking": False}}
ARGUMENTS = '{"city": "Kö\\"ln 日本 {}"}'


@pytest.fixture
def ask(server):
    """Asks the server, whose model says the script, through the openai client."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        def create(script, **more):
            server.engine.script = script
            return client.chat.completions.create(model="fake", messages=more.pop("messages", HI), **more)
        yield create


def joined(chunks):
    """Message and finish reason of a stream, put together as clients do it."""
    message = {"content": "", "reasoning": "", "calls": []}
    finish = None
    for chunk in chunks:
        delta, finish = chunk.choices[0].delta, chunk.choices[0].finish_reason or finish
        message["content"] += delta.content or ""
        message["reasoning"] += getattr(delta, "reasoning_content", None) or ""
        for call in delta.tool_calls or []:
            if call.id is not None:
                assert call.index == len(message["calls"]) and call.type == "function" and call.function.name
                message["calls"].append([call.id, call.function.name, ""])
            else:
                assert call.type is None and call.function.name is None and call.function.arguments
            message["calls"][call.index][2] += call.function.arguments
    return message, finish


@pytest.mark.parametrize(("parallel", "script", "content", "calls"), [
    (None, ONE, None, [("get_weather", ARGUMENTS)]),
    (None, TWO, "I look. \n", [("get_weather", ARGUMENTS), ("clock", "{}")]),
    (False, TWO, "I look. \n", [("get_weather", ARGUMENTS)]),
    (None, "Just text < here.", "Just text < here.", []),
    (None, "<tool_call>garbage</tool_call>", "<tool_call>garbage</tool_call>", []),
])
def test_auto(ask, parallel, script, content, calls):
    more = {"tools": [WEATHER, CLOCK]} | ({} if parallel is None else {"parallel_tool_calls": parallel})
    choice = ask(script, **more).choices[0]
    assert choice.message.content == content and choice.finish_reason == ("tool_calls" if calls else "stop")
    found = choice.message.tool_calls or []
    assert [(call.function.name, call.function.arguments) for call in found] == calls
    assert all(call.type == "function" and call.id.startswith("call_") for call in found)
    assert len({call.id for call in found}) == len(found)

    message, finish = joined(ask(script, stream=True, **more))
    assert message["content"] == (content or "") and finish == choice.finish_reason
    assert [(name, arguments) for _, name, arguments in message["calls"]] == calls


def test_arguments_are_streamed_in_pieces(ask):
    chunks = [c for c in ask(ONE, tools=[WEATHER], stream=True) if c.choices[0].delta.tool_calls]
    assert len(chunks) > 5


def test_an_answer_that_is_cut_off(ask):
    choice = ask(ONE, tools=[WEATHER], max_tokens=30).choices[0]
    call = choice.message.tool_calls[0].function
    assert choice.finish_reason == "length" and ARGUMENTS.startswith(call.arguments) and call.arguments != ARGUMENTS


def test_n_answers_have_their_own_calls(ask):
    chunks = list(ask(ONE, tools=[WEATHER], stream=True, n=2))
    for i in (0, 1):
        message, finish = joined(c for c in chunks if c.choices[0].index == i)
        assert message["calls"][0][2] == ARGUMENTS and finish == "tool_calls"


def test_none_leaves_the_text_alone(ask, server):
    choice = ask(ONE, tools=[WEATHER], tool_choice="none").choices[0]
    assert choice.message.content == ONE and choice.message.tool_calls is None and choice.finish_reason == "stop"
    prompt = server.engine.tokenizer.decode(server.engine.requests[-1].prompt)
    assert "<tools>" in prompt  # as in vLLM: the model knows of them


def test_required(ask, server):
    script = f'[{{"name": "get_weather", "parameters": {ARGUMENTS}}}, {{"name": "clock", "parameters": {{}}}}]'
    choice = ask(script, tools=[WEATHER, CLOCK], tool_choice="required").choices[0]
    assert [call.function.name for call in choice.message.tool_calls] == ["get_weather", "clock"]
    assert choice.message.tool_calls[0].function.arguments == ARGUMENTS
    assert choice.message.content is None and choice.finish_reason == "tool_calls"
    message, _ = joined(ask(script, tools=[WEATHER, CLOCK], tool_choice="required", stream=True, parallel_tool_calls=False,
                            extra_body=NO_THINKING))
    assert [call[1:] for call in message["calls"]] == [["get_weather", ARGUMENTS]]
    grammar = server.engine.requests[-1].params.structured
    schema = json.loads(grammar.value)
    assert grammar.kind == "json_schema" and (schema["type"], schema["minItems"], schema["maxItems"]) == ("array", 1, 1)
    assert schema["items"]["anyOf"][0]["properties"] == {"name": {"const": "get_weather"}, "parameters": CITY}


def test_named(ask, server):
    named = {"type": "function", "function": {"name": "get_weather"}}
    choice = ask(ARGUMENTS, tools=[CLOCK, WEATHER], tool_choice=named, extra_body=NO_THINKING).choices[0]
    call = choice.message.tool_calls[0].function
    assert (call.name, call.arguments, choice.finish_reason) == ("get_weather", ARGUMENTS, "stop")
    assert json.loads(server.engine.requests[-1].params.structured.value) == CITY
    message, finish = joined(ask(ARGUMENTS, tools=[WEATHER], tool_choice=named, stream=True))
    assert [call[1:] for call in message["calls"]] == [["get_weather", ARGUMENTS]] and finish == "stop"


def test_reasoning_then_a_call(ask):
    script = f"<think>\nWhat <tool_call> is\nthis?\n</think>\n\n{ONE}"
    message = ask(script, tools=[WEATHER]).choices[0].message
    assert message.reasoning_content == message.reasoning == "What <tool_call> is\nthis?\n"
    assert message.content is None and message.tool_calls[0].function.arguments == ARGUMENTS
    streamed, finish = joined(ask(script, tools=[WEATHER], stream=True))
    assert (streamed["reasoning"], streamed["content"], finish) == (message.reasoning, "", "tool_calls")
    hidden = ask(script, extra_body={"include_reasoning": False}).choices[0].message
    assert hidden.content == ONE and not hasattr(hidden, "reasoning_content")


def test_usage_and_logprobs_count_every_token(ask, server):
    tokens = len(server.engine.tokenizer.encode(ONE)) + 1
    answer = ask(ONE, tools=[WEATHER], logprobs=True)
    assert answer.usage.completion_tokens == len(answer.choices[0].logprobs.content) == tokens
    chunks = list(ask(ONE, tools=[WEATHER], logprobs=True, stream=True))
    assert sum(len(c.choices[0].logprobs.content) for c in chunks if c.choices[0].logprobs) == tokens


def test_calls_go_back_into_the_next_prompt(ask, server):
    message = ask(ONE, tools=[WEATHER]).choices[0].message
    answer = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    ask("ok", messages=[*HI, message.model_dump(exclude_none=True), answer], tools=[WEATHER])
    prompt = server.engine.tokenizer.decode(server.engine.requests[-1].prompt, skip_special_tokens=False)
    assert ONE + "<|im_end|>" in prompt and "<tool_response>\nrain\n</tool_response>" in prompt


def test_continue_final_message(ask, server):
    talk = [*HI, {"role": "assistant", "content": "The cat"}]
    assert ask(" sat.", messages=talk, extra_body={"continue_final_message": True, "add_generation_prompt": False}) \
        .choices[0].message.content == " sat."
    prompt = server.engine.tokenizer.decode(server.engine.requests[-1].prompt, skip_special_tokens=False)
    assert prompt.endswith("<|im_start|>assistant\nThe cat")
    begun = [*HI, {"role": "assistant", "content": "<think>\nhm"}]
    message = ask(", so</think>Yes.", messages=begun, extra_body={"continue_final_message": True}).choices[0].message
    assert (message.reasoning_content, message.content) == (", so", "Yes.")


def test_reasoning_that_the_prompt_began(tokenizer):
    with serving(lambda: ScriptedEngine(tokenizer), chat=ChatOptions(R1)) as server, \
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        server.engine.script = "hm</think>\n\nYes."
        message = client.chat.completions.create(model="fake", messages=HI).choices[0].message
        assert (message.reasoning_content, message.content) == ("hm", "Yes.")
        named = {"type": "function", "function": {"name": "clock"}}
        server.engine.script = "hm</think>\n\n{}"
        message = client.chat.completions.create(model="fake", messages=HI, tools=[CLOCK], tool_choice=named).choices[0].message
        assert (message.reasoning_content, message.tool_calls[0].function.arguments) == ("hm", "{}")
        assert server.engine.requests[-1].params.structured.value.startswith("start: reasoning answer\n")
        with pytest.raises(openai.BadRequestError, match="--tool-call-parser"):
            client.chat.completions.create(model="fake", messages=HI, tools=[CLOCK])


def test_special_tokens_of_the_syntax_are_seen(tokenizer):
    tokenizer = load_tokenizer(tokenizer.hf.name_or_path)  # one of its own
    tokenizer.hf.add_special_tokens({"additional_special_tokens": ["[TOOL_CALLS]"]})
    options = ChatOptions(tool_parser="mistral")
    with serving(lambda: ScriptedEngine(Tokenizer(tokenizer.hf)), chat=options) as server, \
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        server.engine.script = 'Hm.[TOOL_CALLS]get_weather{"city": "Rom"}[TOOL_CALLS]clock{}'
        message = client.chat.completions.create(model="fake", messages=HI, tools=[WEATHER, CLOCK]).choices[0].message
        assert [(c.function.name, c.function.arguments) for c in message.tool_calls] == [
            ("get_weather", '{"city": "Rom"}'), ("clock", "{}")]
        assert message.content == "Hm." and all(len(c.id) == 9 and c.id.isalnum() for c in message.tool_calls)
        assert "[TOOL_CALLS]" not in client.chat.completions.create(model="fake", messages=HI).choices[0].message.content


@pytest.mark.parametrize(("field", "value", "param"), [
    ("tools", "x", "tools"), ("tools", [5], "tools[0]"), ("tools", [{"type": "custom"}], "tools[0].type"),
    ("tools", [{"type": "function"}], "tools[0].function"),
    ("tools", [{"type": "function", "function": {}}], "tools[0].function.name"),
    ("tools", [CLOCK, {"type": "function", "function": {"name": "a b"}}], "tools[1].function.name"),
    ("tools", [{"type": "function", "function": {"name": "x" * 65}}], "tools[0].function.name"),
    ("tools", [{"type": "function", "function": {"name": "x\n"}}], "tools[0].function.name"),
    ("tools", [CLOCK, CLOCK], "tools[1].function.name"),
    ("tools", [{"type": "function", "function": {"name": "f", "parameters": []}}], "tools[0].function.parameters"),
    ("tools", [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}],
     "tools[0].function.parameters.type"),
    ("tools", [{"type": "function", "function": {"name": "f", "parameters": {"$defs": [1]}}}],
     "tools[0].function.parameters.$defs"),
    ("tools", [{"type": "function", "function": {"name": "f", "description": "x" * MAX_TOOL_BYTES}}], "tools[0].function"),
    ("tools", [{"type": "function", "function": {"name": f"f{i}"}} for i in range(MAX_TOOLS + 1)], "tools"),
    ("tool_choice", "sometimes", "tool_choice"), ("tool_choice", 5, "tool_choice"), ("tool_choice", {}, "tool_choice"),
    ("tool_choice", {"type": "function", "function": {"name": "nope"}}, "tool_choice.function.name"),
    ("tool_choice", {"type": "allowed_tools"}, "tool_choice"), ("parallel_tool_calls", "yes", "parallel_tool_calls"),
    ("functions", [{"name": "f"}], "functions"), ("function_call", {"name": "f"}, "function_call"),
    ("chat_template", "{{ 1 }}", "chat_template"), ("include_reasoning", 1, "include_reasoning"),
    ("continue_final_message", 1, "continue_final_message"),
])
def test_bad_fields(http, field, value, param):
    body = {"messages": HI, "tools": [CLOCK], "max_tokens": 2} if field != "tools" else {"messages": HI}
    message = refused(http.post(PATH, json={**body, field: value}), param=param)
    assert param.partition("[")[0].partition(".")[0] in message


def test_tool_choice_without_tools(http):
    refused(http.post(PATH, json={"messages": HI, "tool_choice": "required"}), param="tool_choice")
    post(http, PATH, messages=HI, tool_choice="auto", parallel_tool_calls=True, max_tokens=1)


def test_a_model_without_a_known_format_still_takes_forced_calls(http):
    refused(http.post(PATH, json={"messages": HI, "tools": [CLOCK]}), param="tools")
    events = stream(http, PATH, messages=HI, tools=[CLOCK], max_tokens=5,
                    tool_choice={"type": "function", "function": {"name": "clock"}})
    assert events[1]["choices"][0]["delta"]["tool_calls"][0]["function"]["name"] == "clock"


def test_definitions_of_tools_move_to_the_root():
    def tool(name, definition):
        schema = {"type": "object", "properties": {"x": {"$ref": "#/$defs/X"}}, "$defs": {"X": definition}}
        return Tool.model_validate({"type": "function", "function": {"name": name, "parameters": schema}})

    same = tool_use_of([tool("a", {"type": "string"}), tool("b", {"type": "string"})], "required", None)
    schema = json.loads(same.grammar().value)
    assert schema["$defs"] == {"X": {"type": "string"}} and "maxItems" not in schema
    assert all("$defs" not in item["properties"]["parameters"] for item in schema["items"]["anyOf"])
    other = tool_use_of([tool("a", {"type": "string"}), tool("b", {"type": "number"})], "required", None)
    with pytest.raises(Exception, match="differs"):
        other.grammar()


def test_tools_too_large_for_a_grammar(http):
    wide = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}}
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": wide}} for i in range(3)]
    refused(http.post(PATH, json={"messages": HI, "tools": tools, "tool_choice": "required"}), param="tools")

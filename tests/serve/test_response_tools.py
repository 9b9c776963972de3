"""Function calls and reasoning in /v1/responses: a scripted engine behind the real server, read by the openai client."""

import json

import openai
import pytest
from openai.types.responses import Response
from test_bad_input import refused
from test_completions import post

PATH = "/v1/responses"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "name": "get_weather", "description": "", "parameters": CITY, "strict": True}
CLOCK = {"type": "function", "name": "clock", "parameters": None, "strict": None}
ARGUMENTS = '{"city": "Kö\\"ln 日本 {}"}'
ONE = f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
TWO = f'I look. \n{ONE}\n<tool_call>\n{{"name": "clock", "arguments": {{}}}}\n</tool_call>'
THOUGHT = "<think>\nWhat <tool_call> is 日本?\n</think>\n\n"


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        yield client


@pytest.fixture
def ask(server, client):
    """Asks twice, plain and streamed, which must come to the same; returns the plain answer and the events."""
    def create(script, **more):
        server.engine.script = script
        more = {"model": "fake", "input": "hi", "store": False, **more}
        plain = client.responses.create(**more)
        Response.model_validate(plain.model_dump(warnings=False), strict=True)
        events = list(client.responses.create(stream=True, **more))
        assert [event.sequence_number for event in events] == list(range(len(events)))
        final = events[-1].response
        assert rebuilt(events) == final.output and nameless(final) == nameless(plain) and final.usage == plain.usage
        assert (final.status, final.incomplete_details) == (plain.status, plain.incomplete_details)
        return plain, events
    return create


def nameless(response):
    """The output without ids, which are new each time."""
    items = [item.model_dump(warnings=False) for item in response.output]
    assert len({item["id"] for item in items}) == len(items)
    return [{name: value for name, value in item.items() if name not in ("id", "call_id")} for item in items]


def rebuilt(events):
    """The output as the events tell it, one item after the other, checked against the events that end things."""
    items, text, is_open = [], "", False
    for event in events[2:-1]:
        kind = event.type.removeprefix("response.")
        if kind == "output_item.added":
            assert not is_open and event.output_index == len(items) and event.item.status == "in_progress"
            items.append(event.item)
            text, is_open = "", True
            continue
        assert is_open and event.output_index == len(items) - 1
        if kind == "output_item.done":
            assert event.item.id == items[-1].id and event.item.type == items[-1].type
            assert text == (event.item.arguments if event.item.type == "function_call" else event.item.content[0].text)
            items[-1], is_open = event.item, False
            continue
        assert event.item_id == items[-1].id
        if kind.endswith(".delta"):
            assert kind == {"function_call": "function_call_arguments", "message": "output_text",
                            "reasoning": "reasoning_text"}[items[-1].type] + ".delta"
            text += event.delta
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert event.text == text
        elif kind == "function_call_arguments.done":
            assert event.arguments == text and event.name == items[-1].name
    assert not is_open
    return items


def kinds(answer):
    return [item.type for item in answer.output]


def test_one_call(ask):
    answer, events = ask(ONE, tools=[WEATHER])
    call, = answer.output
    assert (call.type, call.name, call.arguments, call.status) == ("function_call", "get_weather", ARGUMENTS, "completed")
    assert call.call_id.startswith("call_") and call.id.startswith("fc_") and answer.output_text == ""
    found = [event.type.removeprefix("response.") for event in events]
    assert found[:3] == ["created", "in_progress", "output_item.added"] and len(found) > 10
    assert found[-3:] == ["function_call_arguments.done", "output_item.done", "completed"]
    assert set(found[3:-3]) == {"function_call_arguments.delta"}
    assert answer.tools[0].name == "get_weather" and answer.tool_choice == "auto" and answer.parallel_tool_calls


def test_reasoning_text_and_two_calls(ask):
    answer, _ = ask(THOUGHT + TWO, tools=[WEATHER, CLOCK])
    assert kinds(answer) == ["reasoning", "message", "function_call", "function_call"]
    reasoning, message, first, second = answer.output
    assert reasoning.content[0].text == "What <tool_call> is 日本?\n" and reasoning.summary == []
    assert message.content[0].text == answer.output_text == "I look. \n"
    assert (first.arguments, second.name, second.arguments) == (ARGUMENTS, "clock", "{}")
    assert kinds(ask(TWO, tools=[WEATHER, CLOCK], parallel_tool_calls=False)[0]) == ["message", "function_call"]
    assert kinds(ask(f"{ONE} and so", tools=[WEATHER])[0]) == ["function_call", "message"]
    hidden, _ = ask(f"{THOUGHT}Yes.", extra_body={"include_reasoning": False})
    assert kinds(hidden) == ["message"] and hidden.usage.output_tokens_details.reasoning_tokens > 5


def test_an_answer_of_nothing_is_an_empty_message(ask):
    answer, _ = ask("")
    assert kinds(answer) == ["message"] and answer.output_text == "" and answer.status == "completed"


def test_what_is_cut_off_is_incomplete(ask):
    answer, _ = ask(ONE, tools=[WEATHER], max_output_tokens=30, store=True)
    call, = answer.output
    assert (answer.status, call.status) == ("incomplete", "incomplete") and ARGUMENTS.startswith(call.arguments)
    answer, _ = ask(THOUGHT, max_output_tokens=12)
    assert kinds(answer) == ["reasoning"] and answer.output[0].status == "incomplete"
    assert answer.usage.output_tokens_details.reasoning_tokens == answer.usage.output_tokens == 12


def test_forced_calls(ask, server):
    script = f'[{{"name": "get_weather", "parameters": {ARGUMENTS}}}, {{"name": "clock", "parameters": {{}}}}]'
    answer, _ = ask(script, tools=[WEATHER, CLOCK], tool_choice="required")
    assert [item.name for item in answer.output] == ["get_weather", "clock"] and answer.tool_choice == "required"
    named = {"type": "function", "name": "get_weather"}
    answer, _ = ask(ARGUMENTS, tools=[CLOCK, WEATHER], tool_choice=named,
                    extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert [item.arguments for item in answer.output] == [ARGUMENTS] and answer.tool_choice.name == "get_weather"
    assert json.loads(server.engine.requests[-1].params.structured.value) == CITY
    assert kinds(ask(ONE, tools=[WEATHER], tool_choice="none")[0]) == ["message"]


def test_a_conversation_goes_on_by_items_or_by_id(ask, client, server):
    server.engine.script = THOUGHT + TWO
    first = client.responses.create(model="fake", input="hi", tools=[WEATHER, CLOCK])
    results = [{"type": "function_call_output", "call_id": item.call_id, "output": output}
               for item, output in zip(first.output[2:], ["rain", [{"type": "input_text", "text": "noon"}]])]
    prompts = []
    for more in ({"previous_response_id": first.id, "input": results},
                 {"input": [{"role": "user", "content": "hi"}, *[item.to_dict() for item in first.output], *results]}):
        answer, _ = ask("It rains.", tools=[WEATHER, CLOCK], **more)
        assert answer.output_text == "It rains."
        prompts.append(server.engine.tokenizer.decode(server.engine.requests[-1].prompt, skip_special_tokens=False))
    assert prompts[0] == prompts[1] and TWO.replace("I look. ", "I look. \n") + "<|im_end|>" in prompts[0]
    assert "<tool_response>\nrain\n</tool_response>" in prompts[0] and "<tool_response>\nnoon" in prompts[0]


def test_a_broken_call_is_stored_and_refused_only_when_it_would_be_read(client, server):
    server.engine.script = '<tool_call>\n{"name": "clock", "arguments": {"at": Rome}}\n</tool_call>'
    first = client.responses.create(model="fake", input="hi", tools=[CLOCK])
    assert client.responses.retrieve(first.id).output[0].arguments == '{"at": Rome}'
    with pytest.raises(openai.BadRequestError, match="arguments must be JSON text of an object"):
        client.responses.create(model="fake", previous_response_id=first.id, input="and?", tools=[CLOCK])


def test_reasoning_alone_before_a_message_of_input_is_one_turn(client, server):
    server.engine.script = "ok"
    client.responses.create(model="fake", input=[
        {"role": "user", "content": "hi"}, {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "reasoning", "id": "rs_2", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": "Well."}])
    prompt = server.engine.tokenizer.decode(server.engine.requests[-1].prompt, skip_special_tokens=False)
    assert "<think>\nhm\n</think>\nWell.<|im_end|>" in prompt and prompt.count("<|im_start|>assistant") == 2


def test_logprobs_are_those_of_messages(ask, server):
    ids = server.engine.tokenizer.encode
    ask_for = {"include": ["message.output_text.logprobs"], "top_logprobs": 1}
    answer, events = ask(f"{THOUGHT}The cat.", **ask_for)
    message = answer.output[-1].content[0]
    streamed = [entry.token for event in events if event.type == "response.output_text.delta" for entry in event.logprobs]
    spent = answer.usage.output_tokens - answer.usage.output_tokens_details.reasoning_tokens
    assert streamed == [entry.token for entry in message.logprobs] and len(streamed) == spent
    assert "".join(streamed[:-1]).strip() == "The cat." and spent >= len(ids("The cat.")) + 1
    answer, _ = ask(f"Well.{ONE}", tools=[WEATHER], **ask_for)
    assert "".join(entry.token for entry in answer.output[0].content[0].logprobs) == "Well."


@pytest.mark.parametrize(("script", "stop"), [
    (THOUGHT + "Yes.", None), (f"<think></think>{ONE}", None), ("\n<think>hm</think>", None), ("<think>never done", None),
    ("Hello <think>no</think>", None), ("", None), (THOUGHT + "Yes.", ["</thinker>", "zz"])])
def test_reasoning_tokens_are_those_up_to_the_end_marker(ask, client, server, script, stop):
    tokenizer = server.engine.tokenizer
    ids = tokenizer.encode(script)
    expected = 0
    if script.lstrip().startswith("<think>"):
        expected = next((k for k in range(len(ids) + 1) if "</think>" in tokenizer.decode(ids[:k])), len(ids) + 1)
    answer, _ = ask(script, tools=[WEATHER], extra_body={"stop": stop} if stop else {})
    assert answer.usage.output_tokens_details.reasoning_tokens == expected
    talk = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "stop": stop}
    usage = client.chat.completions.create(**talk).usage
    last = list(client.chat.completions.create(**talk, stream=True, stream_options={"include_usage": True}))[-1]
    assert usage.completion_tokens_details.reasoning_tokens == expected and last.usage == usage
    twice = client.chat.completions.create(**talk, n=2).usage
    assert twice.completion_tokens_details.reasoning_tokens == 2 * expected


def test_the_helpers_of_the_client(client, server):
    server.engine.script = THOUGHT + TWO
    with client.responses.stream(model="fake", input="hi", tools=[WEATHER, CLOCK]) as stream:
        snapshots = [event.snapshot for event in stream if event.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    assert snapshots[-1] == "{}" and ARGUMENTS in snapshots
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "function_call"]


@pytest.mark.parametrize(("field", "value", "param"), [
    ("tools", "x", "tools"), ("tools", [5], "tools[0]"), ("tools", [{"type": "custom", "name": "x"}], "tools[0].type"),
    ("tools", [{"type": "function"}], "tools[0].name"), ("tools", [CLOCK, {**CLOCK, "name": "a b"}], "tools[1].name"),
    ("tools", [CLOCK, CLOCK], "tools[1].name"), ("tools", [{**CLOCK, "parameters": []}], "tools[0].parameters"),
    ("tools", [{**CLOCK, "parameters": {"type": "array"}}], "tools[0].parameters.type"),
    ("tools", [CLOCK] * 129, "tools"), ("tool_choice", "sometimes", "tool_choice"), ("tool_choice", {}, "tool_choice"),
    ("tool_choice", {"type": "function", "name": "nope"}, "tool_choice.name"), ("tool_choice", 5, "tool_choice"),
    ("tool_choice", {"type": "allowed_tools", "mode": "auto", "tools": []}, "tool_choice"),
    ("parallel_tool_calls", "yes", "parallel_tool_calls"),
    ("input", [{"type": "function_call", "name": "f", "arguments": "{}"}], "input[0].call_id"),
    ("input", [{"type": "function_call", "call_id": "a", "name": "f", "arguments": {}}], "input[0].arguments"),
    ("input", [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{"}], "input"),
    ("input", [{"type": "function_call_output", "call_id": 5, "output": "x"}], "input[0].call_id"),
    ("input", [{"type": "function_call_output", "call_id": "a"}], "input[0].output"),
    ("input", [{"type": "function_call_output", "call_id": "a", "output": [{"type": "input_image"}]}],
     "input[0].output[0].type"),
    ("input", [{"type": "reasoning", "content": [{"type": "reasoning_text"}]}], "input[0].content[0].text"),
    ("input", [{"type": "reasoning", "content": [{"type": "text", "text": "x"}]}], "input[0].content[0].type"),
])
def test_bad_fields(client, server, field, value, param):
    body = {"input": "hi", "tools": [CLOCK], "max_output_tokens": 2}
    message = refused(client._client.post(f"{server.url}{PATH}", json={**body, field: value}), param=param)
    assert param.partition("[")[0].partition(".")[0] in message and ".function." not in (
        message if field != "input" else "")


def test_tools_need_a_format(http):
    refused(http.post(PATH, json={"input": "hi", "tools": [CLOCK]}), param="tools")
    named = {"type": "function", "name": "clock"}
    body = post(http, PATH, input="hi", tools=[CLOCK], tool_choice=named, max_output_tokens=3)
    assert body["output"][0]["type"] == "function_call"


def test_a_grammar_of_calls_that_cannot_be_compiled_is_about_tools(client, server):
    tool = {**CLOCK, "parameters": {"type": "object", "properties": {"a": {"type": "wizard"}}}}
    refused(client._client.post(f"{server.url}{PATH}", json={"input": "hi", "tools": [tool], "tool_choice": "required"}),
            param="tools")

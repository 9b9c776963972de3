"""Messages and tools to prompts, through templates in the manner of real families."""

import json

import pytest
from chat_templates import LLAMA3, MISTRAL, QWEN, R1

from jaxkv.runtime.tokenizer import Tokenizer, load_tokenizer
from jaxkv.serve.chat import prompt_of
from jaxkv.serve.dialect import ChatOptions, Dialect, choose_dialect
from jaxkv.serve.errors import ApiError
from jaxkv.serve.protocol import ChatRequest, parse
from tests.text_models import write_byte_level

TOOL = {"type": "function", "function": {"name": "get_weather", "description": "The weather.", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
CALL = {"id": "abcdefgh1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Köln"}'}}
TALK = [{"role": "user", "content": "Weather?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "abcdefgh1", "content": "rain"}]


def prompt(tokenizer, template, messages, **more) -> str:
    body = json.dumps({"messages": messages, **more}).encode()
    return prompt_of(parse(ChatRequest, body, set()), tokenizer, Dialect(template=template))


def refusal(tokenizer, template, messages, **more) -> ApiError:
    with pytest.raises(ApiError) as caught:
        prompt(tokenizer, template, messages, **more)
    assert caught.value.status == 400
    return caught.value


def test_qwen(tokenizer):
    text = prompt(tokenizer, QWEN, [{"role": "system", "content": "Be brief."}, *TALK], tools=[TOOL])
    assert text == ("<|im_start|>system\nBe brief.\n\n<tools>\n" + json.dumps(TOOL) + "\n</tools>\nAnswer with <tool_call>\n"
                    '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
                    "<|im_start|>user\nWeather?<|im_end|>\n"
                    '<|im_start|>assistant\n\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
                    "<|im_end|>\n<|im_start|>user\n<tool_response>\nrain\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    assert prompt(tokenizer, QWEN, [TALK[0]], chat_template_kwargs={"enable_thinking": False}).endswith(
        "<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_in_the_history(tokenizer, name):
    talk = [TALK[0], {"role": "assistant", "content": "Rain.", name: "hm"}]
    assert "<think>\nhm\n</think>\nRain." in prompt(tokenizer, QWEN, talk)


def test_llama3(tokenizer):
    text = prompt(tokenizer, LLAMA3, TALK, tools=[TOOL])
    assert json.dumps(TOOL, indent=4) in text
    assert '\n\n{"name": "get_weather", "parameters": {"city": "Köln"}}<|eot_id|>' in text
    assert text.endswith("<|start_header_id|>ipython<|end_header_id|>\n\nrain<|eot_id|><|start_header_id|>assistant"
                         "<|end_header_id|>\n\n")
    twice = [TALK[0], {"role": "assistant", "tool_calls": [CALL, CALL]}]
    assert "single tool-calls" in refusal(tokenizer, LLAMA3, twice).message


def test_mistral(tokenizer):
    text = prompt(tokenizer, MISTRAL, TALK, tools=[TOOL])
    assert '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Köln"}, "id": "abcdefgh1"}]</s>' in text
    assert text.endswith('[TOOL_RESULTS] {"content": "rain", "call_id": "abcdefgh1"}[/TOOL_RESULTS]')
    assert prompt(tokenizer, MISTRAL, TALK[:1], tools=[TOOL]).startswith("<s>[AVAILABLE_TOOLS] " + json.dumps([TOOL]))
    long_id = [TALK[0], {"role": "assistant", "tool_calls": [{**CALL, "id": "call_0123456789"}]}]
    assert "length 9" in refusal(tokenizer, MISTRAL, long_id).message


@pytest.mark.parametrize("arguments", ['{"city": "Köln"}', {"city": "Köln"}])
def test_arguments_may_be_text_or_an_object(tokenizer, arguments):
    call = {"function": {"name": "f", "arguments": arguments}}
    assert '"arguments": {"city": "Köln"}' in prompt(tokenizer, QWEN, [TALK[0], {"role": "assistant", "tool_calls": [call]}])


@pytest.mark.parametrize(("message", "param"), [
    ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
     "messages[1].tool_calls[0].function.arguments"),
    ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
     "messages[1].tool_calls[0].function.arguments"),
    ({"role": "assistant", "tool_calls": [{"type": "custom", "function": {"name": "f"}}]}, "messages[1].tool_calls[0].type"),
    ({"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}, "messages[1].tool_calls[0].function.name"),
    ({"role": "assistant", "tool_calls": "x"}, "messages[1].tool_calls"),
    ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages[1].tool_calls"),
    ({"role": "user", "content": "x", "tool_call_id": "a"}, "messages[1].tool_call_id"),
    ({"role": "user", "content": "x", "reasoning_content": "a"}, "messages[1].reasoning_content"),
    ({"role": "assistant", "content": "x", "function_call": {"name": "f"}}, "messages[1].function_call"),
    ({"role": "function", "content": "x", "name": "f"}, "messages[1].role"),
    ({"role": "tool", "tool_call_id": "a"}, "messages[1].content"),
])
def test_bad_messages(tokenizer, message, param):
    assert refusal(tokenizer, QWEN, [TALK[0], message]).param == param


def test_deep_nesting_is_refused(tokenizer):
    deep = '{"a":' * 500 + "1" + "}" * 500
    talk = [TALK[0], {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": deep}}]}]
    assert refusal(tokenizer, QWEN, talk).param == "messages[1].tool_calls[0].function.arguments"
    tool = {"type": "function", "function": {"name": "f", "parameters": {"properties": json.loads(deep)}}}
    assert refusal(tokenizer, QWEN, [TALK[0]], tools=[tool]).param == "tools"


def test_continue_final_message(tokenizer):
    talk = [TALK[0], {"role": "assistant", "content": "It will"}]
    assert prompt(tokenizer, QWEN, talk, continue_final_message=True).endswith("<|im_start|>assistant\nIt will")
    assert prompt(tokenizer, QWEN, talk, continue_final_message=True, add_generation_prompt=False).endswith("It will")
    both = refusal(tokenizer, QWEN, talk, continue_final_message=True, add_generation_prompt=True)
    assert both.param == "continue_final_message"
    assert refusal(tokenizer, "{{ messages[0].content }}", talk, continue_final_message=True).param == "messages"


@pytest.mark.parametrize("name", ["template", "kwargs"])
def test_a_template_never_comes_from_a_request(tokenizer, name):
    more = {"chat_template": "{{ 1 }}"} if name == "template" else {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}
    assert refusal(tokenizer, QWEN, TALK[:1], **more).param.startswith("chat_template")


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__init__.__globals__['os'].system('true') }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ raise_exception.__globals__['__builtins__']['open']('/etc/passwd').read() }}",
    "{% for x in (1).__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ messages[0].update({'x': 1}) }}", "{{ ('%s' | attr('__class__')).__base__ }}", "{% include '/etc/passwd' %}",
])
def test_a_malicious_template_of_a_model_reaches_nothing(tmp_path, template):
    directory = write_byte_level(tmp_path)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    (directory / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(directory)
    assert tokenizer.hf.chat_template == template
    assert refusal(tokenizer, None, TALK[:1]).param == "messages"


@pytest.mark.parametrize(("template", "tools", "reasoning"), [
    (QWEN, "hermes", "qwen3"), (LLAMA3, "llama3_json", None), (MISTRAL, "mistral", None), (R1, None, "qwen3"),
    (None, None, None),
])
def test_dialect_of_a_template(tokenizer, template, tools, reasoning):
    found = choose_dialect(ChatOptions(template), tokenizer)
    assert (found.tool_parser, found.reasoning_parser, found.template) == (tools, reasoning, template)
    assert (tools or "not parsed") in found.describe()
    named = choose_dialect(ChatOptions(template, "pythonic", "none"), tokenizer)
    assert (named.tool_parser, named.reasoning_parser) == ("pythonic", None)
    off = choose_dialect(ChatOptions(template, "none", "deepseek_r1"), tokenizer)
    assert (off.tool_parser, off.reasoning_parser) == (None, "deepseek_r1")


def test_special_markers_are_noticed(tmp_path):
    hf = load_tokenizer(write_byte_level(tmp_path)).hf
    for tags, special in (([], (False, False)), (["[TOOL_CALLS]"], (True, False)), (["</think>"], (True, True))):
        hf.add_special_tokens({"additional_special_tokens": tags})
        found = choose_dialect(ChatOptions(MISTRAL, reasoning_parser="qwen3"), Tokenizer(hf))
        assert (found.special_tools, found.special_reasoning) == special

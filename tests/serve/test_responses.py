"""/v1/responses with the openai client, against the fake engine."""

import openai
import pytest
from openai.types.responses import Response
from serve_fakes import REPLY
from test_bad_input import refused
from test_completions import post

from jaxkv.serve.response_store import ResponseStore
from jaxkv.serve.schemas import ResponsesResponse

PATH = "/v1/responses"


def prompt_of(fake, tokenizer):
    return tokenizer.decode(fake.engine.requests[-1].prompt, skip_special_tokens=False)


def test_plain(client, http, fake, tokenizer):
    answer = client.responses.create(model="fake", input="hi", instructions="Be brief.", max_output_tokens=20)
    assert REPLY.startswith(answer.output_text) and answer.object == "response" and answer.id.startswith("resp_")
    assert prompt_of(fake, tokenizer) == tokenizer.hf.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}], tokenize=False,
        add_generation_prompt=True)
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "max_output_tokens"
    usage = answer.usage
    assert (usage.output_tokens, usage.total_tokens) == (20, usage.input_tokens + 20)
    assert usage.input_tokens == len(fake.engine.requests[-1].prompt)
    assert usage.input_tokens_details.cached_tokens == usage.input_tokens // 2
    body = post(http, PATH, input="hi", stop="sat")
    assert body["status"] == "completed" and body["output"][0]["content"][0]["text"] == REPLY[:REPLY.index("sat")]
    Response.model_validate(body, strict=True)
    ResponsesResponse.model_validate(body)


def test_every_field_reaches_the_engine(http, fake):
    post(http, PATH, input="hi", max_output_tokens=7, temperature=0.3, top_p=0.8, top_k=4, seed=5, stop=["q"],
         cache_salt="t", priority=-1, user="u", metadata={"a": "b"}, text={"format": {"type": "text"}}, tools=[],
         tool_choice="auto", parallel_tool_calls=True, truncation="disabled", reasoning={"effort": "low"}, service_tier="auto")
    request, params = fake.engine.requests[-1], fake.engine.requests[-1].params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k, params.seed) == (7, 0.3, 0.8, 4, 5)
    assert (params.stop, request.namespace, request.priority) == (("q",), "t", -1)


def test_fields_of_chat_are_known_and_others_are_named_once(http, caplog):
    for _ in range(2):
        post(http, PATH, input="hi", include_reasoning=True, made_up_field_of_responses=1)
    said = [record.message for record in caplog.records if "unknown request field" in record.message]
    assert len(said) == 1 and "made_up_field_of_responses" in said[0]


def test_text_format_is_followed(http, fake):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    body = post(http, PATH, input="hi", text={"format": form}, max_output_tokens=3)
    assert body["text"]["format"] == form and fake.engine.requests[-1].params.structured.kind == "json_schema"
    post(http, PATH, input="hi", text={"format": {"type": "json_object"}}, max_output_tokens=3)
    assert fake.engine.requests[-1].params.structured.kind == "json_object"


@pytest.mark.parametrize(("fields", "param", "message"), [
    ({"max_output_tokens": 0}, "max_output_tokens", "max_output_tokens must be at least 1"),
    ({"text": {"format": {"type": "yaml"}}}, "text", "text.format.type: Input should be"),
    ({"text": {"format": {"type": "json_schema"}}}, "text", "text.format.name: Field required"),
    ({"text": {"format": {"type": "json_object"}}, "guided_regex": "a"}, "guided_regex", "only one of text.format and guided"),
    ({"input": []}, "input", "input: List should have"), ({"input": {}}, "input", "input: Input should be a valid string or"),
    ({"input": [{"role": "user", "content": "a"}] * 4097}, "input", "input: must hold at most 4096 entries, not 4097"),
    ({"input": [{"type": "function_call", "name": "f", "call_id": "c", "arguments": "{"}]}, "input",
     "input[...].arguments must be JSON text"),
])
def test_errors_are_in_words_of_this_route(http, fields, param, message):
    assert refused(http.post(PATH, json={"input": "hi", **fields}), param=param).startswith(message)


def test_text_is_checked_before_it_is_echoed(http):
    assert post(http, PATH, input="hi", max_output_tokens=1, text={"verbosity": "low"})["text"] == {
        "format": {"type": "text"}, "verbosity": "low"}
    for text, param in (({"format": {}}, "text"), ({"format": []}, "text.format"), ({"format": {"type": "yaml"}}, "text"),
                        ({"verbosity": "loud"}, "text.verbosity"), ("x", "text")):
        refused(http.post(PATH, json={"input": "hi", "text": text}), param=param)


def test_without_a_limit_the_answer_fills_the_window(http):
    assert post(http, PATH, input="hi")["usage"]["total_tokens"] == 256


def test_events(client):
    plain = client.responses.create(model="fake", input="hi", max_output_tokens=40)
    events = list(client.responses.create(model="fake", input="hi", max_output_tokens=40, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added",
                         "response.content_part.added"]
    assert kinds[-4:] == ["response.output_text.done", "response.content_part.done", "response.output_item.done",
                          "response.incomplete"]
    assert set(kinds[4:-4]) == {"response.output_text.delta"} and len(kinds) > 20
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events[4:-4])
    assert text == plain.output_text == events[-4].text == events[-1].response.output_text
    assert not any("\ufffd" in event.delta for event in events[4:-4])
    assert len({event.item_id for event in events[4:-4]}) == 1
    assert events[-1].response.usage == plain.usage
    with client.responses.stream(model="fake", input="hi", max_output_tokens=200, extra_body={"stop": "on the"}) as stream:
        assert [event.type for event in stream][-1] == "response.completed"
        assert stream.get_final_response().output_text == REPLY[:REPLY.index("on the")]


def test_logprobs(client):
    ask = {"model": "fake", "input": "hi", "max_output_tokens": 9, "top_logprobs": 2,
           "include": ["message.output_text.logprobs"]}
    content = client.responses.create(**ask).output[0].content[0]
    assert len(content.logprobs) == 9 and all(len(entry.top_logprobs) == 2 for entry in content.logprobs)
    events = list(client.responses.create(**ask, stream=True))
    streamed = [entry.token for e in events if e.type == "response.output_text.delta" for entry in e.logprobs]
    assert streamed == [entry.token for entry in content.logprobs]


def test_conversation_goes_on_from_a_stored_answer(client, http, fake, tokenizer):
    first = client.responses.create(model="fake", input="one", instructions="Once.", max_output_tokens=5)
    second = client.responses.create(model="fake", previous_response_id=first.id, max_output_tokens=5,
                                     input=[{"role": "user", "content": [{"type": "input_text", "text": "two"}]}])
    assert prompt_of(fake, tokenizer) == tokenizer.hf.apply_chat_template(
        [{"role": "user", "content": "one"}, {"role": "assistant", "content": first.output_text},
         {"role": "user", "content": "two"}], tokenize=False, add_generation_prompt=True)
    assert client.responses.retrieve(second.id).output_text == second.output_text
    client.responses.delete(second.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(second.id)
    unkept = client.responses.create(model="fake", input="x", store=False, max_output_tokens=2)
    refused(http.post(PATH, json={"input": "y", "previous_response_id": unkept.id}), 404, "previous_response_id")


def test_output_items_are_taken_back_as_input(client, fake, tokenizer):
    first = client.responses.create(model="fake", input="one", max_output_tokens=5)
    items = [{"role": "user", "content": "one"}, *first.model_dump()["output"], {"role": "user", "content": "two"}]
    client.responses.create(model="fake", input=items, max_output_tokens=5)
    assert f"assistant\n{first.output_text}<|im_end|>" in prompt_of(fake, tokenizer)


def test_store_is_bounded():
    store = ResponseStore(max_items=3, max_bytes=1000)
    for i in range(5):
        store.put({"id": f"r{i}"}, [])
    assert list(store._items) == ["r2", "r3", "r4"]
    store.put({"id": "big"}, [{"content": "x" * 900}])
    assert list(store._items)[-1] == "big" and store._bytes <= 1000
    store.put({"id": "too big"}, [{"content": "x" * 2000}])
    assert not store._items and store._bytes == 0


@pytest.mark.parametrize(("field", "value", "param"), [
    ("input", None, "input"), ("input", 5, "input"), ("input", [], "input"), ("input", [{"role": "x", "content": "a"}],
                                                                              "input[0].role"),
    ("input", [{"type": "item_reference", "id": "f"}], "input[0].type"), ("input", [{"role": "user"}], "input[0].content"),
    ("input", [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}], "input[0].content[0].type"),
    ("input", "word " * 400, "input"), ("max_output_tokens", 0, "max_output_tokens"), ("temperature", 900, "temperature"),
    ("tools", [{"type": "web_search"}], "tools[0].type"), ("background", True, "background"), ("n", 2, "n"),
    ("truncation", "auto", "truncation"), ("include", ["file_search_call.results"], "include[0]"),
    ("previous_response_id", 5, "previous_response_id"), ("store", "yes", "store"), ("metadata", {"a": 5}, "metadata.a"),
    ("text", {"format": {"type": "xml"}}, "text"), ("suffix", "x", "suffix"),
    ("text", {"format": {"type": "json_schema", "name": "x", "schema": {"type": "wizard"}}}, "text"),
    ("stream_options", {"include_usage": True}, "stream_options"),
])
@pytest.mark.parametrize("stream", [False, True])
def test_bad_input(http, field, value, param, stream):
    if field == "stream_options" and stream:
        return
    refused(http.post(PATH, json={"input": "hi", "stream": stream, field: value}), param=param)

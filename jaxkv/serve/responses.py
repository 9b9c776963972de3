"""/v1/responses: text in, text out, whole or as the events of the Responses API.

A request is a chat request in other words (``ResponsesRequest.chat``), so what holds for chat holds here; reasoning is
left out of the answer. Finished answers are kept in memory for ``previous_response_id`` until newer ones need the room.
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Iterator
from typing import Any, Literal

import orjson
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict

from jaxkv.runtime.outputs import Delta
from jaxkv.serve import chat
from jaxkv.serve.answer import Answer, Choice, Form
from jaxkv.serve.bounds import Items, Metadata
from jaxkv.serve.engine_loop import Call
from jaxkv.serve.errors import ApiError, bad_request, shown
from jaxkv.serve.limits import owner_of
from jaxkv.serve.logprobs import TokenText, chat_logprobs
from jaxkv.serve.openapi import documented
from jaxkv.serve.parsers.message import MessageReader
from jaxkv.serve.protocol import ChatRequest, GenerationRequest, validated
from jaxkv.serve.response_store import ResponseStore
from jaxkv.serve.schemas import Deleted, ResponsesResponse
from jaxkv.serve.service import Service

LOGPROBS = "message.output_text.logprobs"
_TEXT_PARTS = ("input_text", "output_text", "text")
_NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text"}  # chat's -> ours
_NOTHING: dict[str, tuple[Any, ...]] = {  # fields that are not implemented -> values that ask nothing
    "tools": ([],), "background": (False,), "conversation": (), "prompt": (), "truncation": ("disabled",),
    "tool_choice": ("none", "auto"), "n": (1,), "best_of": (1,),
}


class ResponseText(BaseModel):
    """`text`. Its format is checked as chat's `response_format`."""

    model_config = ConfigDict(strict=True)
    format: dict[str, Any] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None

    def echo(self) -> dict[str, Any]:
        """As it stands in the answer."""
        return {"format": self.format or {"type": "text"}} | ({"verbosity": self.verbosity} if self.verbosity else {})


class ResponsesRequest(GenerationRequest):
    """/v1/responses. Sampling fields beyond OpenAI's are those of chat."""

    input: str | Items[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    metadata: Metadata | None = None
    text: ResponseText | None = None
    top_logprobs: int | None = None
    include: Items[Literal["message.output_text.logprobs"]] | None = None
    tools: Items[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    truncation: str | None = None
    background: bool | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None

    def check(self) -> None:
        for name, values in _NOTHING.items():
            if (value := getattr(self, name)) is not None and value not in values:
                raise bad_request(f"{name} is not supported, got {shown(value)}", name, "unsupported_parameter")

    def renamed(self) -> dict[str, str]:
        return {"prompt": "input", "logprobs": "top_logprobs", "max_tokens": "max_output_tokens", "structured": "text"}

    def conversation_of(self, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages so far, without the instructions. Raises ApiError for input that is not text."""
        if isinstance(self.input, str):
            return [*before, {"role": "user", "content": self.input}]
        return [*before, *(_message(item, f"input[{i}]") for i, item in enumerate(self.input))]

    def chat(self, messages: list[dict[str, Any]], ignored: set[str]) -> ChatRequest:
        """The chat request this is. Raises ApiError in terms of chat (see ``_our_words``)."""
        names = set(ChatRequest.model_fields) & set(GenerationRequest.model_fields)
        given = self.model_dump(include=names, exclude_none=True, by_alias=True)
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        limit = self.max_tokens if self.max_output_tokens is None else self.max_output_tokens
        data = given | (self.model_extra or {}) | {"messages": system + messages, "max_tokens": limit}
        if LOGPROBS in (self.include or ()):
            data |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return validated(ChatRequest, data | _format(self.text), ignored)


@contextlib.contextmanager
def _our_words() -> Iterator[None]:
    """Makes an error about a field of chat one about ours."""
    try:
        yield
    except ApiError as error:
        error.param = _NAMES.get(re.split(r"[\[.]", error.param or "")[0], error.param)
        raise


def _message(item: dict[str, Any], where: str) -> dict[str, Any]:
    """An input item as a chat message. Raises ApiError."""
    kind, role, content = item.get("type", "message"), item.get("role"), item.get("content")
    if kind != "message":
        raise bad_request(f"{where}.type must be \"message\", got {shown(kind)}", f"{where}.type", "unsupported_item")
    if role not in ("user", "assistant", "system", "developer"):
        raise bad_request(f"{where}.role must be user, assistant, system or developer, got {shown(role)}",
                          f"{where}.role")
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, list):
        raise bad_request(f"{where}.content must be a string or a list of text parts, got {type(content).__name__}",
                          f"{where}.content")
    parts = []
    for k, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in _TEXT_PARTS:
            raise bad_request(f"{where}.content[{k}].type must be one of {', '.join(_TEXT_PARTS)}, got {shown(kind)}",
                              f"{where}.content[{k}].type", "unsupported_content_part")
        parts.append({"type": "text", "text": part.get("text")})
    return {"role": role, "content": parts}


def _format(text: ResponseText | None) -> dict[str, Any]:
    """`text.format` as chat's `response_format`."""
    kind = text.format if text else None
    if kind is None:
        return {}
    if kind.get("type") != "json_schema":
        return {"response_format": kind}
    return {"response_format": {"type": "json_schema", "json_schema": {k: v for k, v in kind.items() if k != "type"}}}


class ResponseForm(Form):
    """The one message of an answer, and the events about its text."""

    kind = chunk_kind = "response"

    def __init__(self, model: str, request: ResponsesRequest, like: ChatRequest, tokens: TokenText, reader: MessageReader):
        super().__init__(f"resp_{uuid.uuid4().hex}", model, like, tokens)
        self.like, self._reader, self._text = like, reader, ""
        self.item = f"msg_{uuid.uuid4().hex}"
        kept = request.store is not False
        text = request.text or ResponseText()
        self.head = {
            "id": self.head["id"], "object": "response", "created_at": float(self.head["created"]), "model": model,
            "status": "in_progress", "error": None, "incomplete_details": None, "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens, "output": [], "parallel_tool_calls": True,
            "previous_response_id": request.previous_response_id, "temperature": request.temperature,
            "top_p": request.top_p, "text": text.echo(), "tool_choice": "auto",
            "tools": [], "truncation": "disabled", "background": False, "metadata": request.metadata or {},
            "store": kept, "top_logprobs": request.top_logprobs or 0, "usage": None,
        }

    def chunks(self, choice: Choice, delta: Delta) -> list[dict[str, Any]]:
        text = self.read(delta.text, delta.finish_reason is not None)
        if not (text or self.like.logprobs and delta.token_ids):
            return []
        return [self.event("output_text.delta", delta=text, logprobs=self.logprobs(delta.logprobs))]

    def whole(self, choice: Choice) -> dict[str, Any]:
        status = "incomplete" if choice.finish_reason == "length" else "completed"
        return self.message(status, [self.part(self._text, self.logprobs(choice.logprobs))])

    def read(self, text: str, last: bool) -> str:
        """What of the next text is answer and not reasoning."""
        content = self._reader.feed(text, last).content
        self._text += content
        return content

    def message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        """The item of the output."""
        return {"id": self.item, "type": "message", "status": status, "role": "assistant", "content": content}

    def part(self, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        """The content of the item."""
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def event(self, kind: str, **fields: Any) -> dict[str, Any]:
        """An event about the item's content."""
        return {"type": f"response.{kind}", "item_id": self.item, "output_index": 0, "content_index": 0} | fields

    def logprobs(self, entries: Any) -> list[dict[str, Any]]:
        """Of tokens, if they were asked for."""
        return chat_logprobs(entries, self.like.top_logprobs or 0, self.tokens)["content"] if self.like.logprobs else []


class ResponsesAnswer(Answer):
    """As a chat answer, in the words of the Responses API."""

    form: ResponseForm
    messages: list[dict[str, Any]]
    store: ResponseStore
    owner: str
    _number = 0

    def _result(self) -> dict[str, Any]:
        (choice,), usage = self.choices, self._usage()
        cut, cached = choice.finish_reason == "length", usage["prompt_tokens_details"]["cached_tokens"]
        details = {"cached_tokens": cached, "cache_write_tokens": usage["prompt_tokens"] - cached}
        body = self.form.head | {
            "status": "incomplete" if cut else "completed", "output": [self.form.whole(choice)],
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {"input_tokens": usage["prompt_tokens"], "input_tokens_details": details,
                      "output_tokens": usage["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
                      "total_tokens": usage["total_tokens"]}}
        if body["store"]:
            answer = body["output"][0]["content"][0]["text"]
            self.store.put(body, [*self.messages, {"role": "assistant", "content": answer}], self.owner)
        return body

    def _take(self, call: Call, delta: Delta) -> None:
        super()._take(call, delta)
        if not self.request.stream:
            self.form.read(delta.text, delta.finish_reason is not None)

    def _events(self, items: list[tuple[Call, Delta]], head: dict[str, Any]) -> list[bytes]:
        form, (choice,) = self.form, self.choices
        events: list[dict[str, Any]] = []
        if not choice.started:
            choice.started = True
            events += [{"type": "response.created", "response": form.head},
                       {"type": "response.in_progress", "response": form.head},
                       {"type": "response.output_item.added", "output_index": 0, "item": form.message("in_progress", [])},
                       form.event("content_part.added", part=form.part("", []))]
        for call, delta in items:
            events += form.chunks(choice, delta)
            self._take(call, delta)
        if not self.unfinished:
            body = self._result()
            item = body["output"][0]
            part = item["content"][0]
            events += [form.event("output_text.done", text=part["text"], logprobs=part["logprobs"]),
                       form.event("content_part.done", part=part),
                       {"type": "response.output_item.done", "output_index": 0, "item": item},
                       {"type": f"response.{body['status']}", "response": body}]
        return [self._render(event) for event in events]

    def _last_event(self, refusal: ApiError) -> bytes:
        error = {"code": refusal.code, "message": refusal.message}
        failed = self.form.head | {"status": "failed", "error": error}
        return self._render({"type": "response.failed", "response": failed})

    def _render(self, event: dict[str, Any]) -> bytes:
        data = orjson.dumps(event | {"sequence_number": self._number})
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (event["type"].encode(), data)


def add_responses(app: FastAPI, service: Service) -> None:
    """Adds the routes."""
    store = ResponseStore()

    @app.post("/v1/responses", **documented(ResponsesRequest, ResponsesResponse, stream=True))
    async def create_response(request: Request) -> Response:
        body = await service.read(ResponsesRequest, request)
        earlier, owner = body.previous_response_id, owner_of(request.scope)
        messages = body.conversation_of(store.get(earlier, "previous_response_id", owner).messages if earlier else [])
        tokenizer, dialect = service.tokenizer("input"), service.dialect()
        with _our_words():
            like = body.chat(messages, service.ignored_fields)
            talk = await service.aside(chat.size_of(like), lambda: chat.prepare(like, tokenizer, dialect))
        service.check_text(body, talk.prompt)
        ids = await service.encode(talk.prompt, add_special_tokens=bool(body.add_special_tokens))
        form = ResponseForm(service.model_name(), body, like, TokenText(tokenizer), talk.reader())
        answer = service.answer(body, form, talk.params, [(ids, talk.prompt)], ResponsesAnswer)
        assert isinstance(answer, ResponsesAnswer)
        answer.messages, answer.store, answer.owner = messages, store, owner
        return answer

    @app.get("/v1/responses/{name}", **documented(None, ResponsesResponse))
    async def get_response(name: str, request: Request) -> Any:
        return store.get(name, owner=owner_of(request.scope)).body

    @app.delete("/v1/responses/{name}", **documented(None, Deleted))
    async def delete_response(name: str, request: Request) -> Any:
        store.delete(name, owner_of(request.scope))
        return {"id": name, "object": "response", "deleted": True}

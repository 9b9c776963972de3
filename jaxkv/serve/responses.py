"""/v1/responses: text and function calls, whole or as the events of the Responses API.

A request is a chat request in other words (``ResponsesRequest.chat``), so what holds for chat holds here. Finished answers
are kept in memory for ``previous_response_id`` until newer ones need the room.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from types import MappingProxyType
from typing import Annotated, Any, Literal

import orjson
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict

from jaxkv.runtime.outputs import Delta
from jaxkv.serve import chat
from jaxkv.serve.answer import Answer, Choice, Form
from jaxkv.serve.bounds import Items, Metadata, at_most
from jaxkv.serve.calls import Call
from jaxkv.serve.errors import ApiError, bad_request, shown
from jaxkv.serve.limits import owner_of
from jaxkv.serve.logprobs import TokenText, chat_logprobs
from jaxkv.serve.openapi import documented
from jaxkv.serve.parsers.message import MessageReader
from jaxkv.serve.protocol import MAX_MESSAGES, ChatRequest, GenerationRequest, validated
from jaxkv.serve.response_input import chat_choice, chat_format, chat_tool, messages_of, our_words
from jaxkv.serve.response_output import Event, Output
from jaxkv.serve.response_store import ResponseStore
from jaxkv.serve.schemas import Deleted, ResponsesResponse
from jaxkv.serve.service import Service
from jaxkv.serve.tools import MAX_TOOLS

LOGPROBS = "message.output_text.logprobs"
_NOTHING: dict[str, tuple[Any, ...]] = {  # fields that are not implemented -> values that ask nothing
    "background": (False,), "conversation": (), "prompt": (), "truncation": ("disabled",), "n": (1,), "best_of": (1,),
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

    forwards_extra = True
    replaceable = MappingProxyType({"max_tokens": "max_tokens", "max_output_tokens": "max_tokens", "top_logprobs": "logprobs"})
    input: Annotated[str | Items[dict[str, Any]], at_most(MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    metadata: Metadata | None = None
    text: ResponseText | None = None
    top_logprobs: int | None = None
    include: Items[Literal["message.output_text.logprobs"]] | None = None
    tools: Annotated[Items[dict[str, Any]], at_most(MAX_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    truncation: str | None = None
    background: bool | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None

    def check(self) -> None:
        for name, values in _NOTHING.items():
            if (value := getattr(self, name)) is not None and value not in values:
                raise bad_request(f"{name} is not supported, got {shown(value)}", name, "unsupported_parameter")
        self.check_replaceable()
        if self.response_format is not None and self.text is not None and self.text.format is not None:
            raise bad_request("only one of text.format and response_format may be given", "response_format")

    def renamed(self) -> dict[str, str]:
        structured = "text" if self.tool_choice in (None, "none", "auto") else "tools"
        return {"prompt": "input", "logprobs": "top_logprobs", "max_tokens": "max_output_tokens", "structured": structured}

    def chat(self, messages: list[dict[str, Any]], ignored: set[str]) -> ChatRequest:
        """The chat request this is. Raises ApiError in terms of chat (see ``our_words``)."""
        names = set(ChatRequest.model_fields) & set(GenerationRequest.model_fields)
        given = self.model_dump(include=names, exclude_none=True, by_alias=True)
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        limit = self.max_tokens if self.max_output_tokens is None else self.max_output_tokens
        data = given | (self.model_extra or {}) | {
            "messages": system + messages, "max_tokens": limit,
            "tools": self.tools and [chat_tool(tool) for tool in self.tools], "tool_choice": chat_choice(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls}
        if self.text is not None and self.text.format is not None:
            data["response_format"] = chat_format(self.text.format)
        if LOGPROBS in (self.include or ()):
            data |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return validated(ChatRequest, data, ignored)


@contextlib.contextmanager
def _ours() -> Iterator[None]:
    """Makes an error about a field of chat one about ours."""
    try:
        yield
    except ApiError as error:
        error.param, error.message = our_words(error.param, error.message)
        raise


class ResponseForm(Form):
    """The items of an answer, and the events that build them."""

    kind = chunk_kind = "response"

    def __init__(self, model: str, request: ResponsesRequest, like: ChatRequest, tokens: TokenText, talk: chat.Conversation):
        super().__init__(f"resp_{uuid.uuid4().hex}", model, like, tokens)
        self._like, self._talk, self._output = like, talk, Output(talk.call_id)
        text = request.text or ResponseText()
        self.head = {
            "id": self.head["id"], "object": "response", "created_at": float(self.head["created"]), "model": model,
            "status": "in_progress", "error": None, "incomplete_details": None, "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens, "output": [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id, "temperature": request.temperature,
            "top_p": request.top_p, "text": text.echo(), "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [], "truncation": "disabled", "background": False, "metadata": request.metadata or {},
            "store": request.store is not False, "top_logprobs": request.top_logprobs or 0, "usage": None,
        }

    def reader(self) -> MessageReader:
        return self._talk.reader()

    def chunks(self, choice: Choice, delta: Delta) -> list[Event]:
        reader, parts, output, like = choice.reader, choice.parts[-1], self._output, self._like
        assert reader is not None
        events = []
        if parts.reasoning and like.include_reasoning is not False:
            events += output.reason(parts.reasoning)
        if like.logprobs:
            entries = chat_logprobs(delta.logprobs, like.top_logprobs or 0, self.tokens)["content"]
            output.score(entries, reasoning=reader.reasoning_tokens == reader.tokens)
        for piece in parts.pieces:
            events += output.say(piece) if isinstance(piece, str) else output.call(piece)
        if delta.finish_reason is not None:
            events += output.end("incomplete" if delta.finish_reason == "length" else "completed")
        return events

    def whole(self, choice: Choice) -> dict[str, Any]:
        cut = choice.finish_reason == "length"
        return {"status": "incomplete" if cut else "completed", "output": self._output.items,
                "incomplete_details": {"reason": "max_output_tokens"} if cut else None}


class ResponsesAnswer(Answer):
    """As a chat answer, in the words of the Responses API."""

    messages: list[dict[str, Any]]  # the conversation before the answer
    store: ResponseStore
    owner: str
    _number = 0

    def _result(self) -> dict[str, Any]:
        (choice,), usage = self.choices, self._usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        details = {"cached_tokens": cached, "cache_write_tokens": usage["prompt_tokens"] - cached}
        body = self.form.head | self.form.whole(choice) | {
            "usage": {"input_tokens": usage["prompt_tokens"], "input_tokens_details": details,
                      "output_tokens": usage["completion_tokens"],
                      "output_tokens_details": usage["completion_tokens_details"], "total_tokens": usage["total_tokens"]}}
        if body["store"]:
            self.store.put(body, self.messages + messages_of(body["output"], "output"), self.owner)
        return body

    def _take(self, call: Call, delta: Delta) -> None:
        super()._take(call, delta)
        if not self.request.stream:
            self.form.chunks(self.choices[0], delta)

    def _events(self, items: list[tuple[Call, Delta]], head: dict[str, Any]) -> list[bytes]:
        choice, events = self.choices[0], []
        if not choice.started:
            choice.started = True
            events += [{"type": f"response.{kind}", "response": self.form.head} for kind in ("created", "in_progress")]
        for call, delta in items:
            self._take(call, delta)
            events += self.form.chunks(choice, delta)
        if not self.unfinished:
            body = self._result()
            events.append({"type": f"response.{body['status']}", "response": body})
        return [self._render(event) for event in events]

    def _last_event(self, refusal: ApiError) -> bytes:
        error = {"code": refusal.code, "message": refusal.message}
        failed = self.form.head | {"status": "failed", "error": error}
        return self._render({"type": "response.failed", "response": failed})

    def _render(self, event: Event) -> bytes:
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
        before = store.get(earlier, "previous_response_id", owner) if earlier else None
        tokenizer, dialect = service.tokenizer("input"), service.dialect()

        def prepare() -> tuple[list[dict[str, Any]], ChatRequest, chat.Conversation]:
            messages = (before.messages if before else []) + messages_of(body.input)
            like = body.chat(messages, service.ignored_fields)
            return messages, like, chat.prepare(like, tokenizer, dialect)

        with _ours():
            messages, like, talk = await service.aside(body.size + (before.size if before else 0), prepare)
        service.check_text(body, talk.prompt)
        ids = await service.encode(talk.prompt, add_special_tokens=bool(body.add_special_tokens))
        form = ResponseForm(service.model_name(), body, like, TokenText(tokenizer), talk)
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

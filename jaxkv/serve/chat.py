"""/v1/chat/completions: messages to a prompt through the model's template, and the wording of the answer."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxkv.params import SamplingParams, Structured
from jaxkv.runtime.outputs import Delta
from jaxkv.serve.answer import Choice, Form
from jaxkv.serve.dialect import Dialect
from jaxkv.serve.errors import bad_request
from jaxkv.serve.logprobs import TokenText, chat_logprobs, prompt_logprobs
from jaxkv.serve.messages import messages_of
from jaxkv.serve.parsers import TOOL_PARSERS
from jaxkv.serve.parsers.base import CallDelta, ToolParser
from jaxkv.serve.parsers.forced import CallsOrContent, NamedParser, RequiredParser
from jaxkv.serve.parsers.message import MessageReader, Parts, joined
from jaxkv.serve.parsers.reasoning import BEGIN, END, ThinkParser
from jaxkv.serve.protocol import ChatRequest
from jaxkv.serve.structured import field_of
from jaxkv.serve.thinking import after_reasoning, token_of
from jaxkv.serve.tools import ToolUse


def prompt_of(request: ChatRequest, tokenizer: Any, dialect: Dialect) -> str:
    """The prompt text the template makes of messages and tools. Raises ApiError. Takes time with the length."""
    if tokenizer is None:
        raise bad_request("this server has no tokenizer: only /v1/completions with token ids works", "messages")
    kwargs = request.chat_template_kwargs or {}
    if kwargs:  # variables of the template only, never how it is chosen or run
        functions = tokenizer.apply_chat_template, tokenizer.hf.apply_chat_template
        reserved = {name for function in functions for name in inspect.signature(function).parameters}
        if taken := sorted(reserved & set(kwargs)):
            raise bad_request(f"chat_template_kwargs.{taken[0]} cannot be set by a request", "chat_template_kwargs")
    open_ended = bool(request.continue_final_message)
    if open_ended and request.add_generation_prompt:
        raise bad_request("continue_final_message and add_generation_prompt exclude each other", "continue_final_message")
    use = request.tool_use
    try:
        return tokenizer.apply_chat_template(
            messages_of(request.messages), add_generation_prompt=request.add_generation_prompt is not False and not open_ended,
            continue_final_message=open_ended, chat_template=dialect.template, tools=use and use.for_template(), **kwargs)
    except ValueError as error:
        raise bad_request(str(error), "messages") from None


def _params_of(request: ChatRequest, dialect: Dialect) -> SamplingParams:
    """Sampling parameters; without a limit the answer may fill the window. Raises ApiError."""
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request("top_logprobs is only allowed when logprobs is true", "top_logprobs")
    if request.prompt_logprobs is not None and request.stream:
        raise bad_request("prompt_logprobs is not available when stream is true", "prompt_logprobs")
    limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    params = request.sampling_params(max_tokens=limit, logprobs=(request.top_logprobs or 0) if request.logprobs else None)
    if dialect.special_reasoning:
        params = replace(params, skip_special_tokens=False)
    use = request.tool_use
    return params if use is None or use.mode == "none" else _with_tools(request, params, use, dialect)


def _with_tools(request: ChatRequest, params: SamplingParams, use: ToolUse, dialect: Dialect) -> SamplingParams:
    if use.forced:
        if params.structured is not None and request.response_format is None:  # that is of content, of which there is none
            raise bad_request(f"{field_of(request)} does not go with tool_choice {use.mode!r}: the answer can follow one form "
                              "only", "tool_choice")
        try:
            return replace(params, structured=use.grammar())
        except ValueError as error:
            raise bad_request(f"tools make too large a grammar for tool_choice {use.mode!r}: {error}", "tools") from None
    if dialect.tool_parser is None:
        raise bad_request("tools with tool_choice \"auto\" need a parser for the model's format, and its chat template "
                          "shows none: the server must be started with --tool-call-parser", "tools")
    return replace(params, skip_special_tokens=False) if dialect.special_tools else params


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a request comes to: a prompt, how to answer it, and what reads each of the answers."""

    prompt: str
    params: SamplingParams
    reader: Callable[[], MessageReader]
    short_ids: bool = False  # of calls: nine characters

    def call_id(self) -> str:
        """A new id of a call."""
        return uuid.uuid4().hex[:9] if self.short_ids else f"call_{uuid.uuid4().hex[:24]}"


def prepare(request: ChatRequest, tokenizer: Any, dialect: Dialect) -> Conversation:
    """Raises ApiError. Takes time with the length of the messages."""
    params, prompt = _params_of(request, dialect), prompt_of(request, tokenizer, dialect)
    begun, formed = _begun(request, prompt, dialect), params.structured is not None
    if params.structured is not None:
        params = replace(params, structured=_composed(params.structured, request, begun, tokenizer, dialect))
    use, thinks = request.tool_use, dialect.reasoning_parser is not None

    def reader() -> MessageReader:
        think = ThinkParser(bool(begun)) if thinks else None
        return MessageReader(think, _tool_parser(use, dialect, formed), use is None or use.parallel)

    return Conversation(prompt, params, reader, dialect.tool_parser == "mistral")


def _composed(structured: Structured, request: ChatRequest, begun: bool | None, tokenizer: Any,
              dialect: Dialect) -> Structured:
    """With the reasoning that may come before, and the calls that may come instead. Raises ApiError."""
    use, calls = request.tool_use, ""
    may_call = use is not None and use.mode == "auto"
    try:
        if use is not None and may_call:
            calls = TOOL_PARSERS[dialect.tool_parser or ""].grammar(use.schemas(), use.parallel,
                                                                    lambda marker: token_of(marker, tokenizer))
            if not calls:
                raise bad_request(f"{field_of(request)} does not go with tool_choice \"auto\" where calls are written in the "
                                  f"{dialect.tool_parser} format", "tool_choice")
        return structured if begun is None and not calls else after_reasoning(structured, begun, tokenizer, calls)
    except ValueError as error:
        why = "together with tools" if may_call else ("with a model that reasons first (if its template can turn that off: "
                                                      "chat_template_kwargs {\"enable_thinking\": false})")
        raise request.api_error(ValueError(f"structured cannot be used {why}: {error}")) from None


def _tool_parser(use: ToolUse | None, dialect: Dialect, formed: bool) -> ToolParser | None:
    """``formed``: a grammar holds for the answer."""
    if use is None or use.mode == "none":
        return None
    if use.mode == "named":
        return NamedParser(use.name or "")
    if use.mode == "required":
        return RequiredParser()
    parser = TOOL_PARSERS[dialect.tool_parser or ""]()
    return CallsOrContent(parser, use.schemas()) if formed else parser


def _begun(request: ChatRequest, prompt: str, dialect: Dialect) -> bool | None:
    """Whether the prompt has begun the reasoning; None where the answer has none."""
    if dialect.reasoning_parser is None:
        return None
    if request.continue_final_message:
        last = messages_of(request.messages[-1:])[0]["content"]
        return last.rfind(BEGIN) > last.rfind(END) or None
    tail = prompt.rstrip()
    return None if tail.endswith(END) else tail.endswith(BEGIN) or dialect.reasoning_parser == "deepseek_r1"


class ChatForm(Form):
    """`chat.completion` objects and their chunks."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, request_id: str, model: str, request: ChatRequest, tokens: TokenText, conversation: Conversation):
        super().__init__(request_id, model, request, tokens)
        self.request = request
        self._conversation = conversation
        self._named = isinstance(request.tool_choice, dict)

    def chunks(self, choice: Choice, delta: Delta) -> list[dict[str, Any]]:
        request = self.request
        rows = []
        if not choice.started:
            choice.started = True
            rows.append(self._entry(choice, {"role": "assistant", "content": ""}, None, None))
        fields = self._fields(choice.parts[-1])
        shown = delta.token_ids and (request.return_token_ids or request.logprobs)
        if fields or delta.finish_reason or shown:
            row = self._entry(choice, fields, self._finish(choice, delta.finish_reason), delta.stop_reason)
            if request.logprobs:
                row["logprobs"] = chat_logprobs(delta.logprobs or (), request.top_logprobs or 0, self.tokens)
            if request.return_token_ids:
                row["token_ids"] = list(delta.token_ids)
            rows.append(row)
        return rows

    def whole(self, choice: Choice) -> dict[str, Any]:
        request = self.request
        fields = self._fields(joined(choice.parts))
        content = fields.pop("content", None if fields else "")
        for call in fields.get("tool_calls", ()):
            del call["index"]
        row: dict[str, Any] = {
            "index": choice.index, "message": {"role": "assistant", "content": content, "refusal": None, **fields},
            "logprobs": None, "finish_reason": self._finish(choice, choice.finish_reason), "stop_reason": choice.stop_reason,
        }
        if request.logprobs:
            row["logprobs"] = chat_logprobs(choice.logprobs, request.top_logprobs or 0, self.tokens)
        if request.return_token_ids:
            row["token_ids"] = choice.token_ids
        return row

    def extras(self, choices: Sequence[Choice]) -> dict[str, Any]:
        first = choices[0]
        fields: dict[str, Any] = {}
        if self.request.return_token_ids:
            fields["prompt_token_ids"] = first.call.prompt
        if self.request.prompt_logprobs is not None:
            top = self.request.prompt_logprobs
            fields["prompt_logprobs"] = prompt_logprobs(first.call.prompt_logprobs, top, self.tokens)
        return fields

    def reader(self) -> MessageReader:
        return self._conversation.reader()

    def _fields(self, parts: Parts) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if parts.content:
            fields["content"] = parts.content
        if parts.reasoning and self.request.include_reasoning is not False:
            fields |= {"reasoning_content": parts.reasoning, "reasoning": parts.reasoning}  # both names are in use
        if parts.calls:
            fields["tool_calls"] = [self._call(call) for call in parts.calls]
        return fields

    def _call(self, call: CallDelta) -> dict[str, Any]:
        """Id, type and name come with the first piece of a call only."""
        if call.name is None:
            return {"index": call.index, "function": {"arguments": call.arguments}}
        return {"index": call.index, "id": self._conversation.call_id(), "type": "function",
                "function": {"name": call.name, "arguments": call.arguments}}

    def _finish(self, choice: Choice, reason: str | None) -> str | None:
        """"tool_calls" for an answer that came to its end with calls; to a named function "stop", as OpenAI has it."""
        called = reason == "stop" and not self._named and choice.reader is not None and choice.reader.called
        return "tool_calls" if called else reason

    @staticmethod
    def _entry(choice: Choice, delta: dict[str, Any], finish: str | None, stop: int | str | None) -> dict[str, Any]:
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": finish, "stop_reason": stop}

"""/v1/chat/completions: messages to a prompt through the model's template, and the wording of the answer."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from jaxkv.runtime.outputs import Delta
from jaxkv.serve.answer import Choice, Form
from jaxkv.serve.errors import bad_request
from jaxkv.serve.logprobs import TokenText, chat_logprobs, prompt_logprobs
from jaxkv.serve.protocol import ChatRequest
from jaxkv.types import SamplingParams


def messages_of(request: ChatRequest) -> list[dict[str, Any]]:
    """Messages as a template wants them: content is one text. Raises ApiError for parts that are not text."""
    messages = []
    for i, message in enumerate(request.messages):
        where = f"messages[{i}]"
        extra = {name: value for name, value in (message.model_extra or {}).items() if value}
        if unsupported := next((name for name in extra if name in ("tool_calls", "function_call", "audio")), None):
            raise bad_request(f"{where}.{unsupported} is not supported", f"{where}.{unsupported}",
                              "unsupported_parameter")
        content = message.content
        if content is None and message.role != "assistant":
            raise bad_request(f"{where}.content must be a string or a list of text parts, got null",
                              f"{where}.content")
        text = "\n".join(_part_text(part, f"{where}.content[{k}]") for k, part in enumerate(content)) \
            if isinstance(content, list) else content or ""
        messages.append({"role": message.role, "content": text} | ({"name": message.name} if message.name else {}))
    return messages


def _part_text(part: dict[str, Any], where: str) -> str:
    kind = part.get("type")
    if kind != "text":
        raise bad_request(f"{where}.type must be \"text\", got {str(kind)[:40]!r}", f"{where}.type",
                          "unsupported_content_part")
    if not isinstance(part.get("text"), str):
        raise bad_request(f"{where}.text must be a string, got {str(part.get('text'))[:40]!r}", f"{where}.text")
    return part["text"]


def prompt_of(request: ChatRequest, tokenizer: Any) -> str:
    """The prompt text the model's own template makes of the messages. Raises ApiError."""
    if tokenizer is None:
        raise bad_request("this server has no tokenizer: only /v1/completions with token ids works", "messages")
    kwargs = request.chat_template_kwargs or {}
    if kwargs:  # variables of the template only, never how it is chosen or run
        functions = tokenizer.apply_chat_template, tokenizer.hf.apply_chat_template
        reserved = {name for function in functions for name in inspect.signature(function).parameters}
        if taken := sorted(reserved & set(kwargs)):
            raise bad_request(f"chat_template_kwargs.{taken[0]} cannot be set by a request", "chat_template_kwargs")
    try:
        return tokenizer.apply_chat_template(
            messages_of(request), add_generation_prompt=request.add_generation_prompt is not False, **kwargs)
    except ValueError as error:
        raise bad_request(str(error), "messages") from None


def params_of(request: ChatRequest) -> SamplingParams:
    """Sampling parameters; without a limit the answer may fill the window."""
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request("top_logprobs is only allowed when logprobs is true", "top_logprobs")
    if request.prompt_logprobs is not None and request.stream:
        raise bad_request("prompt_logprobs is not available when stream is true", "prompt_logprobs")
    limit = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    return request.sampling_params(max_tokens=limit, logprobs=(request.top_logprobs or 0) if request.logprobs else None)


class ChatForm(Form):
    """`chat.completion` objects and their chunks."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, request_id: str, model: str, request: ChatRequest, tokens: TokenText):
        super().__init__(request_id, model, request, tokens)
        self.request = request

    def chunks(self, choice: Choice, delta: Delta) -> list[dict[str, Any]]:
        request = self.request
        rows = []
        if not choice.started:
            choice.started = True
            rows.append(self._entry(choice, {"role": "assistant", "content": ""}, None, None))
        shown = delta.token_ids and (request.return_token_ids or request.logprobs)
        if delta.text or delta.finish_reason or shown:
            row = self._entry(choice, {"content": delta.text} if delta.text else {}, delta.finish_reason,
                              delta.stop_reason)
            if request.logprobs:
                row["logprobs"] = chat_logprobs(delta.logprobs or (), request.top_logprobs or 0, self.tokens)
            if request.return_token_ids:
                row["token_ids"] = list(delta.token_ids)
            rows.append(row)
        return rows

    def whole(self, choice: Choice) -> dict[str, Any]:
        request = self.request
        row: dict[str, Any] = {
            "index": choice.index,
            "message": {"role": "assistant", "content": "".join(choice.text), "refusal": None},
            "logprobs": None, "finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason,
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
            fields["prompt_logprobs"] = prompt_logprobs(first.prompt_logprobs, top, self.tokens)
        return fields

    @staticmethod
    def _entry(choice: Choice, delta: dict[str, Any], finish: str | None, stop: int | str | None) -> dict[str, Any]:
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": finish, "stop_reason": stop}

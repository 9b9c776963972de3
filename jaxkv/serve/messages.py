"""The messages of a chat: their JSON, and what a chat template gets of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict

from jaxkv.serve.bounds import Items, check_levels
from jaxkv.serve.errors import bad_request, shown

STRICT = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
_ELSEWHERE = {"function_call": "use tool_calls", "audio": "messages hold text only"}


class CalledFunction(BaseModel):
    model_config = STRICT
    name: str
    arguments: Any = None  # JSON text of an object, or the object


class MessageToolCall(BaseModel):
    model_config = STRICT
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(BaseModel):
    model_config = STRICT
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Items[dict[str, Any]] | None = None
    name: str | None = None
    tool_calls: Items[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


def messages_of(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as a template wants them: content is one text, arguments of calls are objects. Raises ApiError for parts
    that are not text and for fields that a message of its role cannot have."""
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: ChatMessage, where: str) -> dict[str, Any]:
    for name, advice in _ELSEWHERE.items():
        if (message.model_extra or {}).get(name):
            raise bad_request(f"{where}.{name} is not supported: {advice}", f"{where}.{name}", "unsupported_parameter")
    _check_role(message, where)
    plain: dict[str, Any] = {"role": message.role, "content": _text(message, where)}
    if message.name:
        plain["name"] = message.name
    if message.tool_calls:
        plain["tool_calls"] = [_call(call, f"{where}.tool_calls[{k}]") for k, call in enumerate(message.tool_calls)]
    if message.tool_call_id is not None:
        plain["tool_call_id"] = message.tool_call_id
    if reasoning := message.reasoning_content or message.reasoning:
        plain["reasoning_content"] = reasoning
    return plain


def _check_role(message: ChatMessage, where: str) -> None:
    owners = {"tool_calls": "assistant", "reasoning_content": "assistant", "reasoning": "assistant", "tool_call_id": "tool"}
    for name, role in owners.items():
        if getattr(message, name) and message.role != role:
            raise bad_request(f"{where}.{name} is only allowed in messages of role {role}, got {message.role}",
                              f"{where}.{name}")


def _text(message: ChatMessage, where: str) -> str:
    content = message.content
    if content is None and message.role != "assistant":
        raise bad_request(f"{where}.content must be a string or a list of text parts, got null", f"{where}.content")
    if isinstance(content, list):
        return "\n".join(_part_text(part, f"{where}.content[{k}]") for k, part in enumerate(content))
    return content or ""


def _part_text(part: dict[str, Any], where: str) -> str:
    kind = part.get("type")
    if kind != "text":
        raise bad_request(f"{where}.type must be \"text\", got {shown(kind)}", f"{where}.type",
                          "unsupported_content_part")
    if not isinstance(part.get("text"), str):
        raise bad_request(f"{where}.text must be a string, got {shown(part.get('text'))}", f"{where}.text")
    return part["text"]


def _call(call: MessageToolCall, where: str) -> dict[str, Any]:
    arguments, name = call.function.arguments, f"{where}.function.arguments"
    if isinstance(arguments, str):
        try:
            arguments = orjson.loads(arguments or "{}")
            check_levels(arguments, name, name)
        except orjson.JSONDecodeError:
            arguments = ()  # refused below
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise bad_request(f"{name} must be JSON text of an object, got {shown(call.function.arguments)}", name)
    function = {"name": call.function.name, "arguments": arguments}
    return {"type": "function", "function": function} | ({"id": call.id} if call.id is not None else {})

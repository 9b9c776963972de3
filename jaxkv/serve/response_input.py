"""What /v1/responses asks, in the words of chat: input items as messages, tools and formats as chat nests them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jaxkv.serve.errors import bad_request, shown

_TEXTS = ("input_text", "output_text", "text")
_ITEMS = ("message", "function_call", "function_call_output", "reasoning")
_CHOICES = ("none", "auto", "required")
_NESTED = re.compile(r"(\btools\[\d+\]|\btool_choice)\.function\b")
_NAMES = {"messages": "input", "max_tokens": "max_output_tokens", "response_format": "text"}  # chat's -> ours


def our_words(param: str | None, message: str) -> tuple[str | None, str]:
    """Chat's name of a field and its message as ours."""
    param = param and _NESTED.sub(r"\1", param)
    return _NAMES.get(re.split(r"[\[.]", param or "")[0], param), _NESTED.sub(r"\1", message)


def messages_of(items: str | Sequence[dict[str, Any]], name: str = "input") -> list[dict[str, Any]]:
    """Items as chat messages; reasoning and calls go into the message of the assistant's turn. Raises ApiError for what is
    neither text nor a call."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(items):
        message = _message(item, f"{name}[{i}]")
        if messages and _same_turn(messages[-1], message):
            _merge(messages[-1], message)
        elif message:
            messages.append(message)
    return messages


def _same_turn(before: dict[str, Any], message: dict[str, Any]) -> bool:
    """Whether a message goes on with the assistant's turn before it: with a call, or behind reasoning or a call."""
    begun = "tool_calls" in before or "reasoning_content" in before and before["content"] is None
    return before.get("role") == message.get("role") == "assistant" and "reasoning_content" not in message and (
        begun or "tool_calls" in message)


def _merge(before: dict[str, Any], message: dict[str, Any]) -> None:
    for name in ("content", "tool_calls"):
        if more := message.get(name):
            before[name] = _parts(before.get(name))
            before[name] += _parts(more)


def _parts(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content or []


def _message(item: dict[str, Any], where: str) -> dict[str, Any]:
    """An input item as a chat message, empty for reasoning without text. Raises ApiError."""
    kind, role, content = item.get("type", "message"), item.get("role"), item.get("content")
    match kind:
        case "message":
            if role not in ("user", "assistant", "system", "developer"):
                raise bad_request(f"{where}.role must be user, assistant, system or developer, got {shown(role)}",
                                  f"{where}.role")
            return {"role": role, "content": _content(content, f"{where}.content")}
        case "function_call":
            return {"role": "assistant", "content": None, "tool_calls": [_call(item, where)]}
        case "function_call_output":
            output = _content(item.get("output"), f"{where}.output")
            return {"role": "tool", "content": output, "tool_call_id": _word(item, "call_id", where)}
        case "reasoning":
            parts = _content(content or [], f"{where}.content", ("reasoning_text",))
            text = parts if isinstance(parts, str) else "".join(part["text"] for part in parts)
            return {"role": "assistant", "content": None, "reasoning_content": text} if text else {}
    raise bad_request(f"{where}.type must be one of {', '.join(_ITEMS)}, got {shown(kind)}", f"{where}.type",
                      "unsupported_item")


def _content(content: Any, where: str, kinds: tuple[str, ...] = _TEXTS) -> str | list[dict[str, Any]]:
    """A string or text parts of chat. Raises ApiError."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(f"{where} must be a string or a list of text parts, got {type(content).__name__}", where)
    parts = []
    for k, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in kinds:
            raise bad_request(f"{where}[{k}].type must be one of {', '.join(kinds)}, got {shown(kind)}",
                              f"{where}[{k}].type", "unsupported_content_part")
        parts.append({"type": "text", "text": _word(part, "text", f"{where}[{k}]")})
    return parts


def _call(item: dict[str, Any], where: str) -> dict[str, Any]:
    function = {name: _word(item, name, where) for name in ("name", "arguments")}
    return {"id": _word(item, "call_id", where), "type": "function", "function": function}


def _word(item: dict[str, Any], name: str, where: str) -> str:
    if not isinstance(value := item.get(name), str):
        raise bad_request(f"{where}.{name} must be a string, got {shown(value)}", f"{where}.{name}")
    return value


def chat_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """A function tool as chat nests it; chat refuses any other."""
    if tool.get("type") != "function":
        return tool
    return {"type": "function", "function": {k: v for k, v in tool.items() if k != "type" and v is not None}}


def chat_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    """`tool_choice` as chat nests it. Raises ApiError."""
    if choice is None or choice in _CHOICES:
        return choice
    if isinstance(choice, dict) and choice.get("type") == "function" and isinstance(choice.get("name"), str):
        return {"type": "function", "function": {"name": choice["name"]}}
    raise bad_request(f'tool_choice must be one of {", ".join(_CHOICES)} or {{"type": "function", "name": ...}}, '
                      f"got {shown(choice)}", "tool_choice")


def chat_format(form: dict[str, Any]) -> dict[str, Any]:
    """`text.format` as chat's `response_format`."""
    if form.get("type") != "json_schema":
        return form
    return {"type": "json_schema", "json_schema": {k: v for k, v in form.items() if k != "type"}}

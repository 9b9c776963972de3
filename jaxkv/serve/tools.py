"""`tools` and `tool_choice`: their JSON, their limits, and the grammar that a forced call must follow.

Owns no model format: what a call looks like in the text of an answer is in ``parsers``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, Field

from jaxkv.params import Structured
from jaxkv.serve.errors import ApiError, bad_request, shown
from jaxkv.serve.messages import STRICT
from jaxkv.serve.parsers.json_calls import DEFINITIONS, call_schema

MAX_TOOLS = 128
MAX_TOOL_BYTES = 2**16  # of one tool as JSON


class FunctionTool(BaseModel):
    model_config = STRICT
    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    model_config = STRICT
    type: Literal["function"]
    function: FunctionTool


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request says about tools. ``mode``: "none", "auto", "required" or "named", which means ``name``."""

    tools: tuple[Tool, ...]
    mode: str
    name: str | None = None
    parallel: bool = True  # more than one call in an answer

    @property
    def forced(self) -> bool:
        return self.mode in ("required", "named")

    def for_template(self) -> list[dict[str, Any]]:
        """The tools as the client wrote them."""
        return [tool.model_dump(exclude_unset=True) for tool in self.tools]

    def schemas(self) -> dict[str, dict[str, Any]]:
        """Of the arguments of each tool."""
        return {tool.function.name: tool.function.parameters or _EMPTY for tool in self.tools}

    def grammar(self) -> Structured:
        """What a forced answer follows: the arguments of the named function, or an array of calls. Raises ApiError for
        tools whose shared definitions contradict each other."""
        if self.mode == "named":
            return Structured("json_schema", json.dumps(self.schemas()[self.name or ""], ensure_ascii=False))
        schema: dict[str, Any] = {"type": "array", "minItems": 1}
        if not self.parallel:
            schema["maxItems"] = 1
        schema["items"] = {"anyOf": [self._call_schema(i, schema) for i in range(len(self.tools))]}
        return Structured("json_schema", json.dumps(schema, ensure_ascii=False))

    def _call_schema(self, index: int, root: dict[str, Any]) -> dict[str, Any]:
        """One call without its definitions, which go to ``root``."""
        function = self.tools[index].function
        schema = call_schema(function.name, function.parameters or _EMPTY, "parameters", f"#/items/anyOf/{index}")
        for kind in DEFINITIONS:
            for name, definition in schema.pop(kind, {}).items():
                if root.setdefault(kind, {}).setdefault(name, definition) != definition:
                    where = f"tools[{index}].function.parameters.{kind}.{name}"
                    raise bad_request(f"{where[:200]} differs from another tool's definition of that name", "tools")
        return schema


_EMPTY = {"type": "object", "properties": {}}


def tool_use_of(tools: Sequence[Tool] | None, choice: Any, parallel: bool | None) -> ToolUse | None:
    """The request's tools, None if it has none. Raises ApiError that names the field."""
    if not tools:
        if choice not in (None, "none", "auto"):
            raise bad_request("tool_choice is only allowed when tools are given", "tool_choice")
        return None
    _check_tools(tools)
    mode, name = _choice(choice)
    if name is not None and name not in [tool.function.name for tool in tools]:
        raise bad_request(f"tool_choice names {name[:64]!r}, which is not in tools", "tool_choice.function.name")
    return ToolUse(tuple(tools), mode, name, parallel is not False)


def _choice(choice: Any) -> tuple[str, str | None]:
    if choice is None:
        return "auto", None
    if choice in ("none", "auto", "required"):
        return choice, None
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise bad_request('tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}, '
                          f"got {shown(choice)}", "tool_choice")
    return "named", name


def _check_tools(tools: Sequence[Tool]) -> None:
    if len(tools) > MAX_TOOLS:
        raise bad_request(f"tools may hold at most {MAX_TOOLS} entries, got {len(tools)}", "tools")
    seen: set[str] = set()
    for i, tool in enumerate(tools):
        where, name = f"tools[{i}].function", tool.function.name
        if name in seen:
            raise bad_request(f"{where}.name {name!r} is there twice", f"{where}.name")
        seen.add(name)
        if error := _check_size(tool, where) or _check_parameters(tool.function.parameters, f"{where}.parameters"):
            raise error


def _check_size(tool: Tool, where: str) -> ApiError | None:
    try:
        size = len(orjson.dumps(tool.model_dump(exclude_unset=True)))
    except (TypeError, ValueError):
        return bad_request(f"{where} is nested too deeply", where)
    return bad_request(f"{where} must be at most {MAX_TOOL_BYTES} bytes of JSON, got {size}", where) \
        if size > MAX_TOOL_BYTES else None


def _check_parameters(schema: dict[str, Any] | None, where: str) -> ApiError | None:
    if schema and schema.get("type", "object") != "object":
        return bad_request(f"{where}.type must be \"object\", got {shown(schema['type'])}", f"{where}.type")
    for kind in DEFINITIONS:
        if schema and not isinstance(schema.get(kind) or {}, dict):
            return bad_request(f"{where}.{kind} must be an object, got {shown(schema[kind])}", f"{where}.{kind}")
    return None

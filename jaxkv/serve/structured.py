"""The request fields that say what an answer must follow: OpenAI's response_format, vLLM's structured_outputs and guided_*.

Owns their shapes and the ``Structured`` they mean. Whether it compiles is found out by ``answer``.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import orjson
from pydantic import BaseModel, ConfigDict, Field

from jaxkv.params import Structured
from jaxkv.serve.bounds import Items
from jaxkv.serve.errors import bad_request, shown


class JsonSchema(BaseModel):
    """Always followed strictly, whatever ``strict`` says."""

    model_config = ConfigDict(strict=True)
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True)
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    json_: Any = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Items[str] | None = None
    grammar: str | None = None


class StructuredFields(Protocol):
    response_format: ResponseFormat | None
    structured_outputs: StructuredOutputs | None
    guided_json: Any
    guided_regex: str | None
    guided_choice: list[str] | None
    guided_grammar: str | None


def structured_of(request: StructuredFields) -> Structured | None:
    """What the answer must follow, None for nothing. Raises ApiError that names the field."""
    given = _given(request)
    if len(given) > 1:
        raise bad_request(f"only one of {' and '.join(given)} may be given", list(given)[1])
    if not given and request.structured_outputs is not None:
        raise bad_request("structured_outputs must hold one of json, json_object, regex, choice, grammar",
                          "structured_outputs")
    for name, (kind, value) in given.items():
        try:
            return Structured(kind, _text(kind, value, name))
        except ValueError as error:
            raise bad_request(str(error).replace("structured.value", name), name) from None
    return None


def field_of(request: StructuredFields) -> str:
    """The field that ``structured_of`` took it from, "structured" if there is none."""
    return next(iter(_given(request)), "structured")


def _given(request: StructuredFields) -> dict[str, tuple[str, Any]]:
    """Path of each field that asks for something -> (kind, value)."""
    found: dict[str, tuple[str, Any]] = {}
    form, outputs = request.response_format, request.structured_outputs
    if form is not None and form.type == "json_object":
        found["response_format"] = "json_object", None
    elif form is not None and form.type == "json_schema":
        found["response_format.json_schema"] = "json_schema", form.json_schema and form.json_schema.schema_
    if outputs is not None:
        found |= {"structured_outputs.json": ("json_schema", outputs.json_),
                  "structured_outputs.json_object": ("json_object", outputs.json_object or None),
                  "structured_outputs.regex": ("regex", outputs.regex),
                  "structured_outputs.choice": ("choice", outputs.choice),
                  "structured_outputs.grammar": ("grammar", outputs.grammar)}
    found |= {"guided_json": ("json_schema", request.guided_json), "guided_regex": ("regex", request.guided_regex),
              "guided_choice": ("choice", request.guided_choice), "guided_grammar": ("grammar", request.guided_grammar)}
    return {name: pair for name, pair in found.items() if pair[1] is not None or name.startswith("response_format")}


def _text(kind: str, value: Any, name: str) -> str:
    """The value of a ``Structured``. Raises ApiError."""
    if kind == "json_object":
        return ""
    if kind == "json_schema" and not isinstance(value, dict | str):
        raise bad_request(f"{name} must hold a JSON schema, got {shown(value)}", name)
    return value if isinstance(value, str) else orjson.dumps(value).decode()

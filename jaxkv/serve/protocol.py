"""The JSON of requests: which fields there are, their types, and the ``SamplingParams`` they mean.

Owns the request models and the list of known fields that this version refuses. Limits on values are those of
``jaxkv.types.SamplingParams``; a field this file does not know is ignored with one log line, as vLLM does.
"""

from __future__ import annotations

import logging
from dataclasses import fields
from functools import cached_property
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, Field, ValidationError

from jaxkv.serve.errors import ApiError, bad_request, from_validation, from_value_error
from jaxkv.serve.messages import STRICT as _STRICT
from jaxkv.serve.messages import ChatMessage
from jaxkv.serve.structured import ResponseFormat, StructuredOutputs, field_of, structured_of
from jaxkv.serve.tools import Tool, ToolUse, tool_use_of
from jaxkv.types import CacheHints, SamplingParams

R = TypeVar("R", bound="GenerationRequest")
log = logging.getLogger("jaxkv.serve")

# Fields of the OpenAI API or of vLLM that would change the answer and are not implemented -> values that ask nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "chat_template": (),
    "audio": (), "continue_final_message": (False,), "documents": ([],), "function_call": ("none", "auto"),
    "functions": ([],), "guided_whitespace_pattern": (),
    "length_penalty": (1, 1.0), "modalities": (["text"],), "prefix": (), "prompt_embeds": (),
    "structural_tag": (), "suffix": ("",), "tool_choice": ("none", "auto"),
    "tools": ([],), "truncate_prompt_tokens": (), "use_beam_search": (False,), "web_search_options": (),
}
_ADVICE = {"functions": ": use tools", "function_call": ": use tool_choice",
           "chat_template": ": templates come from the model or from --chat-template"}
_INERT = {"metadata", "store", "service_tier", "user", "parallel_tool_calls", "reasoning_effort", "verbosity",
          "prompt_cache_key", "prompt_cache_retention", "safety_identifier"}


class StreamOptions(BaseModel):
    model_config = _STRICT
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(BaseModel):
    """What completions and chat share. None stands for "not given", as clients send null for it."""

    model_config = _STRICT
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    best_of: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    prompt_logprobs: int | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    session_id: str | None = None
    end_session: bool | None = None
    retention: float | None = None
    no_store: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def cache_hints(self) -> CacheHints:
        """What the request says about its KV. Raises ApiError that names the request's field."""
        given = {f.name: value for f in fields(CacheHints) if (value := getattr(self, f.name)) is not None}
        try:
            return CacheHints(**given)
        except ValueError as error:
            raise self.api_error(error) from None

    def sampling_params(self, **overrides: Any) -> SamplingParams:
        """Raises ApiError that names the request's field. ``overrides`` win over the fields."""
        values = {name: value for name in _SAMPLING if (value := getattr(self, name, None)) is not None}
        if self.logit_bias is not None:
            values["logit_bias"] = _token_keys(self.logit_bias)
        values["structured"] = structured_of(self)
        values |= overrides
        try:
            return SamplingParams(**values)
        except ValueError as error:
            raise self.api_error(error) from None

    def api_error(self, error: ValueError) -> ApiError:
        """What the engine or SamplingParams complained about, in this request's words."""
        field = field_of(self)
        return from_value_error(error, {*type(self).model_fields, field}, {"structured": field} | self.renamed())

    def renamed(self) -> dict[str, str]:
        """Engine field -> field of this request that set it."""
        return {}

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def usage_in_every_chunk(self) -> bool:
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class CompletionRequest(GenerationRequest):
    """/v1/completions. ``prompt`` is checked by ``completions.prompts_of``: pydantic's union errors help nobody."""

    prompt: Any = None
    echo: bool | None = None
    logprobs: int | None = None


class ChatRequest(GenerationRequest):
    """/v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @cached_property
    def tool_use(self) -> ToolUse | None:
        """The request's tools, None if it has none. Raises ApiError that names the field."""
        return tool_use_of(self.tools, self.tool_choice, self.parallel_tool_calls)

    def renamed(self) -> dict[str, str]:
        names = {"logprobs": "top_logprobs", "prompt": "messages"}
        if self.tool_use is not None and self.tool_use.forced:
            names["structured"] = "tools"
        return names | ({"max_tokens": "max_completion_tokens"} if self.max_completion_tokens is not None else {})


_SAMPLING = {"n", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
             "presence_penalty", "frequency_penalty", "prompt_logprobs", "seed", "stop", "stop_token_ids", "ignore_eos",
             "skip_special_tokens", "include_stop_str_in_output"}


def parse(model: type[R], body: bytes, ignored: set[str]) -> R:
    """The request in ``body``; ``ignored`` remembers which unknown fields were logged. Raises ApiError."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise bad_request(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise bad_request(f"the body must be a JSON object, got {type(data).__name__}")
    try:
        request = model.model_validate(data)
    except ValidationError as error:
        raise from_validation(error) from None
    _check_fields(request, ignored)
    return request


def _check_fields(request: GenerationRequest, ignored: set[str]) -> None:
    for name, value in (request.model_extra or {}).items():
        if value is None or name in _INERT:
            continue
        if name in _UNSUPPORTED:
            if value not in _UNSUPPORTED[name]:
                advice = _ADVICE.get(name, "")
                raise bad_request(f"{name} is not supported{advice}", name, "unsupported_parameter")
        elif name not in ignored and len(ignored) < 100:  # bounded: names come from outside
            ignored.add(name)
            log.warning("ignoring unknown request field %.60r (said once per name)", name)
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise bad_request(f"best_of is not supported, got {request.best_of} with n = {request.n or 1}", "best_of",
                          "unsupported_parameter")
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options is only allowed when stream is true", "stream_options")


def _token_keys(bias: dict[str, float]) -> dict[int, float]:
    keys = {}
    for token, value in bias.items():
        if not token.isdecimal():
            raise bad_request(f"logit_bias keys must be token ids, got {token[:40]!r}", "logit_bias")
        keys[int(token)] = value
    return keys

"""The JSON of requests: which fields there are, their types, and the ``SamplingParams`` they mean.

Owns the request models and the list of known fields that this version refuses. Limits on values are those of
``jaxkv.params.SamplingParams``; a field this file does not know is ignored with one log line, as vLLM does.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import fields
from functools import cached_property
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from jaxkv.params import MAX_LOGIT_BIAS, CacheHints, SamplingParams
from jaxkv.serve.bounds import MAX_LEVELS, Items, at_most, check_levels, json_of
from jaxkv.serve.errors import ApiError, bad_request, from_validation, from_value_error, shown
from jaxkv.serve.messages import STRICT as _STRICT
from jaxkv.serve.messages import ChatMessage
from jaxkv.serve.pieces import PIECE
from jaxkv.serve.structured import ResponseFormat, StructuredOutputs, field_of, structured_of
from jaxkv.serve.tools import MAX_TOOLS, Tool, ToolUse, tool_use_of

R = TypeVar("R", bound="ApiRequest")
log = logging.getLogger("jaxkv.serve")

# Fields of the OpenAI API or of vLLM that would change the answer and are not implemented -> values that ask nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (), "bad_words": ([],), "chat_template": (), "early_stopping": (False,), "echo": (False,),
    "kv_transfer_params": (), "logits_processors": ([],), "media_io_kwargs": (), "mm_processor_kwargs": (),
    "repetition_detection": (), "truncation_side": ("left",), "vllm_xargs": ({},),
    "audio": (), "continue_final_message": (False,), "documents": ([],), "function_call": ("none", "auto"),
    "functions": ([],), "guided_whitespace_pattern": (),
    "length_penalty": (1, 1.0), "modalities": (["text"],), "prefix": (), "prompt_embeds": (),
    "structural_tag": (), "suffix": ("",), "tool_choice": ("none", "auto"),
    "tools": ([],), "use_beam_search": (False,), "web_search_options": (),
}
_ADVICE = {"functions": ": use tools", "function_call": ": use tool_choice",
           "chat_template": ": templates come from the model or from --chat-template"}
_INERT = {"metadata", "store", "service_tier", "user", "parallel_tool_calls", "reasoning_effort", "verbosity",
          "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "prediction", "request_id",
          "spaces_between_special_tokens"}
COMPLETION_TOKENS = 16  # max_tokens of a completion that names none, as in the OpenAI API
MAX_STOPS = 64  # stop strings of a request: each is looked for after every token
MAX_MESSAGES = 4096  # of a chat, and calls in them: checking one takes microseconds in which no other thread runs
NO_DEFAULTS: Mapping[str, Any] = MappingProxyType({})


def count_of(prompt: Any) -> int:
    """How many prompts a field holds, by its first item: a list of token ids is one."""
    return len(prompt) if isinstance(prompt, list) and prompt and isinstance(prompt[0], list | str) else 1


class StreamOptions(BaseModel):
    model_config = _STRICT
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class ApiRequest(BaseModel):
    """What every request shares. None stands for "not given", as clients send null for it."""

    forwards_extra: ClassVar[bool] = False  # unknown fields are those of another request, which is checked in its turn
    model_config = _STRICT
    model: str | None = None
    _size: int = PrivateAttr(0)

    @property
    def size(self) -> int:
        """Bytes of the body that this was read from, 0 if from none."""
        return self._size

    def api_error(self, error: ValueError) -> ApiError:
        """What the engine or SamplingParams complained about, in this request's words."""
        return from_value_error(error, set(type(self).model_fields), self.renamed())

    def renamed(self) -> dict[str, str]:
        """Engine field -> field of this request that set it."""
        return {}

    def fill(self, defaults: Mapping[str, Any]) -> None:
        """Takes the model's own sampling defaults for fields that were not given."""

    def check(self) -> None:
        """Raises ApiError for fields that do not go together."""


class PromptRequest(ApiRequest):
    """What requests with a prompt for the engine share."""

    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    priority: int | None = None
    cache_salt: str | None = None
    session_id: str | None = None
    end_session: bool | None = None
    retention: float | None = None
    no_store: bool | None = None

    def cache_hints(self) -> CacheHints:
        """What the request says about its KV. Raises ApiError that names the request's field."""
        given = {f.name: value for f in fields(CacheHints) if (value := getattr(self, f.name)) is not None}
        try:
            return CacheHints(**given)
        except ValueError as error:
            raise self.api_error(error) from None

    def cut(self, ids: list[int], window: int, answer: int) -> list[int]:
        """The last ``truncate_prompt_tokens`` ids of a prompt; -1: as many as leave ``answer`` tokens of the window."""
        keep = self.truncate_prompt_tokens
        if keep is None:
            return ids
        if keep != -1 and not 1 <= keep <= window:
            raise bad_request(f"truncate_prompt_tokens must be -1 or in [1, {window}], got {keep}", "truncate_prompt_tokens")
        return ids[-max(1, window - answer if keep == -1 else keep):]


class GenerationRequest(PromptRequest):
    """What completions and chat share."""

    replaceable: ClassVar[Mapping[str, str]] = MappingProxyType({"n": "n"})  # field that another may replace -> SamplingParams'
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
    logit_bias: Annotated[dict[str, float], at_most(MAX_LOGIT_BIAS)] | None = None
    prompt_logprobs: int | None = None
    seed: int | None = None
    stop: str | Annotated[Items[str], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Items[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: Annotated[StructuredOutputs, at_most(16)] | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: Items[str] | None = None
    guided_grammar: str | None = None

    def fill(self, defaults: Mapping[str, Any]) -> None:
        for name, value in defaults.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def check(self) -> None:
        self.check_replaceable()
        n = self.n or 1
        if self.best_of is not None and self.best_of < n:
            raise bad_request(f"best_of must be at least n ({n}), got {self.best_of}", "best_of")
        if self.best_of is not None and self.best_of > n and self.stream:
            raise bad_request(f"best_of must equal n ({n}) when stream is true, got {self.best_of}", "best_of")
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options is only allowed when stream is true", "stream_options")

    def check_replaceable(self) -> None:
        """Raises ApiError for a field that would be refused if it stood alone, whatever replaces it."""
        for name, limited in self.replaceable.items():
            if (value := getattr(self, name)) is not None:
                try:
                    SamplingParams(**{limited: value})
                except ValueError as error:
                    raise from_value_error(error, {name}, {limited: name}) from None

    def prompt_count(self) -> int:
        """How many prompts the request has."""
        return 1

    def check_count(self, most: int) -> None:
        """Raises ApiError when prompts and answers to each are more than ``most`` sequences."""
        count, each = self.prompt_count(), self.best_of or self.n or 1
        if count * each > most:
            name = "prompt" if count > 1 else self.renamed().get("n", "n")
            raise bad_request(f"{name}: {count} prompts with {each} answers to each do not fit: this server takes {most} "
                              "sequences at once", name)

    def kept(self, count: int) -> int:
        """How many of ``count`` answers to a prompt are returned."""
        return count if self.best_of is None else self.n or 1

    def sampling_params(self, **overrides: Any) -> SamplingParams:
        """Raises ApiError that names the request's field. ``overrides`` win over the fields."""
        values = {name: value for name in _SAMPLING if (value := getattr(self, name, None)) is not None}
        if self.logit_bias is not None:
            values["logit_bias"] = _token_keys(self.logit_bias)
        values["structured"] = structured_of(self)
        values |= overrides
        if self.best_of is not None:
            values["n"] = self.best_of
            if self.best_of > self.kept(0) and values.get("logprobs") is None:
                values["logprobs"] = 0  # the best are told by their log-probabilities
        try:
            return SamplingParams(**values)
        except ValueError as error:
            raise self.api_error(error) from None

    def api_error(self, error: ValueError) -> ApiError:
        field = field_of(self)
        refusal = from_value_error(error, {*type(self).model_fields, field}, {"structured": field} | self.renamed())
        if str(error).startswith("structured cannot be compiled") and getattr(self, "tools", None) \
                and getattr(self, "tool_choice", None) in (None, "auto"):
            refusal.message += " (its grammar is also that of the calls of tools)"
        return refusal

    def renamed(self) -> dict[str, str]:
        return {"n": "best_of"} if self.best_of is not None else {}

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def usage_in_every_chunk(self) -> bool:
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class CompletionRequest(GenerationRequest):
    """/v1/completions. ``prompt`` is checked by ``completions.prompts_of``: pydantic's union errors help nobody."""

    replaceable = MappingProxyType({"n": "n", "prompt_logprobs": "prompt_logprobs"})
    prompt: Any = None
    echo: bool | None = None
    logprobs: int | None = None

    def prompt_count(self) -> int:
        return count_of(self.prompt)

    def fill(self, defaults: Mapping[str, Any]) -> None:
        limit = min(COMPLETION_TOKENS, defaults.get("max_tokens", COMPLETION_TOKENS))
        super().fill({**defaults, "max_tokens": limit})


class ChatRequest(GenerationRequest):
    """/v1/chat/completions."""

    model_config = ConfigDict(title="ChatCompletionRequest")
    replaceable = MappingProxyType({"n": "n", "max_tokens": "max_tokens"})
    messages: Annotated[Items[ChatMessage], at_most(MAX_MESSAGES, "tool_calls"), at_most(MAX_MESSAGES)] = Field(min_length=1)
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: Annotated[Items[Tool], at_most(MAX_TOOLS)] | None = None
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
        names = super().renamed() | {"logprobs": "top_logprobs", "prompt": "messages"}
        if self.tool_use is not None and self.tool_use.forced:
            names["structured"] = "tools"
        return names | ({"max_tokens": "max_completion_tokens"} if self.max_completion_tokens is not None else {})


_SAMPLING = {"n", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
             "presence_penalty", "frequency_penalty", "prompt_logprobs", "seed", "stop", "stop_token_ids", "ignore_eos",
             "skip_special_tokens", "include_stop_str_in_output"}


def parse(model: type[R], body: bytes, ignored: set[str], defaults: Mapping[str, Any] = NO_DEFAULTS) -> R:
    """The request in ``body``; ``ignored`` remembers which unknown fields were logged. ``defaults``: the model's own, for
    sampling fields that were not given. Raises ApiError. Takes time with the length."""
    data = json_of(body)
    if not isinstance(data, dict):
        raise bad_request(f"the body must be a JSON object, got {type(data).__name__}")
    if len(body) <= PIECE and body.count(b"[") + body.count(b"{") > MAX_LEVELS:
        for name, value in data.items():
            check_levels(value, name[:100], name[:100])
    request = validated(model, data, ignored)
    request._size = len(body)
    request.fill(defaults)
    return request


def validated(model: type[R], data: dict[str, Any], ignored: set[str]) -> R:
    """``data`` as a request. Raises ApiError."""
    try:
        request = model.model_validate(data)
    except ValidationError as error:
        raise from_validation(error) from None
    if not model.forwards_extra:
        _check_extra(request, ignored)
    request.check()
    return request


def _check_extra(request: ApiRequest, ignored: set[str]) -> None:
    for name, value in (request.model_extra or {}).items():
        if value is None or name in _INERT:
            continue
        if name in _UNSUPPORTED:
            if value not in _UNSUPPORTED[name]:
                advice = _ADVICE.get(name, "")
                raise bad_request(f"{name} is not supported{advice}, got {shown(value)}", name, "unsupported_parameter")
        elif name not in ignored and len(ignored) < 100:  # bounded: names come from outside
            ignored.add(name)
            log.warning("ignoring unknown request field %.60r (said once per name)", name)


def _token_keys(bias: dict[str, float]) -> dict[int, float]:
    keys = {}
    for token, value in bias.items():
        if not (token.isascii() and token.isdecimal() and len(token) <= 10):
            raise bad_request(f"logit_bias keys must be token ids, got {shown(token)}", "logit_bias")
        keys[int(token)] = value
    return keys

"""One input line: from its bytes to requests for the engine, and from their deltas to the line's record.

Owns the two line formats. What a request body means and how an answer is worded is the server's business: the same
classes do both. Nothing here fails: a line that cannot be answered becomes a ``Refused``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any

import orjson

from jaxkv.generate.lines import digest
from jaxkv.runtime.outputs import Delta
from jaxkv.runtime.structured.compiler import Grammar, GrammarCompiler
from jaxkv.runtime.tokenizer import Tokenizer
from jaxkv.serve import chat, completions
from jaxkv.serve.answer import Choice, Form, best_of, usage_of
from jaxkv.serve.bounds import check_levels
from jaxkv.serve.calls import Call, Mailbox
from jaxkv.serve.dialect import ChatOptions, choose_dialect
from jaxkv.serve.envelope import Envelope, envelope_of
from jaxkv.serve.errors import ApiError, bad_request, generation_failed
from jaxkv.serve.logprobs import TokenText
from jaxkv.serve.protocol import ChatRequest, CompletionRequest, GenerationRequest, parse

log = logging.getLogger("jaxkv")
_URLS = ("/v1/chat/completions", "/v1/completions")
_SEED_BYTES = 8


@dataclass(frozen=True)
class Refused:
    """A line that gets an error record."""

    number: int
    digest: str
    record: dict[str, Any]


class Work:
    """A line that is being answered: ``calls`` go to the engine, their deltas come back through ``take``."""

    def __init__(self, number: int, line: bytes, envelope: Envelope, request: GenerationRequest, form: Form,
                 calls: list[Call], grammar: Grammar | None) -> None:
        self.number, self.digest, self.calls = number, digest(line), calls
        self.grammar = grammar  # kept for the engine, which asks for it when it takes the calls
        self.num_sequences = sum(call.params.n for call in calls)
        self._envelope, self._request, self._form = envelope, request, form
        self._n = calls[0].params.n
        self._choices = [Choice(call.position * self._n + child, call, form.reader())
                         for call in calls for child in range(self._n)]
        self._unfinished = len(self._choices)

    def take(self, call: Call, delta: Delta) -> bool:
        """Takes the next delta of one of the calls; True when it was the last."""
        self._choices[call.position * self._n + delta.index].add(delta)
        self._unfinished -= delta.finish_reason is not None
        return self._unfinished == 0

    def refuse(self, error: ValueError) -> Refused:
        """The engine would not have one of the calls."""
        return Refused(self.number, self.digest, self._envelope.refusal(self._request.api_error(error)))

    def fail(self, why: str) -> Refused:
        """The engine ended one of the calls."""
        return Refused(self.number, self.digest, self._envelope.refusal(generation_failed(why)))

    def record(self) -> dict[str, Any]:
        """The output record, "line" and "digest" left to the journal."""
        usage = usage_of(self.calls, self._choices)
        best = best_of(self._choices, self._n, self._request.kept(self._n))
        if self._envelope.plain:
            cached = usage["prompt_tokens_details"]["cached_tokens"]
            return self._envelope.fields | _plain_record(best, self._form, cached)
        body = self._form.head | {"choices": [self._form.whole(choice) for choice in best], "usage": usage} \
            | self._form.extras(best)
        return self._envelope.answer(200, body)


class Preparer:
    """Turns lines into ``Work``; called from the pipeline's thread.

    ``overrides``: sampling fields that win over what a line says. A line without a seed gets one made from ``seed`` and
    its number, so that its answer does not depend on what ran before, be it in another process. ``defaults``: the model's
    sampling defaults; ``window``: its tokens. ``grammars`` compiles what answers must follow here, as steps would wait for it
    on the engine's thread.
    """

    def __init__(self, model_name: str, tokenizer: Tokenizer | None, overrides: Mapping[str, Any], seed: int,
                 defaults: Mapping[str, Any], window: int, grammars: GrammarCompiler | None) -> None:
        self._model_name, self._tokenizer = model_name, tokenizer
        self._defaults, self._window, self._grammars = defaults, window, grammars
        self._overrides, self._seed = dict(overrides), seed
        self._dialect = choose_dialect(ChatOptions(), tokenizer)
        self._ignored: set[str] = set()  # unknown fields that were logged

    def __call__(self, number: int, line: bytes) -> Work | Refused:
        envelope = Envelope(False, {"id": f"batch_req_{digest(line)}-{number}"})
        try:
            try:
                data = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise bad_request(f"the line is not valid JSON: {error}", code="invalid_json_line") from None
            if not isinstance(data, dict):
                raise bad_request(f"the line must be a JSON object, got {type(data).__name__}")
            check_levels(data, "the line")
            envelope = envelope_of(data, envelope)
            return self._work(number, line, data, envelope)
        except ApiError as error:
            return Refused(number, digest(line), envelope.refusal(error))
        except Exception:  # ends this line and not the batch
            log.exception("line %d cannot be prepared", number)
            why = "internal error: the line cannot be prepared"
            return Refused(number, digest(line), envelope.refusal(generation_failed(why)))

    def _work(self, number: int, line: bytes, data: dict[str, Any], envelope: Envelope) -> Work:
        """Raises ApiError."""
        url, body = _request_of(data, envelope.plain)
        name = f"line-{number}"
        form: Form
        request: GenerationRequest
        if url == _URLS[0]:
            chat_request = parse(ChatRequest, orjson.dumps(body), self._ignored, self._defaults)
            talk = chat.prepare(chat_request, self._tokenizer, self._dialect)
            params, prompts = talk.params, [self._encode(talk.prompt, bool(chat_request.add_special_tokens))]
            request = chat_request
            tokens = TokenText(self._tokenizer, chat_request.return_tokens_as_token_ids)
            form = chat.ChatForm(f"chatcmpl-{name}", self._model_name, chat_request, tokens, talk)
        else:
            completion = parse(CompletionRequest, orjson.dumps(body), self._ignored, self._defaults)
            params, rows = completions.params_of(completion), completions.prompts_of(completion)
            if envelope.plain and completion.prompt != rows[0]:
                raise bad_request("prompt must be one text or one list of token ids", "prompt")
            special = completion.add_special_tokens is not False
            prompts = [self._encode(row, special) if isinstance(row, str) else (row, None) for row in rows]
            request = completion
            tokens = TokenText(self._tokenizer, completion.return_tokens_as_token_ids)
            form = completions.CompletionForm(f"cmpl-{name}", self._model_name, completion, tokens)
        if request.stream:
            raise bad_request("stream is not available in a batch", "stream")
        hints = request.cache_hints()
        grammar = None
        try:
            params = replace(params, **self._overrides)
            if params.structured is not None and self._grammars is not None:
                grammar = self._grammars.compile(params.structured)
        except ValueError as error:
            raise request.api_error(error) from None
        cut = [(request.cut(ids, self._window, params.max_tokens or 1), ids, text) for ids, text in prompts]
        calls = [Call(f"{name}-{index}", kept,
                      params if params.seed is not None else replace(params, seed=self._draw_seed(number, index)),
                      Mailbox(), index, text if len(kept) == len(ids) else None, hints)
                 for index, (kept, ids, text) in enumerate(cut)]
        return Work(number, line, envelope, request, form, calls, grammar)

    def _encode(self, text: str, add_special_tokens: bool) -> tuple[list[int], str | None]:
        if self._tokenizer is None:
            raise bad_request("prompt must be token ids: the tokenizer was left out", "prompt")
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens), text

    def _draw_seed(self, number: int, index: int) -> int:
        data = blake2b(f"{self._seed}/{number}/{index}".encode(), digest_size=_SEED_BYTES).digest()
        return int.from_bytes(data, "little", signed=True)


def _request_of(data: Mapping[str, Any], plain: bool) -> tuple[str, dict[str, Any]]:
    """Endpoint and body. Raises ApiError."""
    if plain:
        return _URLS[1], {key: value for key, value in data.items() if key != "id"} | {"return_token_ids": True}
    if data.get("method", "POST") != "POST":
        raise bad_request(f"method must be \"POST\", got {data['method']!r:.80}", "method")
    url, body = data.get("url"), data.get("body")
    if url not in _URLS:
        raise bad_request(f"url must be one of {', '.join(_URLS)}, got {url!r:.80}", "url")
    if not isinstance(body, dict):
        raise bad_request(f"body must be a JSON object, got {type(body).__name__}", "body")
    return url, body


def _plain_record(choices: list[Choice], form: Form, cached: int) -> dict[str, Any]:
    """Fields of the first answer; of all of them under "outputs" if there are several."""
    outputs = [_plain_output(form.whole(choice)) for choice in choices]
    record = outputs[0] | {"num_prompt_tokens": len(choices[0].call.prompt), "num_cached_tokens": cached}
    return record | ({"outputs": outputs} if len(outputs) > 1 else {})


def _plain_output(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice of a completion without what stands elsewhere or was not asked for."""
    left_out = {"index", "prompt_token_ids"} | ({"logprobs"} if choice["logprobs"] is None else set())
    return {name: value for name, value in choice.items() if name not in left_out}

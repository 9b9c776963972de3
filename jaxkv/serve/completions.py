"""/v1/completions: prompts in four shapes, echo, and the wording of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxkv.params import SamplingParams
from jaxkv.runtime.outputs import Delta
from jaxkv.serve.answer import Choice, Form
from jaxkv.serve.errors import bad_request, shown
from jaxkv.serve.logprobs import TokenText, completion_logprobs, prompt_logprobs
from jaxkv.serve.protocol import CompletionRequest
from jaxkv.types import Logprobs

SCANNED = 2**14  # token ids that are looked at in one go, in which no other thread runs


def prompts_of(request: CompletionRequest) -> list[str | list[int]]:
    """The prompts of a request. Raises ApiError."""
    return rows_of(request.prompt, "prompt")


def rows_of(prompt: Any, name: str) -> list[str | list[int]]:
    """Prompts in a field: a text, a list of texts, token ids or a list of them. Raises ApiError."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        found = "an empty list" if prompt == [] else "nothing" if prompt is None else type(prompt).__name__
        raise bad_request(f"{name} must be a string, a list of strings, token ids or a list of them, got {found}", name)
    if isinstance(prompt[0], str) and all(isinstance(item, str) for item in prompt):
        return prompt
    nested = isinstance(prompt[0], list)
    rows = prompt if nested else [prompt]
    for i, row in enumerate(rows):
        where = f"{name}[{i}]" if nested else name
        if not isinstance(row, list) or not row:
            raise bad_request(f"{where} must be a list of token ids, got {shown(row)}", name)
        for start in range(0, len(row), SCANNED):
            if bad := _no_ids(row[start : start + SCANNED]):
                raise bad_request(f"{where} must hold token ids (integers from 0), got {shown(bad[0])}", name)
    return rows


def _no_ids(row: list[Any]) -> list[Any]:
    """What of a list is no token id."""
    if set(map(type, row)) == {int} and min(row) >= 0:  # no step of it is Python's
        return []
    return [t for t in row if type(t) is not int or t < 0]


def params_of(request: CompletionRequest) -> SamplingParams:
    """Sampling parameters; echo with logprobs asks for those of the prompt too."""
    overrides: dict[str, Any] = {"logprobs": request.logprobs}
    if request.echo:
        if request.logprobs is not None:
            overrides["prompt_logprobs"] = max(request.logprobs, request.prompt_logprobs or 0)
        if request.max_tokens == 0:
            overrides["max_tokens"] = 1  # something has to run; CompletionForm drops the answer
    if request.prompt_logprobs is not None and request.stream:
        raise bad_request("prompt_logprobs is not available when stream is true", "prompt_logprobs")
    return request.sampling_params(**overrides)


class CompletionForm(Form):
    """`text_completion` objects; chunks and whole answers have the same shape."""

    kind = chunk_kind = "text_completion"

    def __init__(self, request_id: str, model: str, request: CompletionRequest, tokens: TokenText):
        super().__init__(request_id, model, request, tokens)
        self.request = request
        self.silent = bool(request.echo) and request.max_tokens == 0

    def chunks(self, choice: Choice, delta: Delta) -> list[dict[str, Any]]:
        request, first = self.request, not choice.started
        ids, text, logprobs = list(delta.token_ids), delta.text, delta.logprobs
        if self.silent:
            ids, text, logprobs = [], "", ()
        if first and request.echo:
            text = self._prompt_text(choice) + text
        if not (text or delta.finish_reason or (ids and (request.return_token_ids or request.logprobs is not None))):
            return []
        choice.started = True
        entry: dict[str, Any] = {"index": choice.index, "text": text, "logprobs": None,
                                 "finish_reason": delta.finish_reason, "stop_reason": delta.stop_reason}
        if request.logprobs is not None:
            entry["logprobs"], choice.offset = self._logprobs(choice, ids, logprobs, first)
        if request.return_token_ids:
            entry["token_ids"] = ids
            if first:
                entry["prompt_token_ids"] = choice.call.prompt
        return [entry]

    def whole(self, choice: Choice) -> dict[str, Any]:
        request = self.request
        ids, text, logprobs = choice.token_ids, "".join(choice.text), choice.logprobs
        if self.silent:
            ids, text, logprobs = [], "", []
        if request.echo:
            text = self._prompt_text(choice) + text
        entry: dict[str, Any] = {"index": choice.index, "text": text, "logprobs": None,
                                 "finish_reason": choice.finish_reason, "stop_reason": choice.stop_reason}
        if request.logprobs is not None:
            entry["logprobs"], _ = self._logprobs(choice, ids, logprobs, True)
        if request.prompt_logprobs is not None:
            entry["prompt_logprobs"] = prompt_logprobs(choice.call.prompt_logprobs, request.prompt_logprobs, self.tokens)
        if request.return_token_ids:
            entry |= {"token_ids": ids, "prompt_token_ids": choice.call.prompt}
        return entry

    def _prompt_text(self, choice: Choice) -> str:
        call = choice.call
        if call.text is None:
            call.text = self.tokens.decode(call.prompt, skip_special_tokens=call.params.skip_special_tokens)
        return call.text

    def _logprobs(self, choice: Choice, ids: Sequence[int], logprobs: Sequence[Logprobs],
                  first: bool) -> tuple[dict[str, Any], int]:
        entries: list[tuple[int, Logprobs | None]] = list(zip(ids, logprobs, strict=True))
        if first and self.request.echo:
            entries = [*zip(choice.call.prompt, (None, *choice.call.prompt_logprobs), strict=True), *entries]
        return completion_logprobs(entries, self.request.logprobs or 0, self.tokens, choice.offset)

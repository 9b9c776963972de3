"""From token events to what users see: deltas while a request runs, a ``RequestOutput`` at its end.

Owns text, stop strings, the reason a sequence ended as the user knows it, and the classes users read results from
(the names are vLLM's). Owns no scheduling: the engine asks ``OutputProcessor`` and tells the scheduler.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxkv.params import SamplingParams
from jaxkv.runtime.detokenizer import StopStrings, make_detokenizer
from jaxkv.runtime.tokenizer import Tokenizer
from jaxkv.types import Logprobs, Request, Start, TokenEvent


@dataclass(slots=True)
class Delta:
    """What one step added to one child of a request. Texts joined are the answer; token ids include the last one."""

    request_id: str
    index: int  # child, 0..n-1
    token_ids: tuple[int, ...] = ()
    text: str = ""  # whole characters, already cut at a stop string
    logprobs: tuple[Logprobs, ...] = ()  # of token_ids, if asked for
    prompt_logprobs: tuple[Logprobs, ...] = ()  # of prompt[1:], complete, with the first tokens, if asked for
    finish_reason: str | None = None  # "stop", "length", "abort" or "error"
    stop_reason: int | str | None = None  # the stop token id or stop string of the request; None for the model's EOS
    num_cached_tokens: int = 0
    start: Start | None = None  # with the first tokens
    hidden: tuple[float, ...] = ()  # final-norm state of the last prompt token, if the request is to be embedded
    cached_below: tuple[int, int] = (0, 0)  # of the cached tokens, from host and from disk
    error: str = ""  # why it ended with "error", if there is more to say


class OutputProcessor:
    """Text and end of one child. ValueError if the request needs text and there is no tokenizer."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        params = request.params
        if tokenizer is None and params.stop:
            raise ValueError("stop needs a tokenizer, and skip_tokenizer_init left it out; use stop_token_ids")
        self._request = request
        self.num_prompt_tokens = len(request.prompt)
        self._text = make_detokenizer(tokenizer, request.prompt, params.skip_special_tokens) if tokenizer else None
        self._stops = StopStrings(params.stop, params.include_stop_str_in_output) if params.stop else None
        self._prompt_logprobs: tuple[Logprobs, ...] = ()  # until the first token
        self._num_tokens = 0

    def process(self, event: TokenEvent) -> tuple[Delta, str | None]:
        """The delta of an event, and the stop string that ended the sequence if one did: the scheduler, which cannot
        see text, must then be told to finish it. Tokens after the one that completed the stop string are dropped."""
        request, reason = self._request, event.finish_reason
        if request.params.embed:
            return Delta(request.parent or request.id, request.child, finish_reason=reason,
                         num_cached_tokens=event.num_cached, start=event.start, hidden=event.hidden,
                         error=event.error), None
        tokens, text, stop = event.tokens, "", None
        if self._text is not None:
            tokens, text, stop = self._decode(event)
        self._num_tokens += len(tokens)
        stop_reason: int | str | None = stop
        if stop is not None:
            reason = "stop"
        elif reason == "stop" and event.stop_token in request.params.stop_token_ids:
            stop_reason = event.stop_token
        logprobs = event.logprobs[:len(tokens)] if request.params.logprobs is not None else ()
        delta = Delta(request.parent or request.id, request.child, tokens, text, logprobs, (), reason, stop_reason,
                      event.num_cached, event.start, cached_below=event.cached_below, error=event.error)
        if event.prompt_logprobs or self._prompt_logprobs:
            self._prompt_logprobs += event.prompt_logprobs
            if tokens or reason is not None:
                delta.prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, ()
        return delta, stop

    def broken(self) -> Delta:
        """The end of a child that cannot go on."""
        return Delta(self._request.parent or self._request.id, self._request.child, finish_reason="error")

    def _decode(self, event: TokenEvent) -> tuple[tuple[int, ...], str, str | None]:
        """Tokens up to a stop string, their text, the stop string."""
        assert self._text is not None
        params, stops = self._request.params, self._stops
        tokens, last = event.tokens, event.finish_reason is not None
        shown = tokens
        if event.stop_token is not None and event.finish_reason == "stop" and not params.include_stop_str_in_output:
            shown = tokens[:-1]  # a stop token ends the answer and is no part of its text
        if stops is None:
            return tokens, self._text.push(shown), None
        pieces = []
        for count, token in enumerate(shown, 1):  # one by one: the stop string decides which token is the last
            active = self._num_tokens + count > params.min_tokens
            piece, stop = stops.push(self._text.push((token,)), active)
            pieces.append(piece)
            if stop is not None:
                return tokens[:count], "".join(pieces), stop
        if last:
            pieces.append(stops.flush())
        return tokens, "".join(pieces), None


@dataclass(slots=True)
class Logprob:
    """Log-probability of a token, its rank among all (1: most likely) and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One answer to a prompt."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None  # sum over token_ids; None unless logprobs were asked for
    logprobs: list[dict[int, Logprob]] | None = None  # by token: the chosen one and the most likely ones
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def finished(self) -> bool:
        """Whether no token follows."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestMetrics:
    """Wall-clock seconds since the epoch, as ``LLM`` saw them."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """A prompt with its answers, in the order of their index."""

    request_id: str
    prompt: str | None  # None when token ids were given
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None  # by prompt token, None for the first
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0  # prompt tokens whose KV was found in the cache, by the child that found fewest
    metrics: RequestMetrics | None = field(default=None, repr=False)


class RequestState:
    """Collects the deltas of one request."""

    def __init__(self, request_id: str, prompt: str | None, prompt_token_ids: Sequence[int], params: SamplingParams,
                 tokenizer: Tokenizer | None) -> None:
        self.request_id = request_id
        self.num_prompt_tokens = len(prompt_token_ids)
        self._prompt, self._prompt_token_ids, self._params = prompt, list(prompt_token_ids), params
        self._tokenizer = tokenizer
        self._children = [_Child() for _ in range(params.n)]
        self._open = params.n
        self._prompt_logprobs: tuple[Logprobs, ...] = ()
        self._num_cached: int | None = None
        self._metrics = RequestMetrics(time.time())

    @property
    def finished(self) -> bool:
        """Whether every child has ended."""
        return self._open == 0

    def add(self, delta: Delta) -> None:
        """Takes the next delta of one of the children."""
        child = self._children[delta.index]
        if delta.token_ids:
            if self._metrics.first_token_time is None:
                self._metrics.first_token_time = time.time()
            if not child.token_ids:  # where the child entered
                known = self._num_cached
                self._num_cached = delta.num_cached_tokens if known is None else min(known, delta.num_cached_tokens)
            child.token_ids += delta.token_ids
        if delta.text:
            child.texts.append(delta.text)
        if delta.logprobs:
            child.logprobs += delta.logprobs
        if delta.prompt_logprobs and not self._prompt_logprobs:
            self._prompt_logprobs = delta.prompt_logprobs
        if delta.finish_reason is not None:
            child.finish_reason, child.stop_reason = delta.finish_reason, delta.stop_reason
            self._open -= 1
            if not self._open:
                self._metrics.finished_time = time.time()

    def output(self) -> RequestOutput:
        """Everything so far."""
        prompt_logprobs: list[dict[int, Logprob] | None] | None = None
        if self._params.prompt_logprobs is not None:
            count = self._params.prompt_logprobs
            prompt_logprobs = [None, *[logprob_dict(item, count, self._tokenizer) for item in self._prompt_logprobs]]
        outputs = [child.output(index, self._params, self._tokenizer) for index, child in enumerate(self._children)]
        return RequestOutput(self.request_id, self._prompt, self._prompt_token_ids, prompt_logprobs, outputs,
                             self.finished, self._num_cached or 0, self._metrics)


def logprob_dict(item: Logprobs, count: int, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """The chosen token first, then the ``count`` most likely ones; a token that is both appears once."""
    text = tokenizer.token_text if tokenizer is not None else lambda token: None
    found = {item.token_id: Logprob(item.logprob, item.rank, text(item.token_id))}
    for rank, (token, value) in enumerate(item.top[:count], 1):
        if token not in found:
            found[token] = Logprob(value, rank, text(token))
    return found


class _Child:
    __slots__ = ("finish_reason", "logprobs", "stop_reason", "texts", "token_ids")

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.texts: list[str] = []
        self.logprobs: list[Logprobs] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    def output(self, index: int, params: SamplingParams, tokenizer: Tokenizer | None) -> CompletionOutput:
        out = CompletionOutput(index, "".join(self.texts), self.token_ids, finish_reason=self.finish_reason,
                               stop_reason=self.stop_reason)
        if params.logprobs is not None:
            out.logprobs = [logprob_dict(item, params.logprobs, tokenizer) for item in self.logprobs]
            out.cumulative_logprob = sum(item.logprob for item in self.logprobs)
        return out

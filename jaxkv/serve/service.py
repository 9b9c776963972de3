"""What the routes share: the engine, the model's name, bodies and texts of requests, and the answer to prompts.

Owns the checks that every route makes before a prompt goes to the engine. Owns no URL (``app`` and the route files do).
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request

from jaxkv.serve.answer import Answer, Form
from jaxkv.serve.calls import Call, Mailbox
from jaxkv.serve.dialect import ChatOptions, Dialect, choose_dialect
from jaxkv.serve.engine_loop import EngineLike, EngineLoop
from jaxkv.serve.errors import ApiError, bad_request
from jaxkv.serve.limits import Limits
from jaxkv.serve.pieces import PIECE
from jaxkv.serve.protocol import GenerationRequest, PromptRequest, R, parse
from jaxkv.serve.worker import Worker

T = TypeVar("T")
log = logging.getLogger("jaxkv.serve")
INLINE_CHARS = 8192  # texts up to this length are tokenised on the event loop: a few milliseconds at most


@dataclass
class Service:
    """What the routes share."""

    loop: EngineLoop
    served_model_name: str | None = None
    limits: Limits = field(default_factory=Limits)
    max_batch: int = 32  # prompts to embed that go to the engine together
    max_wait_ms: float = 5.0  # how long the first of them waits for others
    batch_dir: str | None = None  # of files and batches; None: a directory of their own, gone with the process
    started: float = field(default_factory=time.time)
    ignored_fields: set[str] = field(default_factory=set)
    chat: ChatOptions = ChatOptions()
    cleanup: ExitStack = field(default_factory=ExitStack)  # closed when the server has ended
    encoder: Worker = field(default_factory=lambda: Worker("tokenizer", INLINE_CHARS))
    json: Worker = field(default_factory=lambda: Worker("json", PIECE))  # for bodies and answers; sizes are in bytes
    _dialect: Dialect | None = None  # known once the engine is there

    def engine(self) -> EngineLike:
        """The engine. Raises a 503 while it loads and after it failed."""
        if self.loop.failure is not None:
            raise ApiError(503, "the engine has failed", code="engine_error")
        if self.loop.engine is None:
            raise ApiError(503, "the model is loading", code="model_loading", headers={"retry-after": "1"})
        return self.loop.engine

    def dialect(self) -> Dialect:
        """How chats with this model are written and read. Raises ApiError without an engine, ConfigError for options that
        do not suit the model."""
        if self._dialect is None:
            self._dialect = choose_dialect(self.chat, self.engine().tokenizer)
        return self._dialect

    def model_name(self) -> str:
        return self.served_model_name or self.engine().model_name

    def check_model(self, name: str | None) -> str:
        """The served name; a 404 for any other name that is asked for."""
        own = self.model_name()
        if name is not None and name != own:
            raise ApiError(404, f"model {name[:100]!r} does not exist; this server serves {own!r}", param="model",
                           code="model_not_found")
        return own

    async def read(self, model: type[R], request: Request) -> R:
        """The request's JSON as ``model``, for the served model and with its sampling defaults. Raises ApiError, a 415 for what
        does not say that it is JSON: so a page of another origin cannot post without asking first. No header at all will do
        but from pages, which can leave it out."""
        kind = request.headers.get("content-type", "" if "origin" in request.headers else "application/json")
        if not re.fullmatch(r"application/([^\s;/]+\+)?json\s*(;.*)?", kind.strip(), re.IGNORECASE):
            raise ApiError(415, f"content-type must be application/json, got {kind[:80]!r}: send the header "
                                "\"content-type: application/json\"", param="content-type", code="unsupported_media_type")
        data, defaults = await self.body(request), self.engine().default_sampling
        body = await self.json.run(len(data), lambda: parse(model, data, self.ignored_fields, defaults))
        self.check_model(body.model)
        if isinstance(body, GenerationRequest):
            body.check_count(self.limits.max_open_requests)
        return body

    async def body(self, request: Request) -> bytes:
        """The request's body. Raises a 413 as soon as it is known to be too large."""
        return b"".join([part async for part in self.parts(request)])

    async def parts(self, request: Request) -> AsyncGenerator[bytes, None]:
        """The pieces of the request's body. Raises a 413 as soon as it is known to be too large."""
        most = self.limits.max_body
        limit = ApiError(413, f"the body must be at most {most} bytes", code="request_too_large")
        header = request.headers.get("content-length", "")
        if header.isdecimal() and int(header) > most:
            raise limit
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise limit
            yield part

    async def encode(self, text: str, *, add_special_tokens: bool, param: str = "prompt") -> list[int]:
        """Token ids of a text. Raises ApiError without a tokenizer."""
        return (await self.encode_all([text], add_special_tokens=add_special_tokens, param=param))[0]

    async def encode_all(self, texts: Sequence[str | list[int]], *, add_special_tokens: bool,
                         param: str = "prompt") -> list[list[int]]:
        """Token ids of texts, which may be token ids already. Raises ApiError without a tokenizer."""
        tokenizer: Any = self.tokenizer(param) if any(isinstance(text, str) for text in texts) else None
        size = sum(len(text) for text in texts if isinstance(text, str))

        def encode() -> list[list[int]]:
            return [tokenizer.encode(text, add_special_tokens=add_special_tokens) if isinstance(text, str) else text
                    for text in texts]

        try:
            return await self.aside(size, encode)
        except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of a tokenizer in Rust is no Exception, and must end this request only
            log.error("the tokenizer failed on a text of %d characters", size, exc_info=error)
            raise ApiError(500, "the tokenizer failed on this text", code="tokenizer_error") from None

    def tokenizer(self, param: str = "prompt") -> Any:
        """The tokenizer. Raises ApiError without one."""
        tokenizer = self.engine().tokenizer
        if tokenizer is None:
            raise bad_request(f"this server has no tokenizer: {param} must be token ids", param)
        return tokenizer

    async def aside(self, size: int, work: Callable[[], T]) -> T:
        """What ``work`` gives. It runs on another thread if ``size`` characters or tokens would hold the event loop up."""
        return await self.encoder.run(size, work)

    def fit(self, request: PromptRequest, ids: list[int], answer: int, param: str | None = None) -> list[int]:
        """The ids of a prompt, truncated if the request says so. Raises ApiError for none and for more than the window."""
        window, name = self.engine().max_model_len, param or request.renamed().get("prompt", "prompt")
        if not ids:
            raise bad_request(f"{name} must not be empty", name)
        most = self.limits.max_prompt_tokens
        kept = request.cut(ids, window, max(answer, window - most) if most else answer)
        if len(kept) > self._longest():
            raise self._too_long(f"{len(kept)} tokens", name)
        return kept

    def check_text(self, request: PromptRequest, text: str, param: str | None = None) -> None:
        """Raises ApiError for a text that is certain to have too many tokens, in a time that does not grow with it."""
        tokenizer: Any = self.engine().tokenizer
        each = tokenizer and tokenizer.characters_per_token
        if each and request.truncate_prompt_tokens is None and len(text) > each * self._longest():
            name = param or request.renamed().get("prompt", "prompt")
            raise self._too_long(f"{len(text)} characters, of which a token holds at most {each},", name)

    def _longest(self) -> int:
        """Tokens of the longest prompt."""
        return min(self.engine().max_model_len - 1, self.limits.max_prompt_tokens or 2**62)

    def _too_long(self, what: str, name: str) -> ApiError:
        window, most = self.engine().max_model_len, self.limits.max_prompt_tokens
        bound = f"this server takes {most} tokens" if most and most < window else \
            f"this model's maximum context length is {window} tokens, prompt and answer together"
        return bad_request(f"{name}: {what} do not fit: {bound}", name, "context_length_exceeded")

    def answer(self, request: GenerationRequest, form: Form, params: Any,
               prompts: Sequence[tuple[list[int], str | None]], kind: type[Answer] = Answer) -> Answer:
        """The response that submits the prompts and waits for them. Raises ApiError for one that cannot fit."""
        engine, mailbox = self.engine(), Mailbox()
        if engine.tokenizer is None and params.stop:
            raise bad_request("this server has no tokenizer: stop strings cannot be found", "stop")
        if params.n > self.limits.max_n:
            name = request.renamed().get("n", "n")
            raise bad_request(f"{name} must be at most {self.limits.max_n}, got {params.n}", name)
        name, hints, limit = form.head["id"], request.cache_hints(), params.max_tokens or 1
        calls = []
        for i, (ids, text) in enumerate(prompts):
            kept = self.fit(request, ids, limit)
            calls.append(Call(f"{name}-{i}", kept, params, mailbox, i, text if len(kept) == len(ids) else None, hints))
        return kind(self.loop, calls, request, form, self.json)

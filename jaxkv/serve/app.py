"""The HTTP face: routes, API keys, body limits, and an error object for everything that goes wrong.

Owns which URL does what. Requests are parsed by ``protocol``, answered by ``answer``; the engine is behind
``engine_loop``. The event loop does no work that grows with a prompt: long texts are tokenised on another thread.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxkv import __version__
from jaxkv.serve import chat, completions
from jaxkv.serve import metrics as prometheus
from jaxkv.serve.answer import Answer, Form, respond
from jaxkv.serve.dialect import ChatOptions, Dialect, choose_dialect
from jaxkv.serve.engine_loop import Call, EngineLike, EngineLoop, Mailbox
from jaxkv.serve.errors import ApiError, bad_request
from jaxkv.serve.logprobs import TokenText
from jaxkv.serve.protocol import ChatRequest, CompletionRequest, GenerationRequest, parse

T = TypeVar("T")
log = logging.getLogger("jaxkv.serve")
INLINE_CHARS = 8192  # texts up to this length are tokenised on the event loop: a few milliseconds at most


@dataclass
class Service:
    """What the routes share."""

    loop: EngineLoop
    served_model_name: str | None = None
    max_body: int = 32 * 2**20  # bytes
    started: float = field(default_factory=time.time)
    ignored_fields: set[str] = field(default_factory=set)
    encoder: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "tokenizer"))
    chat: ChatOptions = ChatOptions()
    _dialect: Dialect | None = None  # known once the engine is there

    def engine(self) -> EngineLike:
        """The engine. Raises a 503 while it loads, after it failed and while the server drains."""
        if self.loop.failure is not None:
            raise ApiError(503, "the engine has failed", code="engine_error")
        if self.loop.engine is None:
            raise ApiError(503, "the model is loading", code="model_loading", headers={"retry-after": "1"})
        return self.loop.engine

    def model_name(self) -> str:
        return self.served_model_name or self.engine().model_name

    def check_model(self, name: str | None) -> str:
        """The served name; a 404 for any other name that is asked for."""
        own = self.model_name()
        if name is not None and name != own:
            raise ApiError(404, f"model {name[:100]!r} does not exist; this server serves {own!r}", param="model",
                           code="model_not_found")
        return own

    async def body(self, request: Request) -> bytes:
        """The request's body. Raises a 413 as soon as it is known to be too large."""
        limit = ApiError(413, f"the body must be at most {self.max_body} bytes", code="request_too_large")
        size = request.headers.get("content-length", "")
        if size.isdecimal() and int(size) > self.max_body:
            raise limit
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self.max_body:
                raise limit
        return bytes(body)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text. Raises ApiError without a tokenizer."""
        tokenizer = self.engine().tokenizer
        if tokenizer is None:
            raise bad_request("this server has no tokenizer: prompt must be token ids", "prompt")
        return await self.aside(len(text), lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens))

    async def aside(self, size: int, work: Callable[[], T]) -> T:
        """What ``work`` on so many characters returns; on another thread unless they are few."""
        if size <= INLINE_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self.encoder, work)

    def dialect(self) -> Dialect:
        """How chats with this model are written and read. Raises ApiError without an engine, ConfigError for options that
        do not suit the model."""
        if self._dialect is None:
            self._dialect = choose_dialect(self.chat, self.engine().tokenizer)
        return self._dialect

    def answer(self, request: GenerationRequest, form: Form, params: Any,
               prompts: Sequence[tuple[list[int], str | None]]) -> Answer:
        """The response that submits the prompts and waits for them. Raises ApiError for one that cannot fit."""
        engine, mailbox = self.engine(), Mailbox()
        if engine.tokenizer is None and params.stop:
            raise bad_request("this server has no tokenizer: stop strings cannot be found", "stop")
        for ids, _ in prompts:
            if not ids:
                raise bad_request("prompt must not be empty", "prompt")
            if len(ids) >= engine.max_model_len:
                field_name = request.renamed().get("prompt", "prompt")
                raise bad_request(f"{field_name}: {len(ids)} tokens do not fit: the model's window is "
                                  f"{engine.max_model_len} tokens, prompt and answer together", field_name,
                                  "context_length_exceeded")
        name, hints = form.head["id"], request.cache_hints()
        calls = [Call(f"{name}-{i}", ids, params, mailbox, i, text, hints)
                 for i, (ids, text) in enumerate(prompts)]
        return Answer(self.loop, calls, request, form)


def build_app(service: Service, api_keys: Sequence[str] = ()) -> ASGIApp:
    """The ASGI application."""
    app = FastAPI(title="jaxkv", version=__version__, docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_status(app, service)

    @app.post("/v1/completions", openapi_extra=_schema(CompletionRequest))
    async def create_completion(request: Request) -> Response:
        body = parse(CompletionRequest, await service.body(request), service.ignored_fields)
        model = service.check_model(body.model)
        params = completions.params_of(body)
        special = body.add_special_tokens is not False
        prompts = [(await service.encode(p, add_special_tokens=special), p) if isinstance(p, str) else (p, None)
                   for p in completions.prompts_of(body)]
        tokens = TokenText(service.engine().tokenizer)
        return service.answer(body, completions.CompletionForm(f"cmpl-{uuid.uuid4().hex}", model, body, tokens), params,
                              prompts)

    @app.post("/v1/chat/completions", openapi_extra=_schema(ChatRequest))
    async def create_chat_completion(request: Request) -> Response:
        body = parse(ChatRequest, await service.body(request), service.ignored_fields)
        model = service.check_model(body.model)
        tokenizer, dialect = service.engine().tokenizer, service.dialect()
        talk = await service.aside(chat.size_of(body), lambda: chat.prepare(body, tokenizer, dialect))
        ids = await service.encode(talk.prompt, add_special_tokens=bool(body.add_special_tokens))
        form = chat.ChatForm(f"chatcmpl-{uuid.uuid4().hex}", model, body, TokenText(tokenizer), talk)
        return service.answer(body, form, talk.params, [(ids, talk.prompt)])

    return _KeyCheck(app, [key.encode() for key in api_keys])


def _add_status(app: FastAPI, service: Service) -> None:
    registry: list[Any] = []  # made at the first scrape: the model's name is known only when the engine is

    @app.get("/v1/models")
    async def list_models() -> Any:
        card = {"id": service.model_name(), "object": "model", "created": int(service.started), "owned_by": "jaxkv",
                "max_model_len": service.engine().max_model_len}
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}")
    async def get_model(name: str) -> Any:
        service.check_model(name)
        return (await list_models())["data"][0]

    @app.get("/health")
    async def health() -> Any:
        service.engine()
        if service.loop.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        return {"status": "ok"}

    @app.get("/version")
    async def show_version() -> Any:
        return {"version": app.version}

    @app.get("/debug/kv")
    async def inspect_kv(top: Annotated[int, Query(ge=1, le=10_000)] = 100) -> Any:
        service.engine()
        return await service.loop.ask(lambda engine: engine.inspect_kv(top))

    @app.get("/metrics")
    async def metrics() -> Response:
        if not registry:
            engine = service.engine()
            registry.append(prometheus.registry(engine.metrics, service.loop.latencies, service.model_name()))
        return Response(prometheus.render(registry[0]), media_type="text/plain; version=0.0.4; charset=utf-8")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def no_route(request: Request, error: HTTPException) -> Response:
        message = {404: "unknown route", 405: "method not allowed"}.get(error.status_code, str(error.detail))
        refusal = ApiError(error.status_code, f"{message}: {request.method} {request.url.path[:200]}")
        return JSONResponse(refusal.body(), refusal.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def bad_query(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        refusal = ApiError(400, f"{first['loc'][-1]}: {first['msg']}", param=str(first["loc"][-1]))
        return JSONResponse(refusal.body(), refusal.status)

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody reads it

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return JSONResponse(ApiError(500, "internal server error").body(), 500)


class _KeyCheck:
    """Lets only requests with a known bearer token reach /v1 and /debug; keys are compared in constant time, never logged."""

    def __init__(self, app: ASGIApp, keys: Sequence[bytes]):
        self.app, self.keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.keys and scope["type"] == "http" and scope["path"].startswith(("/v1", "/debug")):
            header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            scheme, _, token = header.partition(b" ")
            matches = [hmac.compare_digest(token.strip(), key) for key in self.keys]
            if scheme.lower() != b"bearer" or not any(matches):
                error = ApiError(401, "missing or wrong API key: send \"Authorization: Bearer KEY\"",
                                 code="invalid_api_key")
                return await respond(send, 401, error.render(), {"www-authenticate": "Bearer"})
        await self.app(scope, receive, send)


def _schema(model: type[GenerationRequest]) -> dict[str, Any]:
    schema = model.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}

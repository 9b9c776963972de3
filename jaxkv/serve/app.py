"""The HTTP face: routes, API keys, body limits, and an error object for everything that goes wrong.

Owns which URL does what. Requests are parsed by ``protocol``, answered by ``answer``; the engine is behind
``engine_loop``. The event loop does no work that grows with a prompt: long texts are tokenised on another thread.
"""

from __future__ import annotations

import hmac
import uuid
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxkv import __version__
from jaxkv.serve import chat, completions
from jaxkv.serve import metrics as prometheus
from jaxkv.serve.answer import respond
from jaxkv.serve.embeddings import add_embeddings
from jaxkv.serve.errors import ApiError
from jaxkv.serve.logprobs import TokenText
from jaxkv.serve.openapi import document, documented
from jaxkv.serve.page import add_page
from jaxkv.serve.protocol import ChatRequest, CompletionRequest
from jaxkv.serve.schemas import ChatCompletionResponse, CompletionResponse, ModelCard, ModelList
from jaxkv.serve.service import Service
from jaxkv.serve.tokenize import add_tokenize


def build_app(service: Service, api_keys: Sequence[str] = ()) -> ASGIApp:
    """The ASGI application."""
    app = FastAPI(title="jaxkv", version=__version__, docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_status(app, service)
    add_page(app, service)
    add_tokenize(app, service)
    add_embeddings(app, service)
    document(app)

    @app.post("/v1/completions", **documented(CompletionRequest, CompletionResponse, stream=True))
    async def create_completion(request: Request) -> Response:
        body = await service.read(CompletionRequest, request)
        params, prompts = completions.params_of(body), completions.prompts_of(body)
        ids = await service.encode_all(prompts, add_special_tokens=body.add_special_tokens is not False)
        tokens = TokenText(service.engine().tokenizer, body.return_tokens_as_token_ids)
        form = completions.CompletionForm(f"cmpl-{uuid.uuid4().hex}", service.model_name(), body, tokens)
        return service.answer(body, form, params, [(i, p if isinstance(p, str) else None) for i, p in zip(ids, prompts)])

    @app.post("/v1/chat/completions", **documented(ChatRequest, ChatCompletionResponse, stream=True))
    async def create_chat_completion(request: Request) -> Response:
        body = await service.read(ChatRequest, request)
        params, tokenizer = chat.params_of(body), service.engine().tokenizer
        text = chat.prompt_of(body, tokenizer)
        ids = await service.encode(text, add_special_tokens=bool(body.add_special_tokens))
        tokens = TokenText(tokenizer, body.return_tokens_as_token_ids)
        form = chat.ChatForm(f"chatcmpl-{uuid.uuid4().hex}", service.model_name(), body, tokens)
        return service.answer(body, form, params, [(ids, text)])

    return _KeyCheck(app, [key.encode() for key in api_keys])


def _add_status(app: FastAPI, service: Service) -> None:
    registry: list[Any] = []  # made at the first scrape: the model's name is known only when the engine is

    @app.get("/v1/models", **documented(None, ModelList))
    async def list_models() -> Any:
        created, engine = int(service.started), service.engine()
        allowed = {"sampling": True, "logprobs": True, "view": True, "create_engine": False, "search_indices": False,
                   "fine_tuning": False}
        permission = {"id": f"modelperm-{created}", "object": "model_permission", "created": created, "organization": "*",
                      "group": None, "is_blocking": False} | {f"allow_{name}": value for name, value in allowed.items()}
        card = {"id": service.model_name(), "object": "model", "created": created, "owned_by": "jaxkv",
                "root": engine.model_name, "parent": None, "max_model_len": engine.max_model_len,
                "permission": [permission]}
        return {"object": "list", "data": [card]}

    @app.get("/v1/models/{name:path}", **documented(None, ModelCard))
    async def get_model(name: str) -> Any:
        service.check_model(name)
        return (await list_models())["data"][0]

    @app.get("/ping")
    @app.post("/ping")
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

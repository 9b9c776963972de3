"""The HTTP face: routes, body limits, and an error object for everything that goes wrong.

Owns which URL does what. Requests come through ``gate``, are parsed by ``protocol`` and answered by ``answer``; the engine
is behind ``engine_loop``. The event loop does no work that grows with a prompt: long texts are tokenised on another thread.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import orjson
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from jaxkv import __version__
from jaxkv.serve import chat, completions
from jaxkv.serve import metrics as prometheus
from jaxkv.serve.batches import add_batches
from jaxkv.serve.embeddings import add_embeddings
from jaxkv.serve.errors import ApiError
from jaxkv.serve.gate import Gate
from jaxkv.serve.limits import KeyRing
from jaxkv.serve.logprobs import TokenText
from jaxkv.serve.openapi import document, documented
from jaxkv.serve.page import add_page
from jaxkv.serve.protocol import ChatRequest, CompletionRequest
from jaxkv.serve.records import Record
from jaxkv.serve.responses import add_responses
from jaxkv.serve.schemas import ChatCompletionResponse, CompletionResponse, Health, ModelCard, ModelList, Version
from jaxkv.serve.service import Service
from jaxkv.serve.tokenize import add_tokenize


def build_app(service: Service, keys: KeyRing | None = None, *, origins: Sequence[str] = (), credentials: bool = False,
              done: Callable[[Record], None] = Record.write) -> ASGIApp:
    """The ASGI application. Pages of ``origins`` may call it; ``done`` gets the record of every request."""
    app = FastAPI(title="jaxkv", version=__version__, docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_status(app, service, shared=keys is not None and len(keys) > 1)
    add_page(app, service)
    add_tokenize(app, service)
    add_embeddings(app, service)
    add_responses(app, service)
    add_batches(app, service)
    document(app)

    @app.post("/v1/completions", **documented(CompletionRequest, CompletionResponse, stream=True))
    async def create_completion(request: Request) -> Response:
        body = await service.read(CompletionRequest, request)
        params = completions.params_of(body)
        prompts = await service.json.run(body.size, lambda: completions.prompts_of(body))
        for prompt in prompts:
            if isinstance(prompt, str):
                service.check_text(body, prompt)
        ids = await service.encode_all(prompts, add_special_tokens=body.add_special_tokens is not False)
        tokens = TokenText(service.engine().tokenizer, body.return_tokens_as_token_ids)
        form = completions.CompletionForm(f"cmpl-{uuid.uuid4().hex}", service.model_name(), body, tokens)
        return service.answer(body, form, params, [(i, p if isinstance(p, str) else None) for i, p in zip(ids, prompts)])

    @app.post("/v1/chat/completions", **documented(ChatRequest, ChatCompletionResponse, stream=True))
    async def create_chat_completion(request: Request) -> Response:
        body = await service.read(ChatRequest, request)
        tokenizer, dialect = service.engine().tokenizer, service.dialect()
        talk = await service.aside(body.size, lambda: chat.prepare(body, tokenizer, dialect))
        service.check_text(body, talk.prompt)
        ids = await service.encode(talk.prompt, add_special_tokens=bool(body.add_special_tokens))
        tokens = TokenText(tokenizer, body.return_tokens_as_token_ids)
        form = chat.ChatForm(f"chatcmpl-{uuid.uuid4().hex}", service.model_name(), body, tokens, talk)
        return service.answer(body, form, talk.params, [(ids, talk.prompt)])

    gate: ASGIApp = Gate(app, service.loop, keys or KeyRing(), service.limits, done)
    if origins:  # outermost: a page must be able to read a refusal too
        gate = CORSMiddleware(gate, allow_origins=origins, allow_credentials=credentials, allow_methods=["*"],
                              allow_headers=["*"], expose_headers=["x-request-id", "retry-after"])
    return gate


def _add_status(app: FastAPI, service: Service, shared: bool) -> None:
    """``shared``: by clients that must not read each other's prompts."""
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

    @app.get("/ping", **documented(None, Health))
    @app.post("/ping", **documented(None, Health))
    @app.get("/health", **documented(None, Health))
    async def health() -> Any:
        service.engine()
        if service.loop.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        return {"status": "ok"}

    @app.get("/version", **documented(None, Version))
    async def show_version() -> Any:
        return {"version": app.version}

    @app.get("/debug/kv", **documented(None, None))
    async def inspect_kv(top: Annotated[int, Query(ge=1, le=2000)] = 100) -> Response:
        service.engine()
        seen = await service.loop.ask(lambda engine: engine.inspect_kv(top))
        if shared:
            seen["nodes"] = [node | {"head": None} for node in seen["nodes"]]
        return Response(orjson.dumps(seen), media_type="application/json")

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



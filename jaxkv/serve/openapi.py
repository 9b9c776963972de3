"""/openapi.json, true to what the routes do: bodies they parse themselves, the errors all of them give, streams."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from jaxkv.serve.schemas import ErrorResponse

_REF = "#/components/schemas/{model}"
ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "The request is malformed or asks for what cannot be."},
    401: {"model": ErrorResponse, "description": "The API key is missing or wrong."},
    404: {"model": ErrorResponse, "description": "There is no such model, route or object."},
    408: {"model": ErrorResponse, "description": "The body stopped coming."},
    413: {"model": ErrorResponse, "description": "The body is too large."},
    415: {"model": ErrorResponse, "description": "The content-type is not that of the body this route reads."},
    429: {"model": ErrorResponse, "description": "Too many requests are open; Retry-After says when to try again."},
    500: {"model": ErrorResponse, "description": "The engine failed."},
    503: {"model": ErrorResponse, "description": "The model is loading, or the server is shutting down."},
    504: {"model": ErrorResponse, "description": "The request took longer than its deadline."},
}
_REQUIRED = {"CompletionRequest": "prompt", "EmbeddingRequest": "input"}  # fields that the routes check themselves


def documented(request: type[BaseModel] | None, answer: type[BaseModel] | None, *, stream: bool = False) -> dict[str, Any]:
    """Arguments of a route: the JSON it reads and gives, and the errors. ``stream``: it may give server-sent events instead."""
    good: dict[str, Any] = {"description": "The answer.", **({"model": answer} if answer else {})}
    if stream:
        good["content"] = {"text/event-stream": {}}
    route: dict[str, Any] = {"responses": {200: good, **ERRORS}}
    if request is not None:
        schema = request.model_json_schema(ref_template=_REF)
        if name := _REQUIRED.get(request.__name__):
            schema["required"] = [*schema.get("required", ()), name]
            schema["properties"][name].pop("default", None)
        route["openapi_extra"] = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    return route


def document(app: FastAPI) -> None:
    """Gives the application its document, made at the first request for it."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _tidy(get_openapi(title=app.title, version=app.version, routes=app.routes))
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _tidy(doc: dict[str, Any]) -> dict[str, Any]:
    """Moves schemas of bodies to the components, drops FastAPI's 422, which no route gives, and says where a key may be
    asked for: on some servers only, so that none is a choice too."""
    schemas = doc.setdefault("components", {}).setdefault("schemas", {})
    doc["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for url, path in doc["paths"].items():
        for method, operation in path.items():
            if method == "post" or url.startswith(("/v1", "/debug")):
                operation["security"] = [{"key": []}, {}]
            operation["responses"].pop("422", None)
            content = operation.get("requestBody", {}).get("content", {}).get("application/json")
            if content and "title" in content["schema"]:
                schema = content["schema"]
                schemas |= schema.pop("$defs", {})
                schemas[schema["title"]] = schema
                content["schema"] = {"$ref": _REF.format(model=schema["title"])}
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    return doc
